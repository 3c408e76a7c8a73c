"""A night of small scans among which some kill, stall or starve their reader, and the same night without these.

`make bench-poison` runs `jobs.score` on both and prints how each kind ended, and whether the sound scans' rows are the
same to the last bit. What spoils them are real files (`tests/poison_fixtures.py`); nothing is patched or injected.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from darnet.results import read_rows
from darnet.storage import open_store
from darnet.terminal import print_table
from tests.bundle_fixtures import write_random_bundle
from tests.places import ROOT
from tests.poison_fixtures import POISONS, link_copy, write_sound

MEMORY_BYTES = 1 << 30
Rows = dict[str, dict[str, Any]]  # by scan_id
MEASURED = {"run_id", "scored_at", "fetch_s", "decode_s", "model_s"}  # differ between any two runs


def write_archives(folder: Path, num_scans: int, num_poisonous: int) -> None:
    """`clean` with the sound scans alone, and `poisoned` with the same files and, between them, the others."""
    clean, poisoned = folder / "clean", folder / "poisoned"
    clean.mkdir()
    for index in range(num_scans - num_poisonous):
        write_sound(clean, index)
    shutil.copytree(clean, poisoned)
    for kind, write in POISONS.items():
        write(folder / "templates" / kind)
    kinds = list(POISONS)
    for index in range(num_poisonous):
        place = index * (num_scans - num_poisonous) // num_poisonous
        kind = kinds[index % len(kinds)]
        link_copy(folder / "templates" / kind, poisoned / f"sound{place:05d}-{kind}")


def score(archive: Path, model: Path, results: Path, timeout_s: float) -> dict[str, Any]:
    """A night by `python -m jobs.score`, and the seconds it took."""
    command = [sys.executable, "-m", "jobs.score", "--archive", str(archive), "--model", str(model)]
    command += ["--results", str(results), "--score.decode.timeout-s", str(timeout_s), "--night", "2030-01-01"]
    command += ["--score.decode.memory-bytes", str(MEMORY_BYTES)]
    start_s = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"jobs.score ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return summary | {"wall_s": round(time.monotonic() - start_s, 1)}


def run_nights(folder: Path, num_scans: int, num_poisonous: int, timeout_s: float) -> tuple[Rows, Rows]:
    """The rows of both nights."""
    write_archives(folder, num_scans, num_poisonous)
    write_random_bundle(folder / "bundle")
    nights = []
    for name in ("clean", "poisoned"):
        summary = score(folder / name, folder / "bundle", folder / f"results-{name}", timeout_s)
        print(f"{name}: {summary['scans']} scans in {summary['wall_s']} s, {summary['statuses']}", flush=True)
        rows = read_rows(open_store(str(folder / f"results-{name}"))).to_pylist()
        nights.append({row["scan_id"]: row for row in rows})
    return nights[0], nights[1]


def name_kind(row: Mapping[str, Any]) -> str:
    """What a scan of the poisoned night is, by the name of its source."""
    return next((kind for kind in POISONS if row["source"].endswith(f"-{kind}")), "sound")


def find_differences(clean: Rows, poisoned: Rows) -> list[str]:
    """Columns in which the sound scans' rows are not the same in both nights, to the last bit."""
    sound = {scan_id: row for scan_id, row in poisoned.items() if name_kind(row) == "sound"}
    if sound.keys() != clean.keys():
        return ["scan_id"]
    columns = {
        name
        for scan_id, row in clean.items()
        for name, value in row.items()
        if repr(value) != repr(sound[scan_id][name])  # tells any two floats apart
    }
    return sorted(columns - MEASURED)


def main(arguments: list[str]) -> int:
    """Print a table of how each kind ended, and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scans", type=int, default=2000, help="of both kinds together")
    parser.add_argument("--poisonous", type=int, default=100)
    parser.add_argument("--timeout-s", type=float, default=20.0)
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="darnet-poison-") as folder:
        clean, poisoned = run_nights(Path(folder), chosen.scans, chosen.poisonous, chosen.timeout_s)
    ended = defaultdict(list)
    for row in poisoned.values():
        ended[name_kind(row), row["status"]].append(row["decode_s"])
    listed = [[*key, len(seconds), f"{max(seconds):.1f}"] for key, seconds in sorted(ended.items())]
    print_table("how the scans ended", ["kind", "status", "scans", "longest in the child, s"], listed)
    differing = find_differences(clean, poisoned)
    print(f"sound scans identical: {'no: ' + ', '.join(differing) if differing else 'yes'}")
    statuses = Counter(row["status"] for row in poisoned.values())
    print(json.dumps({"scans": len(poisoned), "statuses": statuses, "identical": not differing}))
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
