"""How long a source takes to fetch: one object after another, side by side, whole and by headers first.

`make bench-fetching` runs it. The store is a small HTTP server in this process that waits before each answer, as a
store far away does, and sends so many bytes a second over all connections; it takes its share of this machine's cores,
so that the seconds are an upper bound. Whole and headers first are medians of readings that alternate.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np

from darnet.archive import list_sources
from darnet.config import DecodeConfig, VolumeConfig
from darnet.errors import Status
from darnet.ingest import Ingester
from darnet.phantom import make_phantom
from darnet.phantoms.files import write_dicom
from darnet.reading.road import Road
from darnet.scan import Diagnosis, Source, StoredObject
from darnet.staging import EXCERPTS, Excerpts, Staging
from darnet.storage_s3 import TRANSFERS, S3Store
from tests.object_server import Answer, Line, serve_objects

NOTHING = replace(EXCERPTS, min_bytes=sys.maxsize)  # comes as an excerpt
GRID = (60, 128, 128)  # of the phantom, which is then made as large as is asked for


@dataclass(frozen=True)
class Reading:
    """One source read once: seconds, and what the server sent."""

    fetch_s: float
    decode_s: float
    num_bytes: int


def measure_waiting(num_slices: int, slice_bytes: int, delay_s: float) -> dict[str, float]:
    """Seconds to fetch one source over a line of any width."""
    body = b"\0" * slice_bytes
    source = Source("a", tuple(StoredObject(f"a/{index:04d}", slice_bytes, "tag") for index in range(num_slices)))
    with (
        tempfile.TemporaryDirectory() as folder,
        serve_objects(lambda _: Answer(body, slice_bytes, delay_s=delay_s)) as connect,
    ):
        store = S3Store("bucket", "", connect)
        store.fetch(source.objects[0], Path(folder) / "first")  # makes the client
        start_s = time.perf_counter()
        for item in source.objects:
            store.fetch(item, Path(folder) / "one")
        sequential_s = time.perf_counter() - start_s
        start_s = time.perf_counter()
        Staging(store, source, Path(folder)).fetch(VolumeConfig(), NOTHING)
        return {"sequential_s": sequential_s, "concurrent_s": time.perf_counter() - start_s}


def write_series(num_slices: int, side: int) -> dict[str, bytes]:
    """A chest as uncompressed DICOM, by key: a small phantom whose voxels are repeated."""
    phantom = make_phantom(Diagnosis.NCP, 0, shape=GRID)
    shape = (num_slices, side, side)
    places = [np.arange(size) * old // size for size, old in zip(shape, GRID, strict=True)]
    z_mm, y_mm, x_mm = (mm * old / size for mm, old, size in zip(phantom.spacing_mm, GRID, shape, strict=True))
    larger = replace(phantom, voxels_hu=phantom.voxels_hu[np.ix_(*places)], spacing_mm=(z_mm, y_mm, x_mm))
    with tempfile.TemporaryDirectory() as folder:
        return {f"a/{path.name}": path.read_bytes() for path in write_dicom(larger, Path(folder))}


def measure_ways(
    files: dict[str, bytes], delay_s: float, bytes_per_s: float, repeats: int, ways: dict[str, Excerpts]
) -> dict[str, list[Reading]]:
    """The same series again and again, each way in turn, with the same bits."""
    tags = {key: hashlib.md5(body, usedforsecurity=False).hexdigest() for key, body in files.items()}
    (source,) = list_sources(StoredObject(key, len(files[key]), tags[key]) for key in sorted(files))
    line = Line(bytes_per_s)

    def answer(path: str) -> Answer:
        key = path.removeprefix("/bucket/")
        return Answer(files[key], len(files[key]), tags[key], delay_s, heeds=("If-Match", "Range"))

    readings: dict[str, list[Reading]] = {way: [] for way in ways}
    seen = set()
    with serve_objects(answer, line) as connect:
        road = Road(VolumeConfig(), DecodeConfig())
        ingesters = {way: Ingester(S3Store("bucket", "", connect), road, None, ways[way]) for way in ways}
        for turn in range(repeats + 1):  # the first makes clients and children
            for way, ingester in ingesters.items():
                before = line.sent.total()
                (scan,) = ingester.ingest(source)
                assert scan.status is Status.OK, scan
                assert scan.volume is not None
                seen.add(scan.volume.voxels.tobytes())
                if turn:
                    readings[way].append(Reading(scan.fetch_s, scan.decode_s, line.sent.total() - before))
        for ingester in ingesters.values():
            ingester.close()
    assert len(seen) == 1, "the ways differ"
    return readings


def main(arguments: list[str]) -> int:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--side", type=int, default=512, help="pixels; a slice has twice as many bytes as pixels")
    parser.add_argument("--delay-s", type=float, default=0.03)
    parser.add_argument("--bytes-per-s", type=float, default=40e6, help="over all connections, headers first only")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--any", action="store_true", help="headers first also where it is not worth it")
    chosen = parser.parse_args(arguments)
    waiting = measure_waiting(chosen.slices, 2 * chosen.side**2, chosen.delay_s)
    measured: dict[str, object] = {name: round(value, 2) for name, value in waiting.items()}
    first = replace(EXCERPTS, min_bytes=0, max_share=1.0) if chosen.any else EXCERPTS
    files = write_series(chosen.slices, chosen.side)
    ways = {"whole": NOTHING, "headers first": first}
    found = measure_ways(files, chosen.delay_s, chosen.bytes_per_s, chosen.repeats, ways)
    for way, readings in found.items():
        measured[way] = {
            "fetch_s": round(median(reading.fetch_s for reading in readings), 2),
            "decode_s": round(median(reading.decode_s for reading in readings), 2),
            "megabytes": round(median(reading.num_bytes for reading in readings) / 1e6, 1),
        }
    print(json.dumps({**vars(chosen), "transfers": TRANSFERS, **measured}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
