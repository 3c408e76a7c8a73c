"""Large slices of a bucket come by their headers first, and whole if they contribute: nothing of it shows in a row.

The truth is the same archive on a disk, and what the server counts on its line.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import FileDataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless

from darnet.archive import list_sources
from darnet.config import DecodeConfig, VolumeConfig
from darnet.errors import ScanError, Status
from darnet.ingest import Ingester, make_sandbox
from darnet.reading.excerpt import ExcerptsTooShort, MissingBytes, open_staged
from darnet.reading.road import FoundScan, Road, decode_scan, find_scans
from darnet.reading.sandbox import Sandbox
from darnet.scan import IngestedScan, Source, StagedFile, StoredObject
from darnet.staging import Excerpts, Staging
from darnet.storage import open_store
from darnet.storage_s3 import S3Store
from tests.ct_fixtures import make_chest, write_chest
from tests.hostile.case import cut
from tests.marks import mark_slow
from tests.object_server import Answer, Line, serve_objects

NUM_SLICES = 24
ROAD = Road(VolumeConfig(shape=(8, 32, 32)), DecodeConfig(), b"a secret of thirty-two bytes ....")
SMALL = Excerpts(min_bytes=3_000, head_bytes=2_048, tail_bytes=64)
MANY = replace(SMALL, max_share=0.7)  # of 26 files, two for each of the 8 may contribute
# Of 24 slices to 8, by hand: slice i of the 8 lies at 3 i + 1. The first and last tell the spacing, and the first file,
# which `write_chest` makes the first slice, names the patient.
WHOLE = [0, 1, 4, 7, 10, 13, 16, 19, 22, 23]
READ, SKIPPED = 7, 11  # a slice that contributes, and one that does not
HEEDFUL = ("If-Match", "Range")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """One child for all tests, as in a worker."""
    sandbox = make_sandbox(ROAD.decode)
    yield sandbox
    sandbox.close()


@dataclass
class Bucket:
    """The files below a folder as objects of a server, and what it sent of each; `meddle` may answer otherwise."""

    files: dict[str, bytes]
    line: Line
    meddle: Callable[[str, int, Answer], Answer | None]
    asked: Counter[str]

    @property
    def sent(self) -> dict[str, int]:
        """Bytes by key, without what says that an object cannot be had."""
        return {path.removeprefix("/bucket/"): count for path, count in self.line.sent.items()}

    def answer(self, path: str) -> Answer | None:
        """`meddle` is told the key, how often it was asked for before, and what is right."""
        key = path.removeprefix("/bucket/")
        self.asked[key] += 1
        return self.meddle(key, self.asked[key] - 1, _answer(self.files[key]))

    @property
    def source(self) -> Source:
        """All of it as listed."""
        objects = [StoredObject(key, len(body), _tag(body)) for key, body in sorted(self.files.items())]
        (source,) = list_sources(objects)
        return source


def _tag(body: bytes) -> str:
    return hashlib.md5(body, usedforsecurity=False).hexdigest()


def _answer(body: bytes, **more: Any) -> Answer:
    return Answer(body, len(body), _tag(body), heeds=HEEDFUL, **more)


def _read_files(folder: Path) -> dict[str, bytes]:
    return {f"{folder.name}/{path.name}": path.read_bytes() for path in folder.iterdir()}


def _name(index: int) -> str:
    """The key of slice `index`, as `write_chest` names it."""
    return f"a/{index * 7 % NUM_SLICES:03d}.dcm"


@dataclass
class FailingSandbox:
    """A sandbox that counts decodings, of which the first end as `statuses` say."""

    sandbox: Sandbox
    statuses: Sequence[Status] = ()
    num_decoded: int = 0

    def call(self, step: Any, *arguments: Any) -> Any:
        if step is decode_scan:
            self.num_decoded += 1
            if self.num_decoded <= len(self.statuses):
                raise ScanError(self.statuses[self.num_decoded - 1], "as the test wants it")
        return self.sandbox.call(step, *arguments)


Read = Callable[..., tuple[list[IngestedScan], Bucket]]


@pytest.fixture
def read(sandbox: Sandbox) -> Read:
    """Ingest one folder's files from a server, by excerpts if nothing else is said."""

    def run(
        files: Path | Mapping[str, bytes],
        meddle: Callable[[str, int, Answer], Answer | None] = lambda _key, _times, answer: answer,
        *,
        excerpts: Excerpts = SMALL,
        road: Road = ROAD,
        sandbox: Any = sandbox,
    ) -> tuple[list[IngestedScan], Bucket]:
        bucket = Bucket(dict(_read_files(files) if isinstance(files, Path) else files), Line(), meddle, Counter())
        with serve_objects(bucket.answer, bucket.line) as connect:
            scans = Ingester(S3Store("bucket", "", connect), road, sandbox, excerpts).ingest(bucket.source)
        return scans, bucket

    return run


