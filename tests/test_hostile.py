"""No hostile scan passes, each ends in its own status, and none changes a bit of the scans around it."""

import hashlib
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, quote, unquote, urlsplit

import boto3.session
import numpy as np
import pydicom.data
import pytest
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from darnet.archive import list_sources
from darnet.config import DecodeConfig, VolumeConfig
from darnet.errors import Status
from darnet.ingest import Ingester, make_sandbox
from darnet.reading.road import Road
from darnet.reading.sandbox import Sandbox
from darnet.scan import IngestedScan
from darnet.storage import open_store
from darnet.storage_s3 import S3Store
from darnet.volume import list_contributions
from tests.bench.listing_server import PAGE
from tests.ct_fixtures import SERIES_UID, write_chest
from tests.hostile import CASES, QUICK_CASES, SLOW_CASES
from tests.hostile.dicom_cases import compressed, replace_fragment
from tests.marks import mark_slow
from tests.places import SHARED
from tests.poison_fixtures import write_sound

SOME_CASES = sorted(QUICK_CASES)[::2]  # the others are tried by the slow tests
ROAD = Road(VolumeConfig(shape=(16, 32, 32)), DecodeConfig(memory_bytes=1 << 30, timeout_s=60))
ODD_DATA = SHARED / "data" / "ct" / "odd"
PYDICOM_DATA = Path(pydicom.data.__file__).parent


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """One child for all scans, as in a worker; a scan that ends it is followed by another."""
    sandbox = make_sandbox(ROAD.decode)
    yield sandbox
    sandbox.close()


def ingest(archive: Path, sandbox: Sandbox, road: Road = ROAD) -> list[IngestedScan]:
    store = open_store(str(archive))
    ingester = Ingester(store, road, sandbox)
    return [scan for source in list_sources(store.list_objects()) for scan in ingester.ingest(source)]


def check(name: str, scans: list[IngestedScan]) -> None:
    """One row with the case's status and reason, and nothing of the header's text."""
    case = CASES[name]
    (scan,) = scans
    assert (scan.status, scan.volume) == (case.status, None), scan.status_detail
    assert scan.status_detail
    assert case.reason in scan.status_detail
    if ": " in case.reason:
        file = case.reason.split(": ")[0] + ": "
        assert scan.status_detail.startswith(file)
        assert scan.status_detail.count(file) == 1
    assert SERIES_UID not in scan.status_detail
    assert "patient-1" not in scan.status_detail


@pytest.mark.parametrize("name", SOME_CASES)
def test_a_hostile_scan_ends_in_its_status(name: str, sandbox: Sandbox, tmp_path: Path) -> None:
    CASES[name].write(tmp_path / "a")
    check(name, ingest(tmp_path, sandbox))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SLOW_CASES, *(name for name in QUICK_CASES if name not in SOME_CASES)])
def test_so_do_large_ones_and_the_rest(name: str, sandbox: Sandbox, tmp_path: Path) -> None:
    test_a_hostile_scan_ends_in_its_status(name, sandbox, tmp_path)


@pytest.mark.parametrize(("resampling", "status"), [("linear", Status.OK), ("area", Status.BAD_PIXELS)])
@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless, RLELossless], ids=["JPEG 2000", "JPEG-LS", "RLE"])
def test_garbage_in_a_skipped_slice_is_seen_by_area_alone(
    syntax: str, resampling: Literal["linear", "area"], status: Status, sandbox: Sandbox, tmp_path: Path
) -> None:
    """Of 24 slices `linear` reads every third for eight of its own, from the second on; the 13th is none of them."""
    volume = VolumeConfig(shape=(8, 32, 32), depth_resampling=resampling)
    read = {item.source for item in list_contributions(24, 8, resampling) if item.weight}
    assert (12 in read) == (resampling == "area")
    compressed(syntax, replace_fragment(np.random.default_rng(2).bytes(3000), number=12))(tmp_path / "spoiled")
    compressed(syntax)(tmp_path / "sound")
    sound, spoiled = ingest(tmp_path, sandbox, replace(ROAD, volume=volume))
    assert (sound.status, spoiled.status) == (Status.OK, status)
    if status is Status.OK:
        np.testing.assert_array_equal(spoiled.volume.voxels, sound.volume.voxels)  # type: ignore[union-attr]
    else:
        assert spoiled.status_detail.endswith("slice does not decode")


