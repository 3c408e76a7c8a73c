"""Zips that are damaged, hostile, or hold something else than one scan."""

import io
import shutil
import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from darnet.errors import Status
from tests.ct_fixtures import write_chest
from tests.hostile.case import DISPLAY, Case, Write, cut, deflate_bomb, garble, patch
from tests.hostile.image_cases import write_images

BOMB_BYTES = 3 << 29


def zipped(*entries: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> Write:
    """A zip of these entries."""

    def write(place: Path) -> None:
        with zipfile.ZipFile(f"{place}.zip", "w", method) as file:
            for name, content in entries:
                file.writestr(name, content)

    return write


def named(content: bytes) -> Write:
    """A file that is called a zip."""
    return lambda place: Path(f"{place}.zip").write_bytes(content)


def flag(write: Write, offset: int, kind: str, value: int) -> Write:
    """Another value in the head of the first entry and in the directory. Source: APPNOTE 4.3.7 and 4.3.12.

    `offset` is that behind the version in both.
    """

    def change(place: Path) -> None:
        write(place)
        path = Path(f"{place}.zip")
        directory = path.read_bytes().index(b"PK\1\2")
        patch(path, 6 + offset, struct.pack(kind, value))
        patch(path, directory + 8 + offset, struct.pack(kind, value))

    return change


def encrypted(entry: tuple[str, bytes]) -> Write:
    return flag(zipped(entry), 0, "<H", 1)


def of_slices(change: Callable[[Path], object]) -> Write:
    """A zip of a sound series, spoiled."""

    def write(place: Path) -> None:
        folder = place.with_name(f"{place.name}-loose")
        paths = write_chest(folder)
        with zipfile.ZipFile(f"{place}.zip", "w") as file:
            for path in sorted(paths):
                file.write(path, f"inside/{path.name}")
        shutil.rmtree(folder)
        change(Path(f"{place}.zip"))

    return write


def garbled(place: Path) -> None:
    content = np.random.default_rng(0).integers(0, 9, 20_000).astype(np.uint8).tobytes()
    zipped(("x.dcm", content), method=zipfile.ZIP_DEFLATED)(place)
    garble(Path(f"{place}.zip"))


def of_two_folders(place: Path) -> None:
    loose = place.with_name(f"{place.name}-loose")
    for name in ("p1", "p2"):
        write_images(loose / name, ".png", DISPLAY)
    with zipfile.ZipFile(f"{place}.zip", "w") as file:
        for path in sorted(loose.rglob("*.png")):
            file.write(path, str(path.relative_to(loose)))
    shutil.rmtree(loose)


def bomb(says: int) -> Write:
    """A zip of two megabytes that holds BOMB_BYTES. Source: APPNOTE 4.3.7, 4.3.12 and 4.3.16."""

    def write(place: Path) -> None:
        body = deflate_bomb(b"", BOMB_BYTES)
        facts = struct.pack("<5H3I2H", 20, 0, 8, 0, 33, 0, len(body), says, 5, 0)
        local = b"PK\3\4" + facts + b"x.dcm" + body
        entry = b"PK\1\2" + struct.pack("<H", 20) + facts + struct.pack("<3H2I", 0, 0, 0, 0, 0) + b"x.dcm"
        end = b"PK\5\6" + struct.pack("<4H2IH", 0, 0, 1, 1, len(entry), len(local), 0)
        Path(f"{place}.zip").write_bytes(local + entry + end)

    return write


def overlapping(place: Path) -> None:
    """Many entries that are one and the same compressed body. Source: Fifield, A better zip bomb (2019)."""
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x.dcm", bytes(1 << 20))
    data = body.getvalue()
    directory = data.index(b"PK\1\2")
    entry, end = data[directory : directory + 46 + 5], bytearray(data[directory + 46 + 5 :])
    entries = b"".join(entry[:46] + b"%05d" % index for index in range(50))
    struct.pack_into("<HHI", end, 8, 50, 50, len(entries))
    Path(f"{place}.zip").write_bytes(data[:directory] + entries + bytes(end))


def add(path: Path, name: str, content: bytes) -> None:
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(name, content)


def twice(place: Path) -> None:
    zipped(("1.dcm", b"x" * 100), ("2.dcm", b"x" * 100))(place)
    path = Path(f"{place}.zip")
    path.write_bytes(path.read_bytes().replace(b"2.dcm", b"1.dcm"))


def of_link(place: Path) -> None:
    """A symbolic link to a file of the machine, as Unix stores it."""
    entry = zipfile.ZipInfo("1.dcm")
    entry.create_system, entry.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(f"{place}.zip", "w") as file:
        file.writestr(entry, "/etc/passwd")


def lzma_bomb(place: Path) -> None:
    """An entry whose decoder is told to keep a window of 4 GiB. Source: APPNOTE 5.8."""
    zipped(("1.dcm", b"x" * 1000), method=zipfile.ZIP_LZMA)(place)
    patch(Path(f"{place}.zip"), 30 + 5 + 5, b"\xff\xff\xff\xff")


def make_many(count: int) -> Sequence[tuple[str, bytes]]:
    return [(f"{number}.dcm", b"") for number in range(count)]


PLAIN = ("x.dcm", b"x" * 100)
TAIL = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0, 0, 0, 0, 0)  # of a zip without entries
ZIP_CASES = {
    "zip empty": Case(named(b""), Status.BAD_ZIP, "does not unpack"),
    "zip of no entry": Case(named(TAIL), Status.BAD_UNREADABLE, "no file is a slice"),
    "no zip at all": Case(named(b"PK\3\4junk"), Status.BAD_ZIP, "does not unpack"),
    "zip of HTML": Case(named(b"<html>503</html>" * 20), Status.BAD_ZIP, "does not unpack"),
    "zip cut": Case(of_slices(lambda path: cut(path, 0.7)), Status.BAD_ZIP, "does not unpack"),
    "zip garbled": Case(garbled, Status.BAD_ZIP, "entry 1 of 1: does not unpack"),
    "zip of other bytes than their checksum": Case(
        of_slices(lambda path: patch(path, 6000, b"\x55")), Status.BAD_ZIP, "entry 1 of 24: does not unpack"
    ),
    "zip with path traversal": Case(zipped(("../x.dcm", b"x" * 100)), Status.BAD_ZIP, "entry 1 of 1: the zip places"),
    "zip with a path from the root": Case(
        zipped(("/etc/cron.d/x.dcm", b"x" * 100)), Status.BAD_ZIP, "entry 1 of 1: the zip places"
    ),
    "zip with Windows' path traversal": Case(zipped(("..\\..\\x.dcm", b"x" * 100)), Status.BAD_ZIP, "outside itself"),
    "zip with a drive": Case(zipped(("C:\\x.dcm", b"x" * 100)), Status.BAD_ZIP, "entry 1 of 1: the zip places"),
    "zip with path traversal of a file that is no slice": Case(
        of_slices(lambda path: add(path, "../../.profile", b"harmless")), Status.BAD_ZIP, "outside itself"
    ),
    "encrypted zip": Case(encrypted(PLAIN), Status.BAD_ZIP, "entry 1 of 1: encrypted"),
    "zip of an unknown method": Case(flag(zipped(PLAIN), 2, "<H", 97), Status.BAD_ZIP, "entry 1 of 1: does not unpack"),
    "zip bomb": Case(bomb(BOMB_BYTES), Status.BAD_LIMIT, "too large"),
    "zip bomb that lies": Case(bomb(100), Status.BAD_ZIP, "entry 1 of 1: does not unpack"),
    "zip of overlapping entries": Case(overlapping, Status.BAD_ZIP, "does not unpack"),
    "zip of a huge window": Case(lzma_bomb, Status.ERR_MEMORY, "decoding needs"),
    "zip of one name twice": Case(twice, Status.BAD_ZIP, "entry 2 of 2: twice"),
    "zip of a link": Case(of_link, Status.BAD_UNREADABLE, "entry 1 of 1: should be DICOM"),
    "zip of 10,000 files": Case(zipped(*make_many(10_000)), Status.BAD_LIMIT, "zip of 10000 files"),
    "zip of a zip": Case(zipped(("1.zip", TAIL)), Status.BAD_UNREADABLE, "no file is a slice"),
    "zip of two image folders": Case(of_two_folders, Status.BAD_MIXED_SERIES, "several folders"),
}
