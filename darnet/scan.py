"""The nouns of the road: what is stored, what a scan is, and the volume the network sees.

Axes are z, y, x (D, H, W) everywhere; canonical order is z 0 = head, y front to back, x the patient's right to left.
"""

import hashlib
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from darnet.errors import Status

FloatArray: TypeAlias = NDArray[np.floating[Any]]
Uint8Array: TypeAlias = NDArray[np.uint8]
BoolArray: TypeAlias = NDArray[np.bool_]
Pixels: TypeAlias = FloatArray | Uint8Array


class Diagnosis(StrEnum):
    """The three classes, in label order 0, 1, 2. Source: authors' label order (paper Table 1 names the classes)."""

    CP = "CP"
    NCP = "NCP"
    NORMAL = "Normal"


DIAGNOSES: tuple[Diagnosis, ...] = tuple(Diagnosis)
LABELS = tuple(str(diagnosis) for diagnosis in DIAGNOSES)  # as tables spell them


class Intensity(StrEnum):
    """What a voxel's number means: Hounsfield units, or an 8-bit display value without physical unit or spacing."""

    HU = "HU"
    DISPLAY = "DISPLAY"


class Manufacturer(StrEnum):
    """Closed list of scanner makers; anything else is `Other`. Source: ours, so that no free text enters a row."""

    GE = "GE"
    SIEMENS = "Siemens"
    PHILIPS = "Philips"
    CANON = "Canon"
    UNITED_IMAGING = "United Imaging"
    OTHER = "Other"


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One object of a store. `version` is its ETag (S3) or modification time in ns (local disk)."""

    key: str
    num_bytes: int
    version: str
    modified_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Source:
    """What holds scans: a prefix of slice files, or one volume file. `key` is archive-relative; objects are sorted."""

    key: str
    objects: tuple[StoredObject, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all objects."""
        return sum(item.num_bytes for item in self.objects)

    @property
    def modified_s(self) -> float:
        """When the newest object was written, in seconds since 1970."""
        return max(item.modified_s for item in self.objects)

    @property
    def input_sha256(self) -> str:
        """Digest of the sorted (key, version, size): changes when any object is added, removed or replaced."""
        digest = hashlib.sha256()
        for item in sorted(self.objects, key=lambda item: item.key):
            digest.update(f"{item.key}\0{item.version}\0{item.num_bytes}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class StagedFile:
    """A file of a source on this machine's disk. `name` is its key relative to the source, or its name in a zip.

    `label` is what a row may call it: names are often made of a patient's name or of UIDs. Where `spans` are given, an
    excerpt of the file is at `header_path`, as long as the file, in which only these bytes are the file's; `path` is
    then nothing until the file is fetched whole.
    """

    name: str
    path: Path
    label: str
    spans: tuple[range, ...] | None = None

    @property
    def header_path(self) -> Path:
        """What is as long as the file and begins with its header."""
        return self.path if self.spans is None else self.path.with_name(f"{self.path.name}.excerpt")


@dataclass(frozen=True, slots=True)
class PixelLayout:
    """How the pixels of one DICOM slice lie in its file: 16 bits each, from byte `start` on, in this transfer syntax.

    Units: HU are `slope` times the stored value plus `intercept`. Shape: `size` is rows, columns as stored.
    """

    syntax: str
    start: int
    size: tuple[int, int]
    bits_stored: int
    is_signed: bool
    slope: float
    intercept: float


class SliceStack(Protocol):
    """A scan's slices in canonical order and orientation, read one at a time.

    Units: `spacing_mm` is (z, y, x) in mm, None for display images; slices are HU or display values by `intensity`.
    """

    @property
    def shape(self) -> tuple[int, int, int]:
        """Slices, rows and columns of the canonically oriented scan."""

    @property
    def intensity(self) -> Intensity:
        """What the values mean."""

    @property
    def spacing_mm(self) -> tuple[float, float, float] | None:
        """Distance between voxel centres along z, y, x."""

    def read_slice(self, index: int) -> Pixels:
        """Decode one slice.

        Shape:  (rows, columns) float32, or uint8 as 8-bit images are stored.
        Raises: ScanError naming the file if its pixels do not decode, or to another size than its header says.
        """


@dataclass(frozen=True, slots=True)
class CropBox:
    """Where the network input lies in the canonically ordered series: all slices, and a box of each slice's pixels."""

    num_slices: int
    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class StandardVolume:
    """The network input before scaling to [0, 1].

    Shape: `voxels` (D, H, W) uint8 of the model, canonical axes.
    Units: `spacing_mm` is the (z, y, x) spacing of this grid in mm; None for display images, never 1.
    """

    voxels: Uint8Array
    intensity: Intensity
    spacing_mm: tuple[float, float, float] | None
    crop: CropBox


@dataclass(frozen=True, slots=True)
class ScanFacts:
    """What a row or an audit says of a scan besides its score; no DICOM text, patient and series as HMAC keys."""

    num_files: int = 0
    num_bytes: int = 0
    intensity: Intensity | None = None
    num_slices: int | None = None
    num_rows: int | None = None
    num_columns: int | None = None
    slice_spacing_mm: float | None = None
    pixel_spacing_mm: float | None = None
    manufacturer: Manufacturer | None = None
    patient_key: str | None = None
    series_key: str | None = None


@dataclass(frozen=True, slots=True)
class IngestedScan:
    """One scan after fetch, decode and resampling. `volume` and `lung` are None unless `status` is OK.

    Shape: `lung` (D, H, W) bool on the grid of `volume`; None for display images.
    """

    scan_id: str
    status: Status
    status_detail: str = ""
    facts: ScanFacts = field(default_factory=ScanFacts)
    volume: StandardVolume | None = None
    lung: BoolArray | None = None
    fetch_s: float = 0.0
    decode_s: float = 0.0
