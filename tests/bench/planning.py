"""What planning a night with nothing new costs: `make bench-planning` prints seconds and growth of memory.

The archive is a bucket of made-up objects (`listing_server`), listed over HTTP by boto3; the results table is a local
folder of rows as large as real ones, in which every source is settled. Each reading is a process of its own; figures
are single readings, or medians where `--repeats` asks for several.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa

from darnet.archive import EVERYTHING
from darnet.publishing.objects import make_commit_key, to_parquet
from darnet.publishing.planning import plan_night
from darnet.publishing.rows import SCHEMA
from darnet.storage import open_store
from tests.bench.listing_server import make_source
from tests.results_fixtures import WORK, make_row

NIGHTS = 365
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_DEFAULT_REGION": "us-east-1"}
GOAL = {"seconds": 60, "growth_mb": 60}  # of a million objects; on a busy machine the seconds say little


def write_results(folder: Path, num_sources: int, objects_per_source: int, num_nights: int) -> None:
    """A table in which that many nights have settled all sources."""
    store, rng = open_store(str(folder), create=True), np.random.default_rng(0)
    for night, numbers in enumerate(np.array_split(np.arange(num_sources), num_nights), 1):
        if len(numbers):
            sources = [make_source(int(number), objects_per_source) for number in numbers]
            table = make_night([source.key for source in sources], [source.input_sha256 for source in sources], rng)
            store.write_bytes(make_commit_key(night), to_parquet(table, f"run{night}"))


def make_night(keys: list[str], input_sha256: list[str], rng: np.random.Generator) -> Any:
    """Rows of these sources, as large as real ones; nor do their numbers compress any better."""
    scan_ids = [f"{key}#{rng.integers(1 << 32):08x}" for key in keys]
    given = {"source": keys, "input_sha256": input_sha256, "scan_id": scan_ids}
    row = make_row("x", night=1) | {"commit": 1}
    return pa.table([_make_column(field, len(keys), row, given, rng) for field in SCHEMA], schema=SCHEMA)


def _make_column(field: Any, num_rows: int, row: Any, given: dict[str, list[str]], rng: np.random.Generator) -> Any:
    if field.name in given:
        return pa.array(given[field.name])
    if field.name in ("patient_key", "series_key"):
        return pa.array([rng.bytes(32).hex() for _ in range(num_rows)])
    if pa.types.is_list(field.type):
        length = {"fold_probability_ncp": 5, "cam_depth_profile": 64}.get(field.name, 8)
        values = pa.array(rng.random(num_rows * length, np.float32))
        return pa.ListArray.from_arrays(pa.array(np.arange(num_rows + 1, dtype=np.int32) * length), values)
    if field.type == pa.float64():
        return pa.array(rng.random(num_rows))
    return pa.repeat(pa.scalar(row[field.name], field.type), num_rows)


def measure_here(results: str) -> dict[str, float]:
    """Plan a night in this process: seconds, of them this process's own, and MB that its memory grew."""
    before_kb = read_memory_kb("VmRSS")
    start_s, own_start_s = time.perf_counter(), time.process_time()
    night = datetime.date(2031, 1, 1)
    plan = plan_night(open_store("s3://archive"), open_store(results), WORK, night, EVERYTHING)
    assert plan.folder is None, "the benchmark's table does not settle its archive"
    return {
        "sources": plan.survey.listed,
        "seconds": round(time.perf_counter() - start_s, 1),
        "own_seconds": round(time.process_time() - own_start_s, 1),
        "growth_mb": round((read_memory_kb("VmHWM") - before_kb) / 1e3, 1),
    }


def read_memory_kb(name: str) -> int:
    """A figure of Linux's account of this process: memory now (VmRSS), or at most so far (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def measure(num_objects: int, objects_per_source: int, num_nights: int, repeats: int = 1) -> dict[str, float]:
    """Medians of the same, each time in a fresh process, against a server in another."""
    module = [sys.executable, "-m"]
    with tempfile.TemporaryDirectory() as folder:
        write_results(Path(folder), num_objects // objects_per_source, objects_per_source, num_nights)
        serving = [*module, "tests.bench.listing_server", str(num_objects), str(objects_per_source)]
        with subprocess.Popen(serving, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            address = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.stdout.readline().strip()}"}
            command = [*module, "tests.bench.planning", "--here", folder]
            try:
                readings = [_read(command, os.environ | CREDENTIALS | address) for _ in range(repeats)]
            finally:
                server.terminate()
    asked = {"objects": num_objects, "objects_per_source": objects_per_source, "nights": num_nights}
    figures = {name: median(reading[name] for reading in readings) for name in readings[0]}
    return asked | {"repeats": len(readings)} | figures


def _read(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main(arguments: list[str]) -> int:
    """Print a JSON line for each measurement; 1 if the largest archive is past the goal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--here", help="measure this results folder, in this process")
    parser.add_argument("--objects", type=int, default=1_000_000, help="of the largest archive")
    parser.add_argument("--nights", type=int, help="measure that archive alone, one object a source, beside so many")
    parser.add_argument("--repeats", type=int, default=1, help="readings of each, of which medians are told")
    chosen = parser.parse_args(arguments)
    if chosen.here:
        print(json.dumps(measure_here(chosen.here)))
        return 0
    if chosen.nights:
        print(json.dumps(measure(chosen.objects, 1, chosen.nights, chosen.repeats)))
        return 0
    largest, small = chosen.objects, max(chosen.objects // 10, 1000)
    sizes = [max(largest // share, 1000) for share in (100, 10)]
    for plan in [*((size, 1, NIGHTS) for size in sizes), *((small, 1, nights) for nights in (10, 100))]:
        print(json.dumps(measure(*plan, chosen.repeats)), flush=True)
    is_past = False
    for objects_per_source, nights in ((100, NIGHTS), (1, NIGHTS), (1, 1)):  # the last: a first night of everything
        found = measure(largest, objects_per_source, nights, chosen.repeats)
        print(json.dumps(found), flush=True)
        is_past |= any(found[name] > limit for name, limit in GOAL.items())
    return int(is_past)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
