"""Mutated scans through the road: whatever the bytes, the owner of the decoding child lives and every source has a row.

`make fuzz` runs it for minutes and prints what happened; `tests/test_fuzz.py` runs a short, repeatable form and every
file kept in `tests/findings/`. A source that breaks a rule, or kills the child, is kept there.
"""

import argparse
import gzip
import hashlib
import io
import re
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import cv2
import nibabel
import numpy as np
import pydicom
import pydicom.data
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from darnet.archive import is_stray, list_sources
from darnet.config import DecodeConfig, VolumeConfig
from darnet.errors import Status
from darnet.ingest import Ingester
from darnet.phantoms.files import write_zip
from darnet.reading.road import Road
from darnet.scan import IngestedScan
from darnet.storage import open_store
from darnet.terminal import print_table
from tests.ct_fixtures import make_chest, write_chest
from tests.hostile import QUICK_CASES
from tests.hostile.case import DISPLAY, Write
from tests.hostile.dicom_cases import as_jpeg
from tests.hostile.image_cases import write_images
from tests.hostile.volume_cases import write_image
from tests.places import ROOT

FINDINGS = ROOT / "tests" / "findings"
CHEST = make_chest((12, 32, 32))
ROAD = Road(VolumeConfig(shape=(8, 16, 16)), DecodeConfig(memory_bytes=1 << 30, timeout_s=20))
MAX_SEED_BYTES = 1 << 17  # of one file of pydicom's
CONTAINED = (Status.ERR_DECODER_CRASH, Status.ERR_MEMORY, Status.ERR_TIMEOUT)  # the first of which breaks a rule
Files = dict[str, bytes]  # of a source, by their names below the archive


def _encode(syntax: str) -> Callable[[int, pydicom.FileDataset], None]:
    def change(_: int, dataset: pydicom.FileDataset) -> None:
        if pydicom.uid.UID(syntax).is_encapsulated:
            dataset.compress(syntax, generate_instance_uid=False)
            return
        dataset.file_meta.TransferSyntaxUID = syntax
        if syntax == ExplicitVRBigEndian:
            dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
            dataset["PixelData"].VR = "OW"
            dataset.set_original_encoding(False, False)

    return change


def _dicom(syntax: str) -> Write:
    return lambda place: write_chest(place, CHEST, _encode(syntax))


def _zip(place: Path) -> None:
    write_chest(place.with_name("loose"), CHEST)
    write_zip(place.with_name("loose"), Path(f"{place}.zip"))
    for path in place.with_name("loose").iterdir():
        path.unlink()


def _volume(suffix: str) -> Write:
    return lambda place: write_image(place, CHEST, suffix)


def _images(suffix: str) -> Write:
    return lambda place: write_images(place, suffix, DISPLAY[::2, ::2, ::2])


SEEDS: dict[str, Write] = {
    "plain": lambda place: write_chest(place, CHEST),
    "implicit": _dicom(ImplicitVRLittleEndian),
    "big endian": _dicom(ExplicitVRBigEndian),
    "deflated": _dicom(DeflatedExplicitVRLittleEndian),
    "RLE": _dicom(RLELossless),
    "JPEG-LS": _dicom(JPEGLSLossless),
    "JPEG 2000": _dicom(JPEG2000Lossless),
    "JPEG": as_jpeg(),
    "nii": _volume(".nii"),
    "nii.gz": _volume(".nii.gz"),
    "mha": _volume(".mha"),
    "nrrd": _volume(".nrrd"),
    "png": _images(".png"),
    "jpg": _images(".jpg"),
    "tif": _images(".tif"),
    "zip": _zip,
}


HOSTILE = {  # seeds that are refused as they are; what a bomb costs is tried by its own test
    name: case.write for name, case in QUICK_CASES.items() if "bomb" not in name and not case.status.startswith("ERR_")
}
PYDICOM = {
    path.name: path
    for path in sorted((Path(pydicom.data.__file__).parent / "test_files").glob("*.dcm"))
    if path.stat().st_size <= MAX_SEED_BYTES
}


@cache
def make_seed(name: str) -> Files:
    """The files of a sound source, of a hostile one, or one file of pydicom's."""
    if name in PYDICOM:
        return {f"a/{name}": PYDICOM[name].read_bytes()}
    with tempfile.TemporaryDirectory(prefix="darnet-seed-") as folder:
        {**SEEDS, **HOSTILE}[name](Path(folder) / "a")
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(Path(folder).rglob("*"))
            if path.is_file()
        }


