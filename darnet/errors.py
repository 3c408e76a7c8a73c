"""What can go wrong, as names: a scan's status and a job's exit code.

A `ScanError` turns one scan into a row of the results table; a `RunError` stops the job with its exit code.
"""

import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum, StrEnum
from pathlib import PurePath
from types import MappingProxyType
from typing import Any


class Status(StrEnum):
    """How a scan ended. `SKIP_*` and `BAD_*` are final, `ERR_*` is tried again next night. Source: ours."""

    OK = "OK"

    SKIP_MODALITY = "SKIP_MODALITY"
    SKIP_LOCALIZER = "SKIP_LOCALIZER"
    SKIP_SECONDARY = "SKIP_SECONDARY"
    SKIP_MULTIFRAME = "SKIP_MULTIFRAME"
    SKIP_ORIENTATION = "SKIP_ORIENTATION"
    SKIP_FEW_SLICES = "SKIP_FEW_SLICES"
    SKIP_NO_LUNG = "SKIP_NO_LUNG"

    BAD_UNREADABLE = "BAD_UNREADABLE"
    BAD_TRUNCATED = "BAD_TRUNCATED"
    BAD_HEADER = "BAD_HEADER"
    BAD_PIXELS = "BAD_PIXELS"
    BAD_GEOMETRY = "BAD_GEOMETRY"
    BAD_MISSING_SLICE = "BAD_MISSING_SLICE"
    BAD_DUPLICATE_SLICE = "BAD_DUPLICATE_SLICE"
    BAD_MIXED_SERIES = "BAD_MIXED_SERIES"
    BAD_TILT = "BAD_TILT"
    BAD_INTENSITY = "BAD_INTENSITY"
    BAD_LIMIT = "BAD_LIMIT"
    BAD_ZIP = "BAD_ZIP"
    BAD_GAVE_UP = "BAD_GAVE_UP"

    ERR_STORAGE = "ERR_STORAGE"
    ERR_DENIED = "ERR_DENIED"
    ERR_ARCHIVED = "ERR_ARCHIVED"
    ERR_GONE = "ERR_GONE"
    ERR_INPUT_CHANGED = "ERR_INPUT_CHANGED"
    ERR_TIMEOUT = "ERR_TIMEOUT"
    ERR_DECODER_CRASH = "ERR_DECODER_CRASH"
    ERR_MEMORY = "ERR_MEMORY"

    @property
    def is_final(self) -> bool:
        """Whether the next night leaves this scan alone."""
        return not self.value.startswith("ERR_")


# Trouble of the store, of a right, a key, a disk or a machine says nothing of the scan, however long it lasts: a person
# puts it right, and the scan must be scored then. Only what decoding a scan runs into is the scan's own, and may be
# final.
NEVER_GIVEN_UP = frozenset(
    {Status.ERR_STORAGE, Status.ERR_DENIED, Status.ERR_ARCHIVED, Status.ERR_GONE, Status.ERR_INPUT_CHANGED}
)

STATUS_MEANINGS: Mapping[Status, str] = {
    Status.OK: "scored",
    Status.SKIP_MODALITY: "not CT, or an object without pixels",
    Status.SKIP_LOCALIZER: "scout view",
    Status.SKIP_SECONDARY: "screenshot, dose page or other secondary capture",
    Status.SKIP_MULTIFRAME: "several frames in one DICOM object (enhanced or perfusion CT)",
    Status.SKIP_ORIENTATION: "coronal or sagittal reformat",
    Status.SKIP_FEW_SLICES: "fewer slices than score.decode.min_slices",
    Status.SKIP_NO_LUNG: "a head, an abdomen",
    Status.BAD_UNREADABLE: "claims to be a scan, cannot be parsed",
    Status.BAD_TRUNCATED: "shorter than it declares",
    Status.BAD_HEADER: "a needed tag is missing or absurd",
    Status.BAD_PIXELS: "colour, 16-bit display image, pixels that do not decode",
    Status.BAD_GEOMETRY: "positions or axes that describe no box of voxels",
    Status.BAD_MISSING_SLICE: "a slice is missing between others",
    Status.BAD_DUPLICATE_SLICE: "two slices lie at one place",
    Status.BAD_MIXED_SERIES: "two patients, orientations or image sizes in one series",
    Status.BAD_TILT: "gantry tilt: slices are sheared",
    Status.BAD_INTENSITY: "values that cannot be Hounsfield units",
    Status.BAD_LIMIT: "larger than the stated limits",
    Status.BAD_ZIP: "encrypted, damaged or hostile zip",
    Status.BAD_GAVE_UP: "the same ERR of decoding on the same bytes for the third night",
    Status.ERR_STORAGE: "could not be fetched, or its machine had no room or no decoder for it; tried every night",
    Status.ERR_DENIED: "we may not read it: give this job the right to; tried every night",
    Status.ERR_ARCHIVED: "in a storage class for archives: restore it; tried every night",
    Status.ERR_GONE: "deleted between plan and read",
    Status.ERR_INPUT_CHANGED: "replaced between plan and read",
    Status.ERR_TIMEOUT: "decoding took too long",
    Status.ERR_DECODER_CRASH: "the decoder's process died",
    Status.ERR_MEMORY: "decoding asked for more memory than allowed",
}


