"""Everything that can go wrong with a night or a training, one thing after another: what was tried, what was lost.

`make chaos` runs all of it; `python -m tests.chaos --only weather,conflict` some, `--list` names them. `make test` ends
with two of them, `--quick`. Where a small disk may not be mounted, what fills one is told as skipped.
"""

import argparse
import contextlib
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from darnet.terminal import print_table
from tests.chaos import (
    byte_faults,
    cluster_faults,
    hostile_faults,
    machine_faults,
    process_faults,
    store_faults,
    training_faults,
)
from tests.chaos.night import ChaosError, Night, Outcome, Site, prepare_site, watch
from tests.small_disk import MountRefused

REMOTE = [
    *(store_faults.weather, store_faults.etags_alone, store_faults.flipped_headers),
    *(store_faults.outage, store_faults.endless_outage),
    *(store_faults.no_store, store_faults.lost_acknowledgement, store_faults.conflict, store_faults.forbidden),
    *(store_faults.flipped_uploads, store_faults.cut_uploads),
    *(store_faults.archived, store_faults.expired_credentials, store_faults.skewed_clock),
    machine_faults.full_scratch,
]
LOCAL = [
    *(process_faults.kill_driver, process_faults.kill_workers, process_faults.kill_child, process_faults.stop_child),
    *(process_faults.stop_driver, process_faults.stop_everything, cluster_faults.stop_node),
    *(machine_faults.full_results, machine_faults.starved_child),
    *(machine_faults.clock_ahead, machine_faults.clock_behind),
    *(machine_faults.driver_ahead, machine_faults.driver_behind),
    *(byte_faults.wrong_part, byte_faults.wrong_plan, byte_faults.wrong_bundle, byte_faults.wrong_result),
    hostile_faults.hostile_archive,
]
TRAINING = [training_faults.kill_rank, training_faults.tear_checkpoint]
NIGHTS = {fault.__name__: (fault, fault in REMOTE) for fault in (*REMOTE, *LOCAL)}
TRAININGS = {fault.__name__: fault for fault in TRAINING}
COUNTS = ("due", "lost", "doubled", "other", "partial", "polls", "left_running")


def main(arguments: list[str]) -> int:
    """1 if anything was lost, or was not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="names of faults, with commas between them")
    parser.add_argument("--quick", action="store_true", help="hold nights against one process, not a quiet night")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no fault after so many")
    parser.add_argument("--list", action="store_true", help="name the faults and end")
    chosen = parser.parse_args(arguments)
    names = chosen.only.split(",") if chosen.only else [*NIGHTS, *TRAININGS]
    if chosen.list or set(names) - {*NIGHTS, *TRAININGS}:
        print("\n".join(f"{fault.__name__}: {fault.__doc__}" for fault in (*REMOTE, *LOCAL, *TRAINING)))
        return 0 if chosen.list else 2
    with tempfile.TemporaryDirectory(prefix="darnet-chaos-") as folder:
        lines = run_faults(Path(folder), names, time.monotonic() + 60 * chosen.minutes, is_quick=chosen.quick)
    header = ["fault", "as it must be", "exit", "rows due", "lost", "doubled", "other bits", "polls in part", "polls"]
    header += ["left running", "s"]
    told = [[value for name, value in line.items() if name != "remark"] for line in lines]
    print_table("What was tried, and what was lost", header, told)
    print(json.dumps(sum_up(names, lines)))
    return int(any(line["verdict"] == "NO" for line in lines))


def sum_up(names: list[str], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The last line: how many faults were tried, those that failed, and those of `names` that were not tried."""
    tried = {line["fault"]: line["verdict"] for line in lines if line["verdict"] != "skipped"}
    failed = [name for name, verdict in tried.items() if verdict == "NO"]
    return {"faults": len(tried), "failed": failed, "skipped": [name for name in names if name not in tried]}


def run_faults(folder: Path, names: list[str], until_s: float, *, is_quick: bool) -> list[dict[str, Any]]:
    """A line of the table a fault, each also printed as it ends."""
    lines = []
    with contextlib.ExitStack() as stack:
        site: Site | None = None
        for name in names:
            if time.monotonic() > until_s:
                break
            if name in TRAININGS:
                lines.append(run_one(name, functools.partial(TRAININGS[name], folder / name)))
                continue
            site = site or stack.enter_context(prepare_site(folder, is_quick=is_quick))
            fault, is_remote = NIGHTS[name]
            lines.append(run_one(name, functools.partial(watch, Night(site, name, is_remote), fault)))
    return lines


def run_one(name: str, disturb: Callable[[], tuple[Outcome, str]]) -> dict[str, Any]:
    """Run a fault and say how it ended."""
    started_s = time.monotonic()
    outcome: Outcome | None = None
    try:
        outcome, remark = disturb()
        verdict = "yes" if outcome.is_sound else "NO"
    except MountRefused as error:
        verdict, remark = "skipped", str(error)
    except Exception as error:  # what nobody thought of is a line too, and the next fault is tried
        verdict, remark = "NO", str(error) if isinstance(error, ChaosError) else repr(error)
    counts = {count: "" if (value := getattr(outcome, count, None)) is None else value for count in COUNTS}
    exits = "" if outcome is None else ", ".join(map(str, outcome.exits))
    line = {"fault": name, "verdict": verdict, "exit": exits, **counts, "seconds": round(time.monotonic() - started_s)}
    line["remark"] = remark
    print(json.dumps(line), flush=True)
    return line


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
