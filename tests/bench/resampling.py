"""What `volume.depth_resampling = area` changes against `linear`, for every DICOM series below a folder.

Prints a table for people and one JSON line; `make bench-resampling` runs it. Figures of time and memory are medians
of readings that alternate between the two ways, every reading in a fresh process with the files in memory.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeAlias

import numpy as np

from darnet.archive import list_sources
from darnet.bundle import read_bundle
from darnet.config import DecodeConfig, ScoreConfig, VolumeConfig
from darnet.errors import ScanError, UsageError
from darnet.phantom import make_phantom
from darnet.phantoms.files import write_dicom
from darnet.reading.dicom import arrange_series, read_header
from darnet.reading.road import DicomStack
from darnet.reading.sandbox import Sandbox
from darnet.scan import DIAGNOSES, StagedFile, Uint8Array
from darnet.score import Ensemble
from darnet.storage import open_store
from darnet.terminal import print_table, show_progress
from darnet.volume import list_contributions, make_standard_volume

WAYS = ("linear", "area")
PHANTOM_SHAPE = (160, 256, 256)  # a chest at 2 mm, so that the depth shrinks
# What is measured both ways, and how to print it.
PAIRS = (("slices_decoded", "d"), ("s", ".2f"), ("processor_s", ".2f"), ("growth_mib", ".0f"))
NOTICE = "research use only"

Row: TypeAlias = dict[str, str | int | float]


@dataclass(frozen=True)
class Series:
    """A DICOM series on this disk, and the folder that holds it, as the person named it."""

    name: str
    folder: str
    files: tuple[StagedFile, ...]


@dataclass(frozen=True)
class Reading:
    """One series read once. Other programs on the machine disturb `processor_s` less than `seconds`.

    `growth_bytes`: by how much the process's peak exceeded what it held before.
    """

    voxels: Uint8Array
    seconds: float
    processor_s: float
    growth_bytes: int


def read_series(files: Sequence[StagedFile], config: VolumeConfig) -> tuple[Uint8Array, float, float, int]:
    """Headers, pixels, resampling; runs in a child process, whose owner makes a `Reading` of it.

    Shape: `voxels` (D, H, W) of `config.shape`.
    """
    before_bytes = _reset_peak()
    start_s, start_processor_s = time.perf_counter(), time.process_time()
    headers = [header for file in files if (header := read_header(file)) is not None]
    volume = make_standard_volume(DicomStack(arrange_series(headers, DecodeConfig())), config)
    seconds, processor_s = time.perf_counter() - start_s, time.process_time() - start_processor_s
    return volume.voxels, seconds, processor_s, _read_memory("VmHWM") - before_bytes


def _reset_peak() -> int:
    """Make the peak start from what the process holds now; importing needed more."""
    Path("/proc/self/clear_refs").write_text("5")
    return _read_memory("VmRSS")


def _read_memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024


def list_series(root: Path) -> Iterator[Series]:
    """Every DICOM series below a folder; files that are none, or cannot be read, are left out."""
    store = open_store(str(root))
    for source in list_sources(store.list_objects()):
        by_uid = defaultdict(list)
        for item in source.objects:
            path = store.local_path(item.key)
            assert path is not None
            file = StagedFile(path.name, path, path.name)
            try:
                header = read_header(file)
            except ScanError:
                continue
            if header is not None:
                by_uid[header.series_uid].append(file)
        for number, uid in enumerate(sorted(by_uid), start=1):
            name = source.key if len(by_uid) == 1 else f"{source.key} ({number})"
            yield Series(name, str(root if source.key == "." else root / source.key), tuple(by_uid[uid]))


def compare(series: Series, config: VolumeConfig, repeats: int, ensemble: Ensemble | None = None) -> Row:
    """One row of the table: what the choice changes for this series.

    Raises: ScanError if the series is no chest CT volume.
    """
    configs = {way: config.model_copy(update={"depth_resampling": way}) for way in WAYS}
    for file in series.files:
        file.path.read_bytes()  # into the page cache
    readings: dict[str, list[Reading]] = {way: [] for way in WAYS}
    for repeat in range(repeats):
        for way in WAYS[:: 1 - 2 * (repeat % 2)]:
            readings[way].append(_read_apart(series, configs[way]))
    linear, area = (readings[way][0].voxels for way in WAYS)
    difference = np.abs(linear.astype(np.int16) - area)
    row: Row = {"scan": series.name, "folder": series.folder, "slices": len(series.files)}
    row |= {"mean_difference": float(difference.mean()), "max_difference": int(difference.max())}
    for way in WAYS:
        row[f"{way}_slices_decoded"] = _count_decoded(len(series.files), config.shape[0], way)
        row[f"{way}_s"] = median(reading.seconds for reading in readings[way])
        row[f"{way}_processor_s"] = median(reading.processor_s for reading in readings[way])
        row[f"{way}_growth_mib"] = median(reading.growth_bytes for reading in readings[way]) / 2**20
    if ensemble is not None:
        probability = {way: ensemble.score(readings[way][0].voxels[None])[0].probability for way in WAYS}
        for index, diagnosis in enumerate(DIAGNOSES):
            row[f"change_{diagnosis.lower()}"] = float(probability["area"][index] - probability["linear"][index])
    return row


def _read_apart(series: Series, config: VolumeConfig) -> Reading:
    limits = DecodeConfig()
    sandbox = Sandbox("tests.bench.resampling:read_series", limits.memory_bytes, limits.timeout_s)
    reading = Reading(*sandbox.call(series.files, config))
    sandbox.close()
    return reading


def _count_decoded(num_slices: int, depth: int, way: str) -> int:
    return len({item.source for item in list_contributions(num_slices, depth, way)})


def measure_all(scans: Path, config: VolumeConfig, repeats: int, ensemble: Ensemble | None) -> list[Row]:
    """A row for every series; one that is no chest CT volume says so instead of figures.

    Raises: UsageError if no series is measured.
    """
    series = list(list_series(scans))
    rows = []
    with show_progress("Reading each series both ways", len(series)) as meter:
        for item in series:
            try:
                rows.append(compare(item, config, repeats, ensemble))
            except ScanError as error:
                rows.append({"scan": item.name, "folder": item.folder, "left_out": str(error)})
            meter.advance(1, {})
    if all("left_out" in row for row in rows):
        raise UsageError(f"--scans {scans}: no chest CT as DICOM below it; give a folder that holds some")
    return rows


def print_rows(rows: Sequence[Row], config: VolumeConfig) -> None:
    """The measured rows as a table, below it the command that repeats each; then what was left out, and why."""
    measured = [row for row in rows if "left_out" not in row]
    changes = [f"change_{diagnosis.lower()}" for diagnosis in DIAGNOSES if f"change_{diagnosis.lower()}" in measured[0]]
    table = []
    for row in measured:
        pairs = [f"{row[f'linear_{name}']:{form}} / {row[f'area_{name}']:{form}}" for name, form in PAIRS]
        difference = (f"{row['mean_difference']:.2f}", row["max_difference"])
        table.append([row["scan"], row["slices"], *difference, *pairs, *(f"{row[name]:+.4f}" for name in changes)])
    size = " x ".join(map(str, config.shape))
    print_table(
        f"linear / area at {size}, voxels 0..255, medians of time and memory ({NOTICE})",
        ["scan", "slices", "mean |d|", "max |d|", "decoded", "s", "CPU s", "MiB", *changes],
        table,
    )
    for row in rows:
        remark = f"left out, {row['left_out']}" if "left_out" in row else f"repeat by `{row['repeat']}`"
        print(f"{row['scan']}: {remark}", file=sys.stderr)


def measure_phantoms(config: VolumeConfig, repeats: int, ensemble: Ensemble | None) -> list[Row]:
    """The same rows for one chest of each diagnosis, made here and gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="darnet-bench-") as folder:
        for seed, diagnosis in enumerate(DIAGNOSES):
            write_dicom(make_phantom(diagnosis, seed, shape=PHANTOM_SHAPE), Path(folder) / f"phantom-{diagnosis}")
        return measure_all(Path(folder), config, repeats, ensemble)


