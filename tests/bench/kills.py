"""What a night loses when its driver is killed at any moment, or started twice, and what a reader sees of it: a table.

`make bench-kills` runs real jobs on small chests. A quiet night is the truth; every other must end in its rows, each
once, with the same bits, and a reader that polls every 20 ms must see none of them or all. A job that ends with 1 or 4,
as when a busy machine starts no cluster in time, is started again, as jobs/night.sh does; how often is told.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from darnet.terminal import print_table
from tests.bundle_fixtures import write_random_bundle
from tests.night_jobs import PollingReader, finish_job, start_job, write_archive

Row = tuple[Any, ...]
KEYS = ["source", "scan_id"]
ATTEMPTS = 3  # as jobs/night.sh
FACTS = [
    *("source", "scan_id", "status", "input_sha256", "model_sha256"),
    *("probability_cp", "probability_ncp", "probability_normal", "fold_std_ncp", "cam_in_lung_fraction"),
]


def read_rows(results: Path) -> list[Row]:
    """What was published, without what a clock or a run's name changes."""
    files = sorted((results / "predictions").glob("*.parquet"))
    return [tuple(row.values()) for path in files for row in pq.read_table(path, columns=FACTS).to_pylist()]


def judge(truth: Sequence[Row], rows: Sequence[Row], seen: Sequence[int]) -> tuple[int, int, int, int]:
    """Rows lost, rows doubled, rows with other bits, and polls that saw part of a night, or could not read it.

    Raises: RuntimeError if the last poll saw other rows than there are: the reader was blind.
    """
    if not seen or seen[-1] != len(rows):
        raise RuntimeError(f"the reader saw {seen[-1] if seen else 'no'} rows at the end, and there are {len(rows)}")
    expected, given = {row[:2]: row for row in truth}, Counter(row[:2] for row in rows)
    other = sum(row != expected.get(row[:2]) for row in rows)
    return (
        len(expected.keys() - given.keys()),
        given.total() - len(given),
        other,
        sum(count not in (0, len(truth)) for count in seen),
    )


def kill_and_resume(archive: Path, model: str, results: Path, after_s: float) -> int:
    """SIGKILL the driver and all it started, then start it again as a scheduler would; how many jobs failed."""
    job = start_job(archive, model, results)
    time.sleep(after_s)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    return finish_night(archive, model, results)


def start_two(archive: Path, model: str, results: Path, apart_s: float) -> int:
    """Two drivers of the same night, so long apart, again if both fail; how many jobs failed."""
    first = start_job(archive, model, results)
    time.sleep(apart_s)
    second = start_job(archive, model, results)
    num_failed = sum([has_failed(first), has_failed(second)])
    return num_failed + (finish_night(archive, model, results) if num_failed == 2 else 0)


def finish_night(archive: Path, model: str, results: Path) -> int:
    """Start the night until it ends well, `ATTEMPTS` times at most; how many jobs failed."""
    for num_failed in range(ATTEMPTS):
        if not has_failed(start_job(archive, model, results)):
            return num_failed
    return ATTEMPTS


def has_failed(job: "subprocess.Popen[str]") -> bool:
    """Whether a job ended with what may pass another time, of which the reason is told.

    Raises: RuntimeError for an end that a person would have to look at.
    """
    summary = finish_job(job)
    if summary["exit_code"] not in (0, 1, 4):
        raise RuntimeError(f"a job ended with {summary['exit_code']}: {summary.get('error')}")
    if summary["exit_code"]:
        print(f"a job ended with {summary['exit_code']}: {summary.get('error')}", file=sys.stderr)
    return bool(summary["exit_code"])


def watch(
    truth: Sequence[Row], results: Path, disturb: Callable[[Path], int]
) -> tuple[tuple[int, int, int, int], int, int]:
    """A disturbed night in an empty results table, judged; how many jobs failed, and how often it was polled."""
    (results / "predictions").mkdir(parents=True)
    reader = PollingReader(results)
    reader.start()
    num_failed = disturb(results)
    seen = reader.stop()
    verdict = judge(truth, read_rows(results), seen)
    shutil.rmtree(results)
    return verdict, num_failed, len(seen)


def main() -> int:
    """Run the benchmark; 1 if anything was lost, doubled, changed or seen in part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chests", type=int, default=30)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        archive, model = place / "archive", str(place / "bundle")
        write_archive(archive, arguments.chests)
        write_random_bundle(Path(model))
        started = time.monotonic()
        if (summary := finish_job(start_job(archive, model, place / "quiet")))["exit_code"]:
            raise RuntimeError(f"the undisturbed night failed: {summary}")
        quiet_s = time.monotonic() - started
        truth = read_rows(place / "quiet")
        lines = [
            (
                "driver killed",
                arguments.moments,
                [
                    lambda results, after_s=quiet_s * (moment + 0.5) / arguments.moments: kill_and_resume(
                        archive, model, results, after_s
                    )
                    for moment in range(arguments.moments)
                ],
            ),
            (
                "two drivers at once",
                arguments.rounds,
                [
                    lambda results, apart_s=0.3 * number: start_two(archive, model, results, apart_s)
                    for number in range(arguments.rounds)
                ],
            ),
        ]
        table, is_bad = [], False
        for title, times, disturbances in lines:
            outcomes = []
            for number, disturb in enumerate(disturbances, 1):
                outcomes.append(watch(truth, place / "results", disturb))
                print(f"{title}: {number}/{times}, (lost, doubled, other, in part) {outcomes[-1][0]}", file=sys.stderr)
            sums = [sum(values) for values in zip(*(verdict for verdict, *_ in outcomes), strict=True)]
            is_bad |= any(sums)
            num_failed, polls = (sum(outcome[place] for outcome in outcomes) for place in (1, 2))
            table.append([title, times, num_failed, times * len(truth), *sums, polls])
    print_table(
        f"A night of {len(truth)} scans, {quiet_s:.0f} s undisturbed",
        ["", "times", "failed jobs", "rows due", "lost", "doubled", "other bits", "polls in part", "polls"],
        table,
    )
    return int(is_bad)


if __name__ == "__main__":
    sys.exit(main())