def test_there_are_more_hostile_scans_than_asked_for_and_no_status_of_reading_is_missing() -> None:
    assert len(CASES) >= 70
    of_reading = {status for status in Status if status.startswith(("SKIP_", "BAD_"))} - {Status.BAD_GAVE_UP}
    assert of_reading - {case.status for case in CASES.values()} == set()


@pytest.mark.parametrize(
    ("num_sound", "cases"),
    [(24, SOME_CASES[::3]), pytest.param(200, QUICK_CASES, marks=pytest.mark.slow)],
    ids=["some of them", "all of them"],
)
def test_hostile_scans_change_no_bit_of_sound_ones(
    num_sound: int, cases: Collection[str], sandbox: Sandbox, tmp_path: Path
) -> None:
    for index in range(num_sound):
        write_sound(tmp_path, index)
    alone = {scan.scan_id: scan for scan in ingest(tmp_path, sandbox)}
    places = {}
    for index, name in enumerate(cases):  # a listing has them between the sound ones
        place = f"sound{index * num_sound // len(cases):05d}-{index}"
        CASES[name].write(tmp_path / place)
        places[place] = name
    ended: dict[str, list[IngestedScan]] = {place: [] for place in places}
    sound = {}
    for scan in ingest(tmp_path, sandbox):
        place = scan.scan_id.split("#")[0].split(".")[0]
        if place in ended:
            ended[place].append(scan)
        else:
            sound[scan.scan_id] = scan
    for place, scans in ended.items():
        check(places[place], scans)
    assert sound.keys() == alone.keys()
    assert len({scan.volume.voxels.tobytes() for scan in alone.values() if scan.volume is not None}) == num_sound
    for scan_id, scan in sound.items():
        assert scan.volume is not None
        before = alone[scan_id]
        np.testing.assert_array_equal(scan.volume.voxels, before.volume.voxels)  # type: ignore[union-attr]
        np.testing.assert_array_equal(scan.lung, before.lung)  # type: ignore[arg-type]
        assert scan.facts == before.facts


# Files of others


def list_real_files() -> list[Path]:
    """What pydicom's wheel brings, and odd files of public collections."""
    own = [path for name in ("test_files", "charset_files") for path in (PYDICOM_DATA / name).rglob("*")]
    return sorted(path for path in [*own, *ODD_DATA.rglob("*")] if path.is_file())


@pytest.mark.slow
@pytest.mark.parametrize("are_together", [False, True], ids=["each alone", "all in one folder"])
def test_none_of_pydicoms_files_is_a_chest(are_together: bool, sandbox: Sandbox, tmp_path: Path) -> None:
    """In a folder each, and all in one, where what is no slice may lie with any series."""
    files = [path for path in list_real_files() if PYDICOM_DATA in path.parents]
    assert len(files) > 100
    for index, path in enumerate(files):
        folder = tmp_path / ("all" if are_together else f"{index:04d}")
        folder.mkdir(exist_ok=True)
        (folder / f"{index:04d}{path.suffix}").symlink_to(path)
    num_sources = len(list(list_sources(open_store(str(tmp_path)).list_objects())))
    scans = ingest(tmp_path, sandbox)
    assert len(scans) >= num_sources > 0
    assert {scan.status for scan in scans} & {Status.OK, Status.ERR_DECODER_CRASH} == set()


@pytest.mark.skipif(not ODD_DATA.is_dir(), reason="odd files (../shared/data/ct/odd) are not on this machine")
def test_a_file_that_parses_to_nothing_is_no_slice_of_a_chest(sandbox: Sandbox, tmp_path: Path) -> None:
    """Real files that pydicom reads without an exception as an object without any element."""
    empty = [path for path in list_real_files() if is_empty(path)]
    assert empty
    for index, path in enumerate(empty):
        paths = write_chest(tmp_path / f"{index}")
        paths[10].write_bytes(path.read_bytes())
    scans = ingest(tmp_path, sandbox)
    assert len(scans) >= len(empty)
    assert all(scan.status.startswith(("SKIP_", "BAD_")) for scan in scans), scans


