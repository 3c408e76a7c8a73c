"""What the driver of a first night holds: `make bench-first-night` prints how much its memory grew while it scored.

Nothing of the archive is there but its plan, so that every source ends as `ERR_GONE` as soon as a worker fetches it:
planning aside, the driver does all that it does in a night of real scans. Planning is a process before it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path

from darnet.bundle import read_bundle
from darnet.config import ScoreConfig
from darnet.errors import ScanError, Status
from darnet.publishing.objects import Listing
from darnet.publishing.rows import Reason
from darnet.publishing.runs import PlannedSource, RunFolder, RunRecord, list_run_files, write_plan
from darnet.ray_cluster import connect
from darnet.ray_score import describe_work, finish_run
from darnet.scan import Source, StoredObject
from darnet.storage import open_store
from darnet.storage_local import LocalStore
from tests.bench.listing_server import NUM_BYTES, name_object
from tests.bench.planning import read_memory_kb
from tests.bundle_fixtures import write_random_bundle

CONFIG = ScoreConfig()


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


def begin_night(folder: Path, num_sources: int, objects_per_source: int) -> None:
    """A bundle, and the plan of a first night."""
    write_random_bundle(folder / "bundle")
    work = describe_work(EmptyStore(folder), read_bundle(open_store(str(folder / "bundle"))), CONFIG)
    now = datetime.now(UTC)
    planned = (PlannedSource(source, Reason.NEW) for source in make_sources(num_sources, objects_per_source))
    record = write_plan(
        planned, folder / "plan", lambda digest: RunRecord(date(2030, 1, 1), work, {}, digest, Listing(0, now, now))
    )
    RunFolder(open_store(str(folder / "results"), create=True), record.run_id).begin(record, folder / "plan")


def measure_here(folder: Path) -> dict[str, float]:
    """Score and publish the night in this process: seconds, and MB that its memory grew since it joined the cluster."""
    results, model = open_store(str(folder / "results")), open_store(str(folder / "bundle"))
    (run_id,) = list_run_files(results)
    bundle = read_bundle(model)
    connect()
    before_kb = read_memory_kb("VmRSS")
    start_s = time.perf_counter()
    summary = finish_run(EmptyStore(folder), model, bundle, CONFIG, None, RunFolder(results, run_id))
    assert set(summary["statuses"]) == {"ERR_GONE"}, summary["statuses"]
    return {
        "planned_sources": summary["planned_sources"],
        "seconds": round(time.perf_counter() - start_s, 1),
        "growth_mb": round((read_memory_kb("VmHWM") - before_kb) / 1e3, 1),
    }


def measure(num_sources: int, objects_per_source: int) -> dict[str, float]:
    """The same in a fresh process, of a plan that another one made."""
    command = [sys.executable, "-m", "tests.bench.first_night", "--sources", str(num_sources)]
    command += ["--objects", str(objects_per_source)]
    with tempfile.TemporaryDirectory(prefix="darnet-first-night-") as folder:
        subprocess.run([*command, "--begin", folder], check=True)
        done = subprocess.run([*command, "--here", folder], check=True, stdout=subprocess.PIPE)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {"objects_per_source": objects_per_source} | found


def main(arguments: list[str]) -> int:
    """Print a JSON line for each measurement: the same sources, of one object each and of many."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--begin", type=Path, help="make bundle and plan in this folder")
    parser.add_argument("--here", type=Path, help="score the plan of this folder, in this process")
    parser.add_argument("--sources", type=int, default=20_000)
    parser.add_argument("--objects", type=int, default=60, help="of each source")
    chosen = parser.parse_args(arguments)
    if chosen.begin:
        begin_night(chosen.begin, chosen.sources, chosen.objects)
    elif chosen.here:
        print(json.dumps(measure_here(chosen.here)))
    else:
        for objects_per_source in (1, chosen.objects):
            print(json.dumps(measure(chosen.sources, objects_per_source)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
