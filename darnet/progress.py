"""Counts in; a live line with rate and time left in a terminal, a heartbeat line on stderr where there is none."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

HEARTBEAT_S = 15.0


@dataclass
class Meter:
    """How far a piece of work is: units done, and a count of each kind of outcome."""

    title: str
    total: int
    console: Console
    bar: Progress | None
    done: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    started_s: float = field(default_factory=time.monotonic)
    spoke_s: float = field(default_factory=time.monotonic)

    def advance(self, units: int, counts: Mapping[str, int]) -> None:
        """Note that `units` more are done, with these outcomes."""
        self.done += units
        self.counts.update(counts)
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.done, counts=self.describe_counts())
        elif time.monotonic() - self.spoke_s >= HEARTBEAT_S:
            self.spoke_s = time.monotonic()
            self.console.print(self.describe(), highlight=False, soft_wrap=True)

    def describe_counts(self) -> str:
        """Outcomes, the most frequent first."""
        return "  ".join(f"{name} {count}" for name, count in self.counts.most_common())

    def describe(self) -> str:
        """One line for a log."""
        spent_s = time.monotonic() - self.started_s
        left_s = spent_s / self.done * (self.total - self.done) if self.done else float("nan")
        pace = f"{self.done / spent_s:.2f}/s, {left_s:.0f} s left" if self.done else f"{spent_s:.0f} s so far"
        return f"{self.title}: {self.done}/{self.total}, {pace}  {self.describe_counts()}".rstrip()


@contextmanager
def show_progress(title: str, total: int) -> Iterator[Meter]:
    """Show a meter on stderr while the work lasts."""
    console = Console(stderr=True)
    if not console.is_terminal:
        meter = Meter(title, total, console, None)
        console.print(f"{title}: {total} to do", highlight=False)
        yield meter
        console.print(meter.describe(), highlight=False, soft_wrap=True)
        return
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[counts]}"),
    )
    with Progress(*columns, console=console) as bar:
        bar.add_task(title, total=total, counts="")
        yield Meter(title, total, console, bar)