def main(arguments: list[str]) -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.resampling", description=__doc__)
    parser.add_argument("--scans", type=Path, help="folder of DICOM series; default: three phantoms made for this run")
    parser.add_argument("--model", help="bundle whose volume settings are used, and whose probabilities are compared")
    parser.add_argument("--repeats", type=int, default=5, help="readings each way, alternating (default 5)")
    given = parser.parse_args(arguments)
    config, ensemble = VolumeConfig(), None
    if given.model:
        bundle, score = read_bundle(open_store(given.model)), ScoreConfig()
        config = bundle.manifest.settings.volume
        ensemble = Ensemble.from_bundle(bundle, score)
    if given.scans:
        rows = measure_all(given.scans, config, given.repeats, ensemble)
    else:
        rows = measure_phantoms(config, given.repeats, ensemble)
    for row in rows:
        scans = f" SCANS={shlex.quote(str(row['folder']))}" if given.scans else ""
        model = f" MODEL={shlex.quote(given.model)}" if given.model else ""
        row["repeat"] = f"make bench-resampling REPEATS={given.repeats}{scans}{model}"
    print_rows(rows, config)
    print(json.dumps({"bench": "resampling", "shape": config.shape, "repeats": given.repeats, "rows": rows}))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UsageError as error:
        sys.exit(f"resampling: {error}")