def _read_in_place(folder: Path, sandbox: Sandbox, road: Road = ROAD) -> list[IngestedScan]:
    """The truth: the same files on a disk."""
    store = open_store(str(folder.parent))
    (source,) = list_sources(store.list_objects())
    return Ingester(store, road, sandbox).ingest(source)


def _assert_same(found: Sequence[IngestedScan], expected: Sequence[IngestedScan]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert replace(one, volume=None, lung=None, fetch_s=0, decode_s=0) == replace(
            other, volume=None, lung=None, fetch_s=0, decode_s=0
        )
        assert (one.volume is None, one.lung is None) == (other.volume is None, other.lung is None)
        if one.volume is not None and other.volume is not None:
            np.testing.assert_array_equal(one.volume.voxels, other.volume.voxels)
            np.testing.assert_array_equal(one.lung, other.lung)  # type: ignore[arg-type]
            assert replace(one.volume, voxels=other.volume.voxels) == other.volume


def _write(folder: Path, edit: Callable[[int, FileDataset], None] | None = None, **tags: Any) -> Path:
    write_chest(folder, make_chest((NUM_SLICES, 64, 64)), edit, **tags)
    return folder


@pytest.fixture(scope="module")
def chest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of uncompressed slices."""
    return _write(tmp_path_factory.mktemp("plain") / "a")


@pytest.fixture(scope="module")
def truth(chest: Path, sandbox: Sandbox) -> list[IngestedScan]:
    """What it is when read in place."""
    scans = _read_in_place(chest, sandbox)
    assert [scan.status for scan in scans] == [Status.OK]
    return scans


# What is fetched, and that it does not show


@pytest.mark.s3
def test_headers_and_contributing_slices_are_all_that_comes(chest: Path, truth: list[IngestedScan], read: Read) -> None:
    scans, bucket = read(chest)
    _assert_same(scans, truth)
    assert scans[0].facts.num_bytes == sum(map(len, bucket.files.values()))
    heads = dict.fromkeys(bucket.files, SMALL.head_bytes)
    assert bucket.sent == {**heads, **{_name(i): SMALL.head_bytes + len(bucket.files[_name(i)]) for i in WHOLE}}


@pytest.mark.s3
@pytest.mark.parametrize(
    ("excerpts", "road"),
    [
        (replace(SMALL, min_bytes=1_000_000), ROAD),
        (replace(SMALL, max_share=0.3), ROAD),
        (SMALL, replace(ROAD, volume=VolumeConfig(shape=(8, 32, 32), depth_resampling="area"))),
        (SMALL, replace(ROAD, volume=VolumeConfig(shape=(24, 32, 32)))),
    ],
    ids=["small", "too many contribute", "area", "all contribute"],
)
def test_what_gains_nothing_comes_whole_and_once(excerpts: Excerpts, road: Road, chest: Path, read: Read) -> None:
    scans, bucket = read(chest, excerpts=excerpts, road=road)
    assert scans[0].status is Status.OK
    assert bucket.sent == {key: len(body) for key, body in bucket.files.items()}
    assert set(bucket.asked.values()) == {1}


@pytest.mark.s3
@pytest.mark.parametrize("crop", ["paper", "body"])
def test_every_crop_has_its_slices(crop: Any, chest: Path, sandbox: Sandbox, read: Read) -> None:
    road = replace(ROAD, volume=VolumeConfig(shape=(8, 32, 32), crop=crop))
    scans, bucket = read(chest, road=road)
    _assert_same(scans, _read_in_place(chest, sandbox, road))
    assert sum(bucket.sent.values()) < sum(map(len, bucket.files.values()))


@pytest.mark.s3
def test_what_comes_second_counts_as_fetching_too(chest: Path, read: Read) -> None:
    scans, bucket = read(chest, lambda key, _, answer: replace(answer, delay_s=0.1 * (key == _name(0))))
    assert bucket.asked[_name(0)] == 2
    assert scans[0].fetch_s >= 0.2


@pytest.mark.s3
@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless, DeflatedExplicitVRLittleEndian])
def test_of_compressed_slices_the_end_comes_too(syntax: str, tmp_path: Path, sandbox: Sandbox, read: Read) -> None:
    rng = np.random.default_rng(0)

    def compress(_: int, dataset: FileDataset) -> None:
        pixels = np.frombuffer(dataset.PixelData, "<u2") + rng.integers(0, 64, 64 * 64)
        dataset.PixelData = pixels.astype("<u2").tobytes()
        if syntax == DeflatedExplicitVRLittleEndian:
            dataset.file_meta.TransferSyntaxUID = syntax
        else:
            dataset.compress(syntax, generate_instance_uid=False)

    folder = _write(tmp_path / "a", compress)
    scans, bucket = read(folder)
    assert scans[0].status is Status.OK
    _assert_same(scans, _read_in_place(folder, sandbox))
    parts = {key: SMALL.head_bytes + SMALL.tail_bytes for key in bucket.files}
    for key, body in bucket.files.items():
        if syntax == DeflatedExplicitVRLittleEndian or key in map(
            _name, WHOLE
        ):  # what is deflated has no end of its own
            parts[key] += len(body)
    assert bucket.sent == parts


# Headers that an excerpt does not hold


@pytest.mark.s3
def test_a_header_longer_than_the_span_is_read_in_the_whole_file(
    tmp_path: Path, truth: list[IngestedScan], read: Read
) -> None:
    def lengthen(index: int, dataset: FileDataset) -> None:
        if index == SKIPPED:
            dataset.add_new(0x00091010, "OB", bytes(3_000))

    scans, bucket = read(_write(tmp_path / "a", lengthen))
    assert replace(scans[0].facts, num_bytes=0) == replace(truth[0].facts, num_bytes=0)
    np.testing.assert_array_equal(scans[0].volume.voxels, truth[0].volume.voxels)  # type: ignore[union-attr]
    rest = set(bucket.files) - {_name(index) for index in WHOLE}
    long = _name(SKIPPED)
    assert {key: bucket.sent[key] for key in rest - {long}} == dict.fromkeys(rest - {long}, SMALL.head_bytes)
    assert bucket.sent[long] == SMALL.head_bytes + len(bucket.files[long])


@pytest.mark.s3
def test_a_large_file_that_is_no_slice_is_judged_whole(chest: Path, truth: list[IngestedScan], read: Read) -> None:
    files = {**_read_files(chest), "a/stray": b"no DICOM at all" * 1_000}
    scans, bucket = read(files, excerpts=MANY)
    _assert_same(scans, truth)
    assert bucket.sent["a/stray"] == SMALL.head_bytes + len(files["a/stray"])
    assert bucket.sent[_name(SKIPPED)] == SMALL.head_bytes


# Damage in slices whose pixels nobody reads


def _cut_end(folder: Path) -> None:
    cut(folder.parent / _name(SKIPPED), 0.999)


def _break_chain(folder: Path) -> None:
    """A fragment that claims to be longer than the file."""
    path = folder.parent / _name(SKIPPED)
    data = bytearray(path.read_bytes())
    place = data.index(b"\xfe\xff\x00\xe0", data.index(b"\xfe\xff\x00\xe0") + 4)
    data[place + 4 : place + 8] = (1 << 20).to_bytes(4, "little")
    path.write_bytes(data)


def _drop(folder: Path) -> None:
    (folder.parent / _name(SKIPPED)).unlink()


def _double(folder: Path) -> None:
    (folder / "999.dcm").write_bytes((folder.parent / _name(SKIPPED)).read_bytes())


DAMAGES = {
    "cut, uncompressed": (None, _cut_end, Status.BAD_TRUNCATED),
    "cut, fragments": (RLELossless, _cut_end, Status.BAD_TRUNCATED),
    "chain broken": (RLELossless, _break_chain, Status.BAD_TRUNCATED),
    "missing": (None, _drop, Status.BAD_MISSING_SLICE),
    "double": (None, _double, Status.BAD_DUPLICATE_SLICE),
}


@pytest.mark.s3
@pytest.mark.parametrize("name", DAMAGES)
def test_damage_in_a_slice_that_does_not_contribute_is_found(
    name: str, tmp_path: Path, sandbox: Sandbox, read: Read
) -> None:
    syntax, spoil, status = DAMAGES[name]

    def compress(_: int, dataset: FileDataset) -> None:
        if syntax is not None:
            dataset.compress(syntax, generate_instance_uid=False)

    folder = _write(tmp_path / "a", compress)
    spoil(folder)
    expected = _read_in_place(folder, sandbox)
    assert [scan.status for scan in expected] == [status]
    scans, bucket = read(folder, excerpts=replace(SMALL, min_bytes=1_500, head_bytes=1_200))
    _assert_same(scans, expected)
    assert {key for key, body in bucket.files.items() if bucket.sent[key] < len(body)} == set()  # judged whole


@pytest.fixture(scope="module")
def with_scout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of slices and two large scout views, as scanners leave them."""
    folder, beside = _write(tmp_path_factory.mktemp("scout") / "a"), tmp_path_factory.mktemp("beside")
    write_chest(beside, make_chest((2, 64, 64)), ImageType=["ORIGINAL", "LOCALIZER"], SeriesInstanceUID="1.9")
    for path in beside.iterdir():
        path.rename(folder / f"scout-{path.name}")
    return folder


@pytest.mark.s3
def test_a_scout_comes_whole_and_the_series_beside_it_by_its_headers(
    with_scout: Path, sandbox: Sandbox, read: Read
) -> None:
    scans, bucket = read(with_scout, excerpts=MANY)
    assert sorted(scan.status for scan in scans) == [Status.OK, Status.SKIP_LOCALIZER]
    _assert_same(scans, _read_in_place(with_scout, sandbox))
    whole = {*map(_name, WHOLE), *(key for key in bucket.files if "scout" in key)}
    assert {key for key, times in bucket.asked.items() if times == 2} == whole


@pytest.mark.s3
def test_a_scan_without_lungs_comes_whole_and_is_decoded_once(tmp_path: Path, sandbox: Sandbox, read: Read) -> None:
    folder, voxels = tmp_path / "a", make_chest((NUM_SLICES, 64, 64))
    voxels[voxels == -850] = 40
    write_chest(folder, voxels)
    failing = FailingSandbox(sandbox)
    scans, bucket = read(folder, sandbox=failing)
    assert ([scan.status for scan in scans], failing.num_decoded) == ([Status.SKIP_NO_LUNG], 1)
    assert {key for key, body in bucket.files.items() if bucket.sent[key] < len(body)} == set()


# Wrong bits, which no checksum of a span tells


def _flip(body: bytes, place: int, bit: int = 0) -> bytes:
    return body[:place] + bytes([body[place] ^ 1 << bit]) + body[place + 1 :]


# A slice, what to look for in its file, and how far behind that the wrong bit is.
WRONG_BITS = {
    "length of the series' name": (SKIPPED, b"\x20\x00\x0e\x00", 6),
    "series": (SKIPPED, b"\x20\x00\x0e\x00", 8),
    "patient": (SKIPPED, b"\x10\x00\x20\x00", 8),
    "place": (SKIPPED, b"\\368.0", 2),  # 500 mm less 11 steps of 12
    "rows": (SKIPPED, b"\x28\x00\x10\x00", 8),
    "length of the pixels": (SKIPPED, b"\xe0\x7f\x10\x00", 10),
    "magic word": (SKIPPED, b"DICM", 0),
    "maker of the slice that speaks for all": (0, b"\x08\x00\x70\x00", 8),
    "intercept of a slice that contributes": (READ, b"\x28\x00\x52\x10", 11),
    "place of the last slice": (NUM_SLICES - 1, b"\\224.0", 3),  # of 224 mm it makes 225
}


@pytest.mark.s3
@pytest.mark.parametrize("name", mark_slow(WRONG_BITS, but=list(WRONG_BITS)[::3]))
def test_a_wrong_bit_of_an_excerpt_is_in_no_row(name: str, chest: Path, truth: list[IngestedScan], read: Read) -> None:
    """The whole object, which has a checksum, comes right."""
    index, needle, behind = WRONG_BITS[name]

    def meddle(key: str, times: int, answer: Answer) -> Answer:
        if key != _name(index) or times > 0:
            return answer
        return replace(answer, body=_flip(answer.body, answer.body.index(needle) + behind))

    scans, _ = read(chest, meddle)
    _assert_same(scans, truth)


@pytest.mark.s3
@pytest.mark.slow
def test_no_wrong_bit_of_any_excerpt_is_in_a_row(with_scout: Path, sandbox: Sandbox, read: Read) -> None:
    rng, truth = random.Random(0), _read_in_place(with_scout, sandbox)
    for _ in range(300):
        name = f"a/{rng.choice(list(_read_files(with_scout)))}"
        wrong = {name: (rng.randrange(SMALL.head_bytes), rng.randrange(8))}

        def meddle(key: str, times: int, answer: Answer, wrong: Any = wrong) -> Answer:
            if key not in wrong or times > 0:
                return answer
            return replace(answer, body=_flip(answer.body, *wrong[key]))

        scans, _ = read(with_scout, meddle, excerpts=MANY)
        _assert_same(scans, truth)


@pytest.mark.s3
@pytest.mark.parametrize(
    ("status", "statuses"),
    [
        (Status.ERR_TIMEOUT, [Status.ERR_TIMEOUT]),
        (Status.ERR_MEMORY, [Status.ERR_MEMORY, Status.OK]),
        (Status.ERR_DECODER_CRASH, [Status.ERR_DECODER_CRASH, Status.OK]),
    ],
)
def test_what_ended_the_decoder_is_decoded_again_but_for_a_hang(
    status: Status, statuses: list[Status], chest: Path, sandbox: Sandbox, read: Read
) -> None:
    """Which costs its time limit each time."""
    failing = FailingSandbox(sandbox, [status])
    scans, bucket = read(chest, sandbox=failing)
    assert ([scan.status for scan in scans], failing.num_decoded) == (statuses[-1:], len(statuses))
    is_whole = bucket.sent[_name(SKIPPED)] > SMALL.head_bytes
    assert is_whole == (len(statuses) > 1)


@pytest.mark.s3
def test_a_series_that_hangs_beside_one_that_crashes_hangs_once(sandbox: Sandbox, read: Read, tmp_path: Path) -> None:
    both = _write(tmp_path / "a")
    for path in write_chest(tmp_path / "other", SeriesInstanceUID="1.9"):
        path.rename(both / f"other-{path.name}")
    failing = FailingSandbox(sandbox, [Status.ERR_DECODER_CRASH, Status.ERR_TIMEOUT])
    scans, _ = read(both, sandbox=failing)
    assert {scan.status for scan in scans} == {Status.ERR_DECODER_CRASH, Status.ERR_TIMEOUT}
    assert failing.num_decoded == 2


# What becomes of an object between its header and its pixels


@pytest.mark.s3
@pytest.mark.parametrize("heeds", [HEEDFUL, ("Range",)])
@pytest.mark.parametrize("times", [0, 1])
def test_an_object_replaced_before_or_after_its_header_is_no_scan(
    times: int, heeds: tuple[str, ...], chest: Path, read: Read
) -> None:
    """Also where the store ignores If-Match: its answer names another tag."""

    def meddle(key: str, so_far: int, answer: Answer) -> Answer:
        if key != _name(READ) or so_far < times:
            return answer
        return replace(_answer(_flip(answer.body, 5_000)), heeds=heeds)

    scans, _ = read(chest, meddle)
    name = _name(READ).removeprefix("a/")
    assert [(scan.scan_id, scan.status, scan.status_detail) for scan in scans] == [
        ("a", Status.ERR_INPUT_CHANGED, f"{name}: replaced since it was listed")
    ]


@pytest.mark.s3
@pytest.mark.parametrize("times", [0, 1])
def test_an_object_deleted_before_or_after_its_header_is_gone(times: int, chest: Path, read: Read) -> None:
    scans, bucket = read(chest, lambda key, so_far, answer: None if key == _name(READ) and so_far >= times else answer)
    assert [(scan.scan_id, scan.status) for scan in scans] == [("a", Status.ERR_GONE)]
    assert bucket.asked[_name(READ)] == times + 1  # trouble of the store is not looked for twice


# Stores that do not answer with spans


@pytest.mark.s3
def test_a_store_that_ignores_spans_sends_each_object_once(chest: Path, truth: list[IngestedScan], read: Read) -> None:
    scans, bucket = read(chest, lambda _key, _times, answer: replace(answer, heeds=("If-Match",)))
    _assert_same(scans, truth)
    assert bucket.sent == {key: len(body) for key, body in bucket.files.items()}


# An excerpt as a file


def _excerpt(folder: Path, body: bytes, *spans: range) -> StagedFile:
    file = StagedFile("1", folder / "000000", "1", spans)
    file.header_path.write_bytes(bytes(body[i] if any(i in span for span in spans) else 0 for i in range(len(body))))
    return file


def test_an_excerpt_gives_its_own_bytes_and_refuses_all_others(tmp_path: Path) -> None:
    body = random.Random(0).randbytes(100_000)
    file = _excerpt(tmp_path, body, range(20_000), range(99_000, 100_000))
    with open_staged(file) as opened:
        assert opened.read(132) == body[:132]
        opened.seek(19_990)
        assert opened.read(10) == body[19_990:20_000]
        with pytest.raises(MissingBytes):
            opened.read(1)
        opened.seek(19_990)
        with pytest.raises(MissingBytes):
            opened.read(11)
        opened.seek(99_000)
        assert opened.read() == body[99_000:]
        assert opened.read(1) == b""
        opened.seek(98_999)
        with pytest.raises(MissingBytes):
            opened.read(1)


class Folder:
    """What stands for a bucket without a server."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = files

    def local_path(self, key: str) -> None:
        del key

    def fetch(self, item: StoredObject, path: Path) -> None:
        path.write_bytes(self.files[item.key])

    def fetch_span(self, item: StoredObject, path: Path, span: range) -> bool:
        body = bytearray(path.read_bytes() if path.exists() else bytes(item.num_bytes))
        body[span.start : span.stop] = self.files[item.key][span.start : span.stop]
        path.write_bytes(body)
        return False


def test_pixels_of_an_excerpt_are_a_defect_and_never_zeros(chest: Path, tmp_path: Path) -> None:
    files = _read_files(chest)
    source = Bucket(files, Line(), lambda _key, _times, answer: answer, Counter()).source
    staging = Staging(Folder(files), source, tmp_path)  # type: ignore[arg-type]
    staging.fetch(ROAD.volume, SMALL)
    (found,) = find_scans("a", staging.files, tmp_path, ROAD)
    assert isinstance(found, FoundScan)
    scan = decode_scan(found, ROAD.volume)
    assert (scan.status, scan.status_detail) == (Status.ERR_DECODER_CRASH, "unexpected AssertionError")
    assert staging.complete()
    assert decode_scan(found, ROAD.volume).status is Status.OK
    assert not staging.has_excerpts


@pytest.mark.slow
def test_headers_that_are_not_there_are_named(chest: Path, tmp_path: Path) -> None:
    files = _read_files(chest)
    source = Bucket(files, Line(), lambda _key, _times, answer: answer, Counter()).source
    staging = Staging(Folder(files), source, tmp_path)  # type: ignore[arg-type]
    staging.fetch(ROAD.volume, replace(SMALL, head_bytes=400))
    with pytest.raises(ExcerptsTooShort) as caught:
        find_scans("a", staging.files, tmp_path, ROAD)
    assert caught.value.paths == {file.path for file in staging.files}