@dataclass(frozen=True)
class Mutation:
    """One change of a file. `place` counts from its beginning, or where negative from its end."""

    kind: str
    place: int
    content: bytes
    count: int

    def apply(self, data: bytes) -> bytes:
        """The changed bytes."""
        start = min(self.place, len(data)) if self.place >= 0 else max(len(data) + self.place, 0)
        match self.kind:
            case "overwrite":
                return data[:start] + self.content + data[start + len(self.content) :]
            case "insert":
                return data[:start] + self.content + data[start:]
            case "delete":
                return data[:start] + data[start + self.count :]
            case "repeat":
                return data[:start] + data[start : start + self.count] * 2 + data[start + self.count :]
            case "cut":
                return data[:start]
        flipped = data[start : start + 1]
        return data[:start] + bytes(byte ^ (1 << self.count % 8) for byte in flipped) + data[start + 1 :]


TOKENS = [
    *(struct.pack("<I", value) for value in (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xE000FFFE, 0xE0DDFFFE)),
    *(struct.pack("<H", value) for value in (0, 1, 0x7FFF, 0x8000, 0xFFFF)),
    *(struct.pack("<f", value) for value in (0.0, -1.0, 1e30, float("nan"), float("inf"))),
    *(
        b"nan",
        b"inf",
        b"-1",
        b"1e9",
        b"0",
        b"99999999",
        b"\\",
        b" ",
        b"SQ",
        b"UN",
        b"OB",
        b"\n",
        b"\n\n",
        b":=",
        b"(",
        b"=",
    ),
]
MUTATIONS = st.builds(
    Mutation,
    kind=st.sampled_from(["overwrite", "overwrite", "insert", "delete", "repeat", "cut", "flip"]),
    place=st.one_of(st.integers(0, 400), st.integers(0, 1200), st.integers(0, 30_000), st.integers(-300, -1)),
    content=st.one_of(st.sampled_from(TOKENS), st.binary(min_size=1, max_size=8)),
    count=st.integers(1, 64),
)


@st.composite
def mutate_sources(draw: st.DrawFn) -> Files:
    """A source, sound as often as not, with one file changed a little, or every file in the same way."""
    names = draw(st.sampled_from([SEEDS, SEEDS, HOSTILE, PYDICOM]))
    files = dict(make_seed(draw(st.sampled_from(sorted(names)))))
    chosen = sorted(files) if draw(st.booleans()) else [draw(st.sampled_from(sorted(files)))]
    for mutation in draw(st.lists(MUTATIONS, min_size=1, max_size=3)):
        for name in chosen:
            files[name] = mutation.apply(files[name])
    return files


@dataclass
class Tally:
    """What has happened so far."""

    num_executions: int = 0  # sources, of one scan or several
    statuses: Counter[str] = field(default_factory=Counter)
    num_parent_errors: int = 0
    findings: set[str] = field(default_factory=set)


class Fuzzer:
    """One worker's ingester, to which mutated sources are given one after another."""

    def __init__(self, archive: Path) -> None:
        self.archive = archive
        self.tally = Tally()
        self._ingester = Ingester(open_store(str(archive)), ROAD)

    def close(self) -> None:
        self._ingester.close()

    def run(self, files: Files) -> list[IngestedScan]:
        """The rows of a source. Raises: AssertionError where a rule is broken; what another reader raises."""
        self.tally.num_executions += 1
        for path in self.archive.rglob("*"):
            if path.is_file():
                path.unlink()
        for name, data in files.items():
            (self.archive / name).parent.mkdir(parents=True, exist_ok=True)
            (self.archive / name).write_bytes(data)
        scans = []
        for source in list_sources(open_store(str(self.archive)).list_objects()):
            try:
                scans += self._ingester.ingest(source)
            except Exception as error:
                self.tally.num_parent_errors += 1
                raise AssertionError(f"the owner raised {type(error).__name__}") from error
        assert scans, "a source without a row"
        for scan in scans:
            self.tally.statuses[scan.status] += 1
            assert scan.status is not Status.ERR_DECODER_CRASH, scan.status_detail
            if scan.status is Status.OK:
                check_sound(scan, files)
        return scans


def check_sound(scan: IngestedScan, files: Files) -> None:
    """A scan that passes has the geometry that another reader finds in its files, and voxels in a chest's range."""
    assert scan.volume is not None
    assert scan.volume.voxels.shape == ROAD.volume.shape
    assert scan.volume.voxels.min() < scan.volume.voxels.max()
    facts = scan.facts
    found = (facts.num_slices, facts.num_rows, facts.num_columns, facts.slice_spacing_mm, facts.pixel_spacing_mm)
    expected = measure(files, scan.scan_id)
    if expected is not None:
        np.testing.assert_allclose(
            np.array(found[: len(expected)], float), np.array(expected, float), rtol=2e-2, err_msg=str(found)
        )


