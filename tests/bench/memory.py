"""Whether a worker grows: thousands of small real files through its fetching, its decoding child and its networks.

`make bench-memory` calls what Ray calls in a worker (`decode_places`, `ScoringActor`), in one process without Ray, and
prints every thousand scans how much memory that process and its child hold, and how many open files. As in a night of a
million, a worker reads a hundred sources at a time from a plan, and fetches one while it decodes another: objects are
copied as from a bucket. Some are spoiled, none so that it ends the child, which would hide the child's growth.
"""

import argparse
import ctypes
import gc
import json
import os
import pickle
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from darnet.archive import list_sources
from darnet.bundle import read_bundle
from darnet.config import ScoreConfig
from darnet.manifest import RunFacts
from darnet.ray_actor import ScoringActor
from darnet.ray_cluster import MAX_TASKS, decode_places
from darnet.reading.road import Road
from darnet.scan import StoredObject
from darnet.storage import open_store
from darnet.storage_local import LocalStore
from darnet.terminal import print_table
from tests.block_fixtures import make_block
from tests.bundle_fixtures import write_random_bundle
from tests.ct_fixtures import make_chest, write_chest
from tests.poison_fixtures import link_copy, write_sound
from tests.results_fixtures import begin_run

NUM_PLACES = 1_000_000 // MAX_TASKS  # of the plan, for one task
COLUMNS = {"worker": 2, "child": 3, "worker_in_use": 4}  # of a line of `measure`


@dataclass(frozen=True)
class Remote(LocalStore):
    """A folder that behaves like a bucket: nothing lies on this machine until it is fetched."""

    def local_path(self, key: str) -> None:  # type: ignore[override]  # noqa: ARG002
        return None

    def fetch(self, item: StoredObject, path: Path) -> None:
        LocalStore(self.root).fetch(item, path)


def write_templates(folder: Path) -> None:
    """A few sources of each format, and four that are spoiled."""
    for index in range(8):
        write_sound(folder, index)
    images = folder / "images"
    images.mkdir()
    for index, pixels in enumerate((make_chest() + 1000).clip(0, 255).astype(np.uint8)):
        cv2.imwrite(str(images / f"{index:03d}.png"), pixels)
    shutil.make_archive(str(folder / "zipped"), "zip", folder / "sound00004")
    write_chest(folder / "spoiled-gap")[7].unlink()
    write_chest(folder / "spoiled-modality", Modality="MR")
    for name in ("sound00001.nii.gz", "sound00002.mha"):
        data = (folder / name).read_bytes()
        (folder / f"spoiled-{name}").write_bytes(data[: len(data) * 3 // 4])


def write_archive(templates: Path, archive: Path, num_scans: int) -> None:
    """As many sources, each a copy of a template by hard links."""
    paths = sorted(templates.iterdir())
    for index in range(num_scans):
        template = paths[index % len(paths)]
        target = archive / f"{index // 1000:03d}" / f"{index:06d}-{template.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        if template.is_dir():
            link_copy(template, target)
        else:
            target.hardlink_to(template)


def score_all(folder: Path, batch_size: int) -> Iterator[dict[str, Any]]:
    """The rows of every source of `folder/archive`, as a worker makes them."""
    store, model = Remote(folder / "archive"), open_store(str(folder / "bundle"))
    config, manifest = ScoreConfig(batch_size=batch_size), read_bundle(model).manifest
    road = Road(manifest.settings.volume, config.decode)
    actor = ScoringActor(model, RunFacts("memory", date(2030, 1, 1), manifest, "0"), config, "cpu")
    sources = list(list_sources(store.list_objects()))
    read, places = begin_run(open_store(str(folder / "results")), *sources).read_sources, range(len(sources))
    tasks = [list(places[start : start + NUM_PLACES]) for start in places[::NUM_PLACES]]
    del sources  # a worker has those of its places alone
    decoded = (row for task in tasks for row in decode_places({"places": task}, read, store, road))
    while rows := list(islice(decoded, batch_size)):
        for _, _, row in map(pickle.loads, actor(make_block(rows))["row"]):
            yield row


def measure(rows: Iterator[dict[str, Any]], step: int) -> Iterator[list[Any]]:
    """After every `step` scans: scans, statuses so far, MiB of this process and its child, MiB in use of the first.

    What malloc has handed out of its main heap tells a leak from a heap with holes, which grows by steps; so does the
    number of Python's objects.
    """
    statuses: Counter[str] = Counter()
    while found := list(islice(rows, step)):
        statuses.update(row["status"] for row in found)
        (child,) = _find_children(os.getpid())
        sizes = [round(_read_resident_bytes(process) / 2**20, 1) for process in (os.getpid(), child)]
        gc.collect()
        in_use = round(_count_malloc_bytes() / 2**20, 1)
        num_files = sum(1 for _ in Path("/proc/self/fd").iterdir())
        yield [statuses.total(), dict(statuses), *sizes, in_use, len(gc.get_objects()), num_files]


class _MallocInfo(ctypes.Structure):
    """What glibc's mallinfo2 returns."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def _count_malloc_bytes() -> int:
    """Bytes of malloc's main heap that this process holds; threads have heaps of their own."""
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = _MallocInfo
    found = library.mallinfo2()
    return int(found.uordblks + found.hblkhd)


def _read_resident_bytes(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _find_children(process: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == process:
            found.append(int(path.parent.name))
    return found


def main(arguments: list[str]) -> int:
    """Print a line every thousand scans, and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scans", type=int, default=10_000)
    parser.add_argument("--step", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=4)
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="darnet-memory-") as name:
        folder = Path(name)
        (folder / "templates").mkdir()
        write_templates(folder / "templates")
        write_archive(folder / "templates", folder / "archive", chosen.scans)
        write_random_bundle(folder / "bundle")
        lines = []
        for line in measure(score_all(folder, chosen.batch_size), chosen.step):
            print(*line, flush=True)
            lines.append(line)
    header = ["scans", "worker, MiB", "child, MiB", "worker in use, MiB", "objects", "open files"]
    print_table("memory of one worker", header, [[str(value) for value in (line[0], *line[2:])] for line in lines])
    grown = {place: round(lines[-1][column] - lines[0][column], 1) for place, column in COLUMNS.items()}
    print(json.dumps({"scans": lines[-1][0], "statuses": lines[-1][1], "grown_mib": grown}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
