"""How long a source of small slices takes to fetch, one after another and side by side: `make bench-fetching`.

The store is a small HTTP server in this process that waits before each answer, as a store far away does; it takes its
share of this machine's cores, so that the seconds are an upper bound.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from darnet.ingest import stage_source
from darnet.scan import Source, StoredObject
from darnet.storage import TRANSFERS, S3Store
from tests.object_server import Answer, serve_objects


def measure(num_slices: int, slice_bytes: int, delay_s: float) -> dict[str, float]:
    """Seconds to fetch one source."""
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
        stage_source(store, source, Path(folder))
        return {"sequential_s": sequential_s, "concurrent_s": time.perf_counter() - start_s}


def main(arguments: list[str]) -> int:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--slice-bytes", type=int, default=524_288)
    parser.add_argument("--delay-s", type=float, default=0.03)
    chosen = parser.parse_args(arguments)
    measured = measure(chosen.slices, chosen.slice_bytes, chosen.delay_s)
    print(json.dumps({**vars(chosen), "transfers": TRANSFERS, **{k: round(v, 2) for k, v in measured.items()}}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