def is_empty(path: Path) -> bool:
    """Whether pydicom finds an object in the file, and no element in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return len(pydicom.dcmread(path, force=True)) == 0
        except Exception:
            return False


@pytest.mark.skipif(not ODD_DATA.is_dir(), reason="odd files (../shared/data/ct/odd) are not on this machine")
def test_none_of_the_odd_files_alone_is_a_chest(sandbox: Sandbox, tmp_path: Path) -> None:
    files = [path for path in list_real_files() if ODD_DATA in path.parents]
    for index, path in enumerate(files):
        (tmp_path / f"{index:04d}").mkdir()
        (tmp_path / f"{index:04d}" / path.name).symlink_to(path)
    scans = ingest(tmp_path, sandbox)
    assert len(scans) == len(files)
    assert all(scan.status.startswith(("SKIP_", "BAD_")) for scan in scans), scans


# Names in a bucket

KEYS = {
    "spaces": " a  b /c d/",
    "unicode": "Größe/胸部/e\u0301\U0001fac1/",
    "dots": "a/../../b/./..",
    "markup": "<Key>&amp;</Key>/'\"`$(x)%2F%00+?#*;/",
    "1,024 bytes": "x" * (1024 - len("/000.dcm")),
    "slashes": "/a//b///",
}


LINE_ENDS = "a\nb\r\nc\t"


def test_a_chest_in_a_folder_with_line_ends_in_its_name_is_a_chest(sandbox: Sandbox, tmp_path: Path) -> None:
    write_chest(tmp_path / LINE_ENDS)
    (scan,) = ingest(tmp_path, sandbox)
    assert (scan.status, scan.scan_id.rpartition("#")[0]) == (Status.OK, LINE_ENDS)


@pytest.mark.s3
def test_so_is_one_under_a_key_with_line_ends(sandbox: Sandbox, tmp_path: Path) -> None:
    """On a server of our own that has what S3 says of such keys, as moto's answers their puts with 404."""
    files = {f"{LINE_ENDS}/{path.name}": path.read_bytes() for path in write_chest(tmp_path / "a")}
    with serve_objects(files) as client:
        store = S3Store("bucket", connect=lambda: client)
        (source,) = list_sources(store.list_objects())
        assert source.key == LINE_ENDS
        (scan,) = Ingester(store, ROAD, sandbox).ingest(source)
    assert (scan.status, scan.scan_id.rpartition("#")[0]) == (Status.OK, LINE_ENDS), scan.status_detail


@contextmanager
def serve_objects(files: Mapping[str, bytes]) -> Iterator[Any]:
    """A client of a server that lists these objects of one bucket, its keys URL-encoded, and hands them out.

    Source: the S3 documentation of ListObjectsV2 (EncodingType) and GetObject.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            place = urlsplit(self.path)
            key = unquote(place.path.removeprefix("/bucket").removeprefix("/"))
            if not key:
                assert parse_qs(place.query)["encoding-type"] == ["url"]
                tags = {name: hashlib.md5(data).hexdigest() for name, data in sorted(files.items())}
                contents = (
                    f"<Contents><Key>{quote(name)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                    f"<ETag>&quot;{tag}&quot;</ETag><Size>{len(files[name])}</Size></Contents>"
                    for name, tag in tags.items()
                )
                self._answer(
                    200,
                    PAGE.format(count=len(files), truncated="false", following="", contents="".join(contents)).encode(),
                )
            elif key in files:
                self._answer(200, files[key])
            else:
                self._answer(404, b"")

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("ETag", f'"{hashlib.md5(body).hexdigest()}"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nobody asked."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield boto3.session.Session("key", "secret", region_name="us-east-1").client(
                "s3", endpoint_url=f"http://127.0.0.1:{server.server_port}"
            )
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.s3
@pytest.mark.parametrize("name", mark_slow(KEYS, but=("unicode", "markup")))
def test_a_chest_under_an_odd_key_is_a_chest(
    name: str, sandbox: Sandbox, s3: Callable[[], str], tmp_path: Path
) -> None:
    store = open_store(s3())
    for path in write_chest(tmp_path / "a"):
        store.write_bytes(f"{KEYS[name].rstrip('/')}/{path.name}", path.read_bytes())
        store.write_bytes(f"plain/{path.name}", path.read_bytes())
    sources = {source.key: source for source in list_sources(store.list_objects())}
    assert set(sources) == {KEYS[name].rstrip("/"), "plain"}
    ingester = Ingester(store, ROAD, sandbox)
    (odd,), (plain,) = (ingester.ingest(sources[key]) for key in (KEYS[name].rstrip("/"), "plain"))
    assert odd.status is Status.OK, odd.status_detail
    assert odd.scan_id.rpartition("#")[0] == KEYS[name].rstrip("/")
    np.testing.assert_array_equal(odd.volume.voxels, plain.volume.voxels)  # type: ignore[union-attr]
