"""Nights as an operator starts them, on small real DICOM files, and an analyst who looks on."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.ct_fixtures import make_chest, write_chest
from tests.places import ROOT

NIGHT = "2026-01-01"


def write_archive(folder: Path, num_chests: int) -> None:
    """Chests that differ, one of them spoiled, one source of two series, and strays."""
    for index in range(num_chests):
        write_chest(folder / f"chest{index:02d}", np.roll(make_chest(), index, axis=2))
    write_chest(folder / "gap")[7].unlink()
    write_chest(folder / "two", SeriesInstanceUID="1.2.3.7")
    for path in write_chest(folder / "second", make_chest()[:, ::-1]):
        path.rename(folder / "two" / f"second-{path.name}")
    (folder / "second").rmdir()
    (folder / "chest00" / "LICENSE").write_text("a stray")


def start_job(
    archive: Path | str,
    model: str,
    results: Path | str,
    *flags: str,
    night: str = NIGHT,
    variables: Mapping[str, str] | None = None,
) -> "subprocess.Popen[str]":
    """`python -m jobs.score` as a person starts it, in a process group of its own; `night` may be "", for none."""
    command = [
        sys.executable,
        "-m",
        "jobs.score",
        "--archive",
        str(archive),
        "--model",
        model,
        "--results",
        str(results),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= variables or {}
    return subprocess.Popen(
        [*command, "--score.part-scans", "2", *(["--night", night] if night else []), *flags],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def finish_job(job: "subprocess.Popen[str]") -> dict[str, Any]:
    """Its summary; raises if the last line is none, or if the exit code in it is not the one that came."""
    printed = job.communicate(timeout=300)[0]
    try:
        summary: dict[str, Any] = json.loads(printed.splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise ValueError(f"no summary in {printed[-400:]!r}") from error
    assert job.returncode == summary["exit_code"]
    return summary


def count_parts(results: Path) -> int:
    """Parts staged so far."""
    return len(list(results.glob("_runs/*/parts/*.parquet")))


UNREADABLE = -1  # in place of a number of rows, where an object of the table could not be read


class PollingReader(threading.Thread):
    """An analyst who counts the published rows every 20 ms."""

    def __init__(self, results: Path) -> None:
        super().__init__(daemon=True)
        self.counts: list[int] = []
        self.error: Exception | None = None
        self._results, self._is_over = results, threading.Event()

    def run(self) -> None:
        try:
            is_last = False
            while not is_last:  # the last look begins after the end
                is_last = self._is_over.wait(0.02)
                self.counts.append(self._count())
        except Exception as error:  # told by `stop`
            self.error = error

    def _count(self) -> int:
        try:
            files = sorted(self._results.glob("predictions/*.parquet"))
            return sum(pq.read_table(path).num_rows for path in files)
        except (OSError, pa.ArrowException):  # a torn object: a night seen in part
            return UNREADABLE

    def stop(self) -> list[int]:
        """What it counted. Raises: RuntimeError if it could not look on."""
        self._is_over.set()
        self.join(timeout=30)
        if self.error is not None or self.is_alive():
            raise RuntimeError(f"the reader ended after {len(self.counts)} polls: {self.error!r}")
        return self.counts
