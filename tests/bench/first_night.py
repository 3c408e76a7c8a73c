"""What the driver of a first night holds: `make bench-first-night` prints how much its memory grew while it scored.

Nothing of the archive is there but its plan, so that every source ends as `ERR_GONE` as soon as a worker fetches it:
planning aside, the driver does all that it does in a night of real scans. Planning is a process before it.

With `--staged` (`make bench-first-night STAGED=1`) rows as large as real ones are staged already, without a cluster:
what grows then is reading them back, judging them against earlier nights, the page, and publishing, beside tables of
none to 365 nights. Each such figure is a median of `--repeats` readings, each of the same staged night anew.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa

from darnet.config import ScoreConfig
from darnet.errors import ScanError, Status
from darnet.manifest import read_manifest
from darnet.publishing.objects import Listing, make_commit_key, to_parquet
from darnet.publishing.rows import PROBABILITIES, SCHEMA, Reason
from darnet.publishing.runs import PlannedSource, RunFolder, RunRecord, list_run_files, write_plan
from darnet.ray_cluster import connect
from darnet.ray_score import NightRequest, describe_work, finish_run
from darnet.scan import DIAGNOSES, Source, StoredObject
from darnet.storage import open_store
from darnet.storage_local import LocalStore
from tests.bench.listing_server import NUM_BYTES, name_object
from tests.bench.planning import make_night, read_memory_kb
from tests.bundle_fixtures import write_random_bundle

CONFIG = ScoreConfig()
NIGHT = date(2030, 1, 1)
# Rows staged, nights published before.
STAGED = ((60_000, 0), (6_000, 0), (600, 0), (600, 10), (600, 100), (600, 365))
ROWS_OF_EARLIER_NIGHT = 1000


@dataclass(frozen=True)
class EmptyStore(LocalStore):
    """An archive of which every object was deleted since it was listed."""

    def local_path(self, key: str) -> None:  # type: ignore[override]  # noqa: ARG002
        return None

    def fetch(self, item: StoredObject, path: Path) -> None:  # noqa: ARG002
        raise ScanError(Status.ERR_GONE, "deleted since it was listed")


def make_sources(num_sources: int, objects_per_source: int) -> Iterator[Source]:
    """Sources as a listing of a bucket yields them."""
    for number in range(num_sources):
        first = number * objects_per_source
        named = [name_object(index, objects_per_source) for index in range(first, first + objects_per_source)]
        objects = tuple(StoredObject(key, NUM_BYTES, etag, 1.7e9 + number) for key, etag in named)
        yield Source(objects[0].key.rpartition("/")[0], objects)


def ask_for_night(folder: Path) -> NightRequest:
    """Archive, bundle and results of this folder."""
    results = open_store(str(folder / "results"), create=True)
    return NightRequest(EmptyStore(folder), open_store(str(folder / "bundle")), results, CONFIG)


def begin_night(folder: Path, num_sources: int, objects_per_source: int) -> RunFolder:
    """A bundle, and the plan of a night."""
    write_random_bundle(folder / "bundle")
    request = ask_for_night(folder)
    work = describe_work(request, read_manifest(request.model, CONFIG))
    now = datetime.now(UTC)
    planned = (PlannedSource(source, Reason.NEW) for source in make_sources(num_sources, objects_per_source))
    record = write_plan(
        planned, folder / "plan", lambda digest: RunRecord(NIGHT, work, {}, digest, Listing(0, now, now))
    )
    run = RunFolder(request.results, record.run_id)
    run.begin(record, folder / "plan")
    return run


def stage_night(folder: Path, num_rows: int, num_nights: int) -> None:
    """A night of which all is scored, after so many others."""
    run, rng = begin_night(folder, num_rows, 1), np.random.default_rng(0)
    for number in range(1, num_nights + 1):
        earlier = [f"earlier/{number}/{place}" for place in range(ROWS_OF_EARLIER_NIGHT)]
        rows = make_rows(earlier, f"run{number}", rng)
        night = pa.repeat(pa.scalar(NIGHT - timedelta(days=num_nights + 1 - number)), len(earlier))
        rows = rows.set_column(SCHEMA.get_field_index("night"), SCHEMA.field("night"), night)
        run.store.write_bytes(make_commit_key(number), to_parquet(rows, f"run{number}"))
    keys = run.list_planned_sources()
    for start in range(0, num_rows, CONFIG.part_scans):
        rows = make_rows(keys[start : start + CONFIG.part_scans], run.run_id, rng).drop_columns("commit")
        run.write_part(f"{start}", rows.to_pylist())


def make_rows(keys: Sequence[str], run_id: str, rng: np.random.Generator) -> Any:
    """Scored scans, with numbers that do not compress."""
    rows = make_night(list(keys), [rng.bytes(32).hex() for _ in keys], rng)
    probability = rng.dirichlet((0.4, 0.3, 0.6), len(keys))
    given: dict[str, Any] = dict(zip(PROBABILITIES, probability.T, strict=True))
    given |= {"run_id": [run_id] * len(keys), "prediction": [str(DIAGNOSES[label]) for label in probability.argmax(1)]}
    for name, values in given.items():
        field = SCHEMA.field(name)
        rows = rows.set_column(SCHEMA.get_field_index(name), field, pa.array(values, field.type))
    return rows


def measure_here(folder: Path, *, is_staged: bool) -> dict[str, float]:
    """Score and publish the night in this process: seconds, and MB that its memory grew since it joined the cluster."""
    request = ask_for_night(folder)
    (run_id,) = list_run_files(request.results)
    manifest = read_manifest(request.model, CONFIG)
    if not is_staged:
        connect()
    before_kb = read_memory_kb("VmRSS")
    start_s = time.perf_counter()
    summary = finish_run(request, manifest, RunFolder(request.results, run_id))
    assert set(summary["statuses"]) == {"OK" if is_staged else "ERR_GONE"}, summary["statuses"]
    return {
        "planned_sources": summary["planned_sources"],
        "seconds": round(time.perf_counter() - start_s, 1),
        "growth_mb": round((read_memory_kb("VmHWM") - before_kb) / 1e3, 1),
    }


def measure(num_sources: int, objects_per_source: int) -> dict[str, float]:
    """The same in a fresh process, of a plan that another one made."""
    asked = {"objects_per_source": objects_per_source}
    return asked | _measure(1, "--sources", str(num_sources), "--objects", str(objects_per_source))


def measure_staged(num_rows: int, num_nights: int, repeats: int) -> dict[str, float]:
    """Medians of the same, of a night that is staged already, in a table of so many nights."""
    asked = {"earlier_nights": num_nights}
    return asked | _measure(repeats, "--staged", "--sources", str(num_rows), "--earlier", str(num_nights))


def _measure(repeats: int, *flags: str) -> dict[str, float]:
    """Begin a night once, and end it so many times, each as it was begun: links to its files, which nobody changes."""
    command = [sys.executable, "-m", "tests.bench.first_night", *flags]
    readings: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="darnet-first-night-") as folder:
        begun, night = Path(folder) / "begun", Path(folder) / "night"
        night.mkdir()
        subprocess.run([*command, "--begin", str(night)], check=True)
        night.rename(begun)
        for _ in range(repeats):
            shutil.copytree(begun, night, copy_function=os.link)
            done = subprocess.run([*command, "--here", str(night)], check=True, stdout=subprocess.PIPE)
            readings.append(json.loads(done.stdout.splitlines()[-1]))
            shutil.rmtree(night)
    return {"repeats": len(readings)} | {name: median(reading[name] for reading in readings) for name in readings[0]}


def main(arguments: list[str]) -> int:
    """Print a JSON line for each measurement: the same sources, of one object each and of many; or staged nights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--begin", type=Path, help="make bundle and plan in this folder")
    parser.add_argument("--here", type=Path, help="score the plan of this folder, in this process")
    parser.add_argument("--sources", type=int, default=20_000)
    parser.add_argument("--objects", type=int, default=60, help="of each source")
    parser.add_argument("--staged", action="store_true", help="nights of which all is scored, and nothing published")
    parser.add_argument("--earlier", type=int, default=0, help="nights published before a staged one")
    parser.add_argument("--repeats", type=int, default=3, help="readings of each staged night")
    chosen = parser.parse_args(arguments)
    if chosen.begin and chosen.staged:
        stage_night(chosen.begin, chosen.sources, chosen.earlier)
    elif chosen.begin:
        begin_night(chosen.begin, chosen.sources, chosen.objects)
    elif chosen.here:
        print(json.dumps(measure_here(chosen.here, is_staged=chosen.staged)))
    elif chosen.staged:
        for rows, nights in STAGED:
            print(json.dumps(measure_staged(rows, nights, chosen.repeats)), flush=True)
    else:
        for objects_per_source in (1, chosen.objects):
            print(json.dumps(measure(chosen.sources, objects_per_source)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