def measure(files: Files, scan_id: str) -> tuple[float, ...] | None:
    """Slices, rows, columns and spacings by pydicom, nibabel, OpenCV or the header's text; None of four dimensions."""
    name, data = min(files.items())
    if name.endswith((".png", ".jpg", ".tif")):
        return (len(files), *cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE).shape)
    if name.endswith((".nii", ".nii.gz")):
        image = nibabel.Nifti1Image.from_bytes(data if name.endswith(".nii") else gzip.decompress(data))
        axes = nibabel.as_closest_canonical(image)
        _, y_mm, z_mm = np.linalg.norm(axes.affine[:3, :3], axis=0)
        return (*axes.shape[2::-1], z_mm, y_mm) if axes.ndim == 3 else None
    if name.endswith(".mha"):
        sizes, steps = (re.search(rf"^{key}\s*[=:](.*)$", data.decode("latin-1"), re.M) for key in META_KEYS)
        assert sizes is not None
        assert steps is not None
        return (*map(float, sizes[1].split()[2::-1]), *map(float, steps[1].split()[2:0:-1]))
    if name.endswith(".nrrd"):
        return measure_nrrd(data.decode("latin-1"))
    if name.endswith(".zip"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = [name for name in archive.namelist() if not is_stray(name)]
            return measure_dicom({name: archive.read(name) for name in names}, scan_id)
    return measure_dicom(files, scan_id)


META_KEYS = ("DimSize", "ElementSpacing")


def measure_nrrd(text: str) -> tuple[float, ...]:
    """By the header's text; an axis is as long as its direction. Source: teem's definition of NRRD."""
    header = text.partition("\n\n")[0]
    sizes = re.search(r"^sizes:(.*)$", header, re.M)
    directions = re.search(r"^space directions:(.*)$", header, re.M)
    assert sizes is not None
    assert directions is not None
    axes = [[float(part) for part in axis.split(",")] for axis in re.findall(r"\(([^)]*)\)", directions[1])]
    steps = np.linalg.norm(axes, axis=1)
    return (*map(float, sizes[1].split()[2::-1]), *steps[2:0:-1])


def measure_dicom(files: Files, scan_id: str) -> tuple[float, ...]:
    """By pydicom, from all files of the scan's series."""
    everything = [pydicom.dcmread(pydicom.filebase.DicomBytesIO(data), force=True) for data in files.values()]
    series = scan_id.rpartition("#")[2]
    datasets = [
        dataset
        for dataset in everything
        if hashlib.sha256(str(dataset.SeriesInstanceUID).encode()).hexdigest()[:8] == series
    ]
    heights = sorted(float(dataset.ImagePositionPatient[2]) for dataset in datasets)
    first = datasets[0]
    spacing = (heights[-1] - heights[0]) / (len(heights) - 1)
    return len(datasets), first.Rows, first.Columns, spacing, float(first.PixelSpacing[0])


def keep(files: Files, what: str) -> str:
    """Pack a finding; its name says what was wrong, and does not change with the day."""
    digest = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:8]
    FINDINGS.mkdir(exist_ok=True)
    path = FINDINGS / f"{re.sub('[^a-z]+', '-', what.lower())[:40].strip('-')}-{digest}.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return path.name


def read_finding(path: Path) -> Files:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def fuzz(fuzzer: Fuzzer, number: int, count: int) -> None:
    """So many mutated sources, the same ones for the same number; a finding is kept, and told of."""
    found: dict[str, Files] = {}

    @seed(number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=(Phase.generate,),  # a finding is small as it is, and made smaller for longer than it was looked for
        suppress_health_check=list(HealthCheck),
    )
    @given(mutate_sources())
    def attempt(files: Files) -> None:
        try:
            fuzzer.run(files)
        except Exception as error:  # also of a reader that cannot read what has passed
            told = str(error).strip().splitlines()[:1]
            is_rule = isinstance(error, AssertionError) and told
            found[told[0] if is_rule else f"{type(error).__name__} of another reader"] = files
            raise

    try:
        attempt()
    except Exception:
        if not found:
            raise
        fuzzer.tally.findings.update(f"{keep(files, what)}: {what}" for what, files in found.items())


def main(arguments: list[str]) -> int:
    """Print what was tried and what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    end_s = time.monotonic() + chosen.seconds
    with tempfile.TemporaryDirectory(prefix="darnet-fuzz-") as folder:
        fuzzer = Fuzzer(Path(folder))
        number = chosen.seed
        while time.monotonic() < end_s:
            fuzz(fuzzer, number, 50)
            number += 1
        fuzzer.close()
    tally = fuzzer.tally
    print_table("how mutated scans ended", ["status", "scans"], [[*item] for item in sorted(tally.statuses.items())])
    batches = f"{number - chosen.seed} batches from seed {chosen.seed}"
    print(f"executions: {tally.num_executions} sources of {tally.statuses.total()} scans, in {batches}")
    print("contained in the child:", ", ".join(f"{tally.statuses[status]} {status}" for status in CONTAINED))
    print(f"crashes of its owner: {tally.num_parent_errors}")
    print(f"findings: {len(tally.findings)}", *sorted(tally.findings), sep="\n  ")
    return int(bool(tally.findings))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
