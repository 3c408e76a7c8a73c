"""What a person sees while a job runs, on stderr: a live line with rate and time left, headings and tables.

Where there is no terminal, a heartbeat line now and then takes the place of the live one.
"""

import math
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

HEARTBEAT_S = 15.0


@dataclass
class Meter:
    """How far a piece of work is: units done, and a count of each kind of outcome.

    `found` of the units were done before this start, and tell nothing of its pace.
    """

    title: str
    total: int
    console: Console
    bar: Progress | None
    done: int = 0
    found: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    started_s: float = field(default_factory=time.monotonic)

    def advance(self, units: int, counts: Mapping[str, int]) -> None:
        """Note that `units` more are done, with these outcomes."""
        self.done += units
        self.counts.update(counts)
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.done, counts=self.describe_counts())

    def find(self, units: int, counts: Mapping[str, int]) -> None:
        """Note that `units` more had been done before this start, with these outcomes."""
        self.found += units
        self.advance(units, counts)

    def estimate_left_s(self) -> float:
        """Seconds left at the pace since the start; NaN before there is one."""
        made = self.done - self.found
        return (time.monotonic() - self.started_s) / made * (self.total - self.done) if made else math.nan

    def describe_counts(self) -> str:
        """Outcomes, the most frequent first."""
        return "  ".join(f"{name} {count}" for name, count in self.counts.most_common())

    def describe(self) -> str:
        """One line for a log."""
        spent_s = time.monotonic() - self.started_s
        made, left_s = self.done - self.found, self.estimate_left_s()
        pace = f"{made / spent_s:.2f}/s, {left_s:.0f} s left" if made else f"{spent_s:.0f} s so far"
        return f"{self.title}: {self.done}/{self.total}, {pace}  {self.describe_counts()}".rstrip()


@contextmanager
def show_progress(title: str, total: int) -> Iterator[Meter]:
    """Show a meter on stderr while the work lasts."""
    console = _open_console()
    if not console.is_terminal:
        meter = Meter(title, total, console, None)
        console.print(f"{title}: {total} to do", highlight=False)
        with _heartbeat(meter):
            yield meter
        console.print(meter.describe(), highlight=False, soft_wrap=True)
        return
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        _TimeLeftColumn(),
        TextColumn("[dim]{task.fields[counts]}"),
    )
    with Progress(*columns, console=console) as bar:
        meter = Meter(title, total, console, bar)
        bar.add_task(title, total=total, counts="", meter=meter)
        yield meter


class _TimeLeftColumn(ProgressColumn):
    """As the meter estimates it: Rich's own would take what was found done for a burst of speed."""

    def render(self, task: Task) -> Text:
        left_s = task.fields["meter"].estimate_left_s()
        return Text("-:--:--" if math.isnan(left_s) else str(timedelta(seconds=round(left_s))), style="cyan")


@contextmanager
def _heartbeat(meter: Meter) -> Iterator[None]:
    """A line now and then, also while nothing gets done: silence looks like death."""
    is_over = threading.Event()

    def beat() -> None:
        while not is_over.wait(HEARTBEAT_S):
            meter.console.print(meter.describe(), highlight=False, soft_wrap=True)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _open_console() -> Console:
    """People's text goes to stderr. A log has no width of its own: 120 columns hold our tables."""
    console = Console(stderr=True)
    return console if console.is_terminal else Console(stderr=True, width=120)


def print_heading(text: str) -> None:
    """Say what comes next."""
    _open_console().print(f"\n[bold cyan]{text}[/]", highlight=False, soft_wrap=True)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; numbers stand on the right."""
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        is_number = all(isinstance(row[index], int | float) for row in rows)
        table.add_column(name, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row))
    _open_console().print(table)