class ExitCode(IntEnum):
    """What a job tells its caller. Source: ours."""

    DONE = 0
    FAILED = 1
    WRONG_USE = 2
    HELD = 3
    STORAGE = 4
    CREDENTIALS = 5


class ScanError(Exception):
    """One scan cannot be scored: it becomes a row with this status, and the job goes on."""

    def __init__(self, status: Status, detail: str) -> None:
        super().__init__(status, detail)
        self.status = status
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.status}: {self.detail}"


@contextmanager
def name_file(name: str) -> Iterator[None]:
    """Put a file's name before what is wrong with it; stands where a loop over files is, not where they are judged."""
    try:
        yield
    except ScanError as error:
        raise ScanError(error.status, f"{name}: {error.detail}") from error


class RunError(Exception):
    """The job cannot go on; `exit_code` says why, `facts` go into the job's summary."""

    exit_code = ExitCode.FAILED
    facts: Mapping[str, Any] = MappingProxyType({})


class UsageError(RunError):
    """Wrong settings or missing input."""

    exit_code = ExitCode.WRONG_USE


class HeldError(RunError):
    """A quality gate holds a run back until a person has decided."""

    exit_code = ExitCode.HELD

    def __init__(self, message: str, facts: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.facts = facts


class StorageError(RunError):
    """The store cannot be reached, refuses, is full, or holds something damaged."""

    exit_code = ExitCode.STORAGE


class ObjectMissing(StorageError):  # noqa: N818
    """There is no object of this key."""


class FolderMissing(UsageError):  # noqa: N818
    """The local folder a store is rooted in does not exist."""


class PutUncertain(StorageError):  # noqa: N818
    """A conditional put may or may not have happened; only reading the object back can tell."""


class CredentialsError(RunError):
    """The store does not accept who we are."""

    exit_code = ExitCode.CREDENTIALS


# Defects: what they say may hold a header's words or a key, so that only their kind and place in the code are told

_FRAME = re.compile(r' +File "(.+\.pyx?)", line (\d+)')
_END = re.compile(r"([A-Za-z_][\w.]*)(:|$)")


def name_defect(error: BaseException) -> str:
    """Kind of an error that nobody expected and its place: the last in this package, or else the last.

    Of an error whose text is the traceback of another, as Ray's is, the kind and place of that.
    """
    kind = type(error).__name__
    frames = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
    if told := _parse_traceback(str(error)):
        kind, frames = told[0] or kind, told[1]
    ours = [frame for frame in frames if _is_ours(frame[0])]
    path, line = (ours or frames or [("nowhere", 0)])[-1]
    return f"{kind} at {PurePath(path).name}:{line}"


def print_defect(error: BaseException) -> None:
    """The traceback of an error, and of those that led to it, on stderr."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.insert(0, cause)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    for part in chain:
        frames = "".join(traceback.format_tb(part.__traceback__))
        told = f", of {name_defect(part)}" if _parse_traceback(str(part)) else ""
        print(f"Traceback (most recent call last):\n{frames}{type(part).__name__}{told}", file=sys.stderr)


def _parse_traceback(text: str) -> tuple[str, list[tuple[str, int]]] | None:
    """Kind, "" of one that is not told, and places of the first traceback in a text, None where there is none."""
    frames: list[tuple[str, int]] = []
    for line in text.splitlines():
        if found := _FRAME.match(line):
            frames.append((found[1], int(found[2])))
        elif frames and (end := _END.match(line)):
            return end[1], frames
    return ("", frames) if frames else None


def _is_ours(path: str) -> bool:
    """Whether a file lies in this package, wherever that is; a folder of its name may hold others' packages too."""
    _, found, rest = path.rpartition("/darnet/")
    return bool(found) and "/site-packages/" not in f"/{rest}"
