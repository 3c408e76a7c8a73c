"""Tries an archive and a place for results: stores enter, checks leave that read the one and write to the other.

What is written lies below `_runs/doctor-*/` and is removed again; the table itself is never written to. The promise it
rests on, that of two puts of one name only the first succeeds, is tried for true: some S3 servers accept the condition
and ignore it.
"""

import functools
import hashlib
import secrets
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import dropwhile, islice
from pathlib import Path
from typing import Any

import pyarrow.fs  # type: ignore[import-untyped]

from darnet.archive import is_stray, list_sources
from darnet.arrow_place import find_arrow_place
from darnet.checkup.findings import Check, CheckError, Verdict
from darnet.errors import CredentialsError, ExitCode, FolderMissing, ObjectMissing, ScanError, Status, StorageError
from darnet.publishing.hold import list_held_runs
from darnet.publishing.objects import COMMIT_KEY, list_commit_objects, list_commits
from darnet.publishing.runs import RUNS
from darnet.s3_answers import DAMAGED_BODY
from darnet.scan import StoredObject
from darnet.storage import Store
from darnet.storage_s3 import S3Store

FIRST_OBJECTS = 1_000  # Source: ours; one page of a listing
SMALL_BYTES, LARGE_BYTES = 64 << 10, 24 << 20  # Source: ours; a part, and a night's object of some 100,000 scans
PUTS_AT_ONCE = 8
CLOCK_MIND_S, CLOCK_WRONG_S = 30.0, 300.0  # Source: ours; S3 refuses requests that are 15 minutes off
WRONG_CRC32 = "AAAAAA=="  # Source: base64 of four zero bytes; of random bytes one in 2**32 has this checksum
REFUSALS = DAMAGED_BODY | {"InvalidDigest"}  # Source: the last is Garage's word
OTHER_STORE = "use a store with conditional writes: AWS S3, MinIO, Ceph, or a local disk; this one would lose nights"


def check_archive(archive: Store) -> list[Check]:
    """Can the archive be listed and read, and would a scan replaced in the middle of a night be noticed?"""
    return [
        ("archive: listing", lambda: _list_first(archive)),
        ("archive: reading", lambda: _fetch_one(archive)),
        ("archive: replaced scans", lambda: _fetch_another_version(archive)),
    ]


def check_results(trial: "Trial") -> list[list[Check]]:
    """Is this a place where a night can be published once and whole? What is written stays until `check_removal`."""
    return [
        [("results: the table there", trial.look_at_table)],
        [
            ("results: writing and reading back", trial.write_and_read),
            ("results: listing what was written", trial.list_written),
            ("results: clock", trial.compare_clocks),
            ("results: the second of two puts is refused", trial.put_twice),
            ("results: of puts at once one succeeds", trial.put_at_once),
            ("results: a whole night's object", trial.put_large),
            ("results: uploads in parts", trial.upload_in_parts),
            *([("results: a wrong checksum is refused", trial.put_damaged)] if trial.sends_checksums else []),
            ("results: the right to publish", trial.put_what_is_there),  # last: where two puts succeed it would replace
        ],
    ]


def check_removal(trial: "Trial") -> list[Check]:
    """What cleans up after `check_results`."""
    return [("results: removing", trial.remove)]


def check_reach(archive: Store | None, trial: "Trial | None") -> list[list[Check]]:
    """What another machine than the driver's, where scans are read and scored, needs of both places; only reads."""
    groups: list[list[Check]] = []
    if archive is not None:
        groups.append([("machine: listing the archive", lambda: _list_first(archive))])
        groups[-1].append(("machine: reading the archive", lambda: _fetch_one(archive)))
    if trial is not None and trial.has_written:
        groups.append([("machine: reading the results", trial.read_again)])
        groups[-1].append(("machine: clock", trial.compare_read_clock))
    return groups


class Trial:
    """Objects of one check-up of a results store, below a prefix of their own."""

    def __init__(self, store: Store, prefix: str = "", now_s: Callable[[], float] = time.time) -> None:
        self._store, self._now_s = store, now_s
        self._prefix = prefix or f"{RUNS}doctor-{secrets.token_hex(8)}/"
        self._small = b""

    @property
    def has_written(self) -> bool:
        """Whether there is something that other machines may read."""
        return bool(self._small)

    @property
    def sends_checksums(self) -> bool:
        """Whether what is put may carry a checksum: into a bucket, not into a folder."""
        return isinstance(self._store, S3Store)

    def look_at_table(self) -> str:
        """Its numbers, and whether a run is held."""
        return _look_at_table(self._store)

    def write_and_read(self) -> str:
        """A small object comes back as it went."""
        small = secrets.token_bytes(SMALL_BYTES)
        self._return(self._key("small"), small, self._store.write_bytes)
        self._small = small
        return f"{SMALL_BYTES >> 10} KiB below {self._prefix}"

    def read_again(self) -> str:
        """The same from another machine: a folder that is no mount of the driver's is another folder there."""
        try:
            self._compare(self._key("small"), self._small)
        except ObjectMissing as error:
            told = f"what the driver wrote to {self._store.uri} is not there"
            raise CheckError(told, "mount that folder on every machine, or keep results in a bucket") from error
        return "what the driver wrote"

    def list_written(self) -> str:
        """What was just written is in the next listing."""
        found = self._find("small")
        if found.num_bytes != SMALL_BYTES:
            raise CheckError(f"listed with {found.num_bytes} bytes of {SMALL_BYTES}", OTHER_STORE)
        return "at once, with its length"

    def compare_clocks(self) -> str:
        """How far this machine's clock is from the store's: nights are dated here, listings there."""
        apart_s = abs(self._now_s() - self._store.read_clock().timestamp())
        if apart_s > CLOCK_MIND_S:
            verdict = Verdict.WRONG if apart_s > CLOCK_WRONG_S else Verdict.MIND
            raise CheckError(f"{apart_s:.0f} s from the store's", "start chrony or ntpd on this machine", verdict)
        return f"within {CLOCK_MIND_S:.0f} s of the store's"

    def compare_read_clock(self) -> str:
        """The same where only reading is asked for, as of a mount that is for reading alone."""
        try:
            return self.compare_clocks()
        except (StorageError, CredentialsError) as error:
            told = f"not compared, as the results are for reading alone here ({error})"
            raise CheckError(told, "nothing, if this machine only decodes", Verdict.MIND) from error

    def put_twice(self) -> str:
        """The put that publishes a night: the second of the same name must change nothing and say so."""
        first, second = (secrets.token_bytes(SMALL_BYTES) for _ in range(2))
        key = self._key("once")
        if not self._store.put_if_absent(key, first):
            raise CheckError("the first put of a new name was refused", OTHER_STORE)
        if self._store.put_if_absent(key, second) or self._store.read_bytes(key) != first:
            raise CheckError("the store accepts the condition and ignores it: the second put went through", OTHER_STORE)
        return "the first one's bytes stay"

    def put_at_once(self) -> str:
        """Two drivers that publish in the same moment."""
        key = self._key("race")
        bodies = [secrets.token_bytes(SMALL_BYTES) for _ in range(PUTS_AT_ONCE)]
        with ThreadPoolExecutor(PUTS_AT_ONCE) as pool:
            won = list(pool.map(functools.partial(self._store.put_if_absent, key), bodies))
        if sum(won) != 1 or self._store.read_bytes(key) != bodies[won.index(True)]:
            raise CheckError(f"{sum(won)} of {PUTS_AT_ONCE} puts of one name at once succeeded", OTHER_STORE)
        return f"1 of {PUTS_AT_ONCE}"

    def put_large(self) -> str:
        """A night is one object, put in one request."""
        self._return(self._key("large"), secrets.token_bytes(LARGE_BYTES), self._store.put_if_absent)
        return f"{LARGE_BYTES >> 20} MiB in one request"

    def upload_in_parts(self) -> str:
        """Ray Train writes its checkpoints through pyarrow, to S3 in several parts; so, and to the same server."""
        data = secrets.token_bytes(LARGE_BYTES)
        key = self._key("parts")
        system, path = find_arrow_place(f"{self._store.uri}/{key}")
        try:
            if system is None:
                system, path = pyarrow.fs.FileSystem.from_uri(path)
            with system.open_output_stream(path) as sink:
                sink.write(data)
        except OSError as error:
            told = str(error).splitlines()[0]
            remedy = "nights do without; to keep a training's checkpoints here, set on an older server "
            remedy += "AWS_REQUEST_CHECKSUM_CALCULATION=when_required"
            raise CheckError(f"pyarrow cannot write there ({told})", remedy, Verdict.MIND) from error
        self._compare(key, data)
        return f"{LARGE_BYTES >> 20} MiB"

    def put_damaged(self) -> str:
        """An upload with a checksum of other bytes in a header, as where one was changed on its way.

        What jobs upload tells it in a trailer, or not at all where they are told so: this is of the store alone.
        """
        assert isinstance(self._store, S3Store)
        store = replace(self._store, connect=functools.partial(_connect_spoiling, self._store.connect))
        try:
            store.write_bytes(self._key("damaged"), secrets.token_bytes(SMALL_BYTES))
        except StorageError as error:
            if told := [word for word in sorted(REFUSALS) if f"({word})" in str(error)]:
                return f"in a header, as {told[0]}"
            remedy = "if uploads fail, set AWS_REQUEST_CHECKSUM_CALCULATION=when_required, and run jobs.results check"
            raise CheckError(f"the store takes no CRC32 in a header: {error}", remedy, Verdict.MIND) from error
        remedy = "jobs compare what they put with its ETag, where that is an MD5; where it is none (KMS), run "
        remedy += "jobs.results check after each night, or use a store that compares checksums"
        raise CheckError("the store keeps uploads whose checksum is wrong", remedy, Verdict.MIND)

    def put_what_is_there(self) -> str:
        """The put that publishes, of what is published: to be refused as there already, and not as forbidden.

        It is an object's own bytes that are put, so that a store which takes them all the same has changed nothing.
        """
        published = list_commit_objects(self._store)
        if not published:
            remedy = "try again after the first night, which shows it"
            raise CheckError("not tried: the table has no object yet", remedy, Verdict.UNTRIED)
        key = min(published, key=lambda item: item.num_bytes).key
        if self._store.put_if_absent(key, self._store.read_bytes(key)):
            raise CheckError(f"{key} was put though it is there", OTHER_STORE)
        return f"{key} is there, and stays"

    def remove(self) -> str:
        """Nothing of the check-up stays behind."""
        listed = [item.key for item in self._store.list_objects(self._prefix)]
        for key in listed:
            self._store.delete(key)
        if left := list(self._store.list_objects(self._prefix)):
            raise CheckError(f"{len(left)} objects are still listed", f"remove {self._store.uri}/{self._prefix}")
        folder = self._store.local_path(self._prefix.rstrip("/"))
        if folder is not None:  # on a disk a folder outlives what was in it
            with suppress(OSError):  # missing, or not empty where a store does not list what it holds
                folder.rmdir()
        return f"{len(listed)} objects of this check-up"

    def _key(self, name: str) -> str:
        return self._prefix + name

    def _find(self, name: str) -> StoredObject:
        for item in self._store.list_objects(self._prefix):
            if item.key == self._key(name):
                return item
        raise CheckError("not listed after it was written", OTHER_STORE)

    def _return(self, key: str, data: bytes, put: Callable[[str, bytes], object]) -> None:
        put(key, data)
        self._compare(key, data)

    def _compare(self, key: str, data: bytes) -> None:
        given = self._store.read_bytes(key)
        if hashlib.sha256(given).digest() != hashlib.sha256(data).digest():
            raise CheckError(f"{len(given)} bytes came back that are not the {len(data)} written", OTHER_STORE)


def _connect_spoiling(connect: Callable[[], Any]) -> Any:
    """A client of the same store that says another checksum of all it puts than that of the bytes."""
    client = connect()
    client.meta.events.register("provide-client-params.s3.PutObject", _spoil_checksum)
    return client


def _spoil_checksum(params: dict[str, Any], **_: Any) -> dict[str, Any]:
    return params | {"ChecksumCRC32": WRONG_CRC32}


def _list_first(archive: Store) -> str:
    objects = _list_likely(archive)
    num_sources = sum(1 for _ in list_sources(objects))
    if not num_sources:
        raise CheckError("nothing in it looks like a scan", "is the address right?")
    return f"{num_sources} sources of scans among {len(objects)} objects, of which the first is no stray"


def _list_likely(archive: Store) -> list[StoredObject]:
    """The first objects from the first on that may be of a scan; any number of strays may lie before it."""
    return list(islice(dropwhile(lambda item: is_stray(item.key), archive.list_objects()), FIRST_OBJECTS))


def _fetch_one(archive: Store) -> str:
    item = _choose_object(archive)
    _fetch(archive, item)
    return f"{item.num_bytes} bytes, as listed"


def _fetch_another_version(archive: Store) -> str:
    item = _choose_object(archive)
    try:
        _fetch(archive, replace(item, version="0" * len(item.version), modified_s=item.modified_s - 1))
    except ScanError as error:
        if error.status is Status.ERR_INPUT_CHANGED:
            return "noticed: the version that was planned is asked for"
        raise
    raise CheckError(
        "not noticed: the store ignores If-Match",
        "keep others from writing to the archive while a night runs",
        Verdict.MIND,
    )


def _choose_object(archive: Store) -> StoredObject:
    """The smallest object of the first source that has any bytes."""
    first = next(list_sources(_list_likely(archive)))
    return min(first.objects, key=lambda item: (item.num_bytes == 0, item.num_bytes))


def _fetch(store: Store, item: StoredObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store.fetch(item, Path(folder) / "object")


def _look_at_table(results: Store) -> str:
    try:
        numbers = [int(found[1]) for key in list_commits(results) if (found := COMMIT_KEY.fullmatch(key))]
        held = list_held_runs(results)
    except FolderMissing:
        return "empty: the first night starts it"
    if held:
        raise CheckError(
            f"run {held[0]} is held, so that no night is scored",
            f"look at its nightly.html, then jobs.score --accept {held[0]} or --discard {held[0]}",
            exit_code=ExitCode.HELD,
        )
    if numbers != list(range(1, len(numbers) + 1)):
        raise CheckError(
            f"{len(numbers)} objects that are not numbered 1 to {len(numbers)}",
            "put back what is missing, unless there is no copy: then its scans are scored again and the gap stays",
            Verdict.MIND,
        )
    return f"{len(numbers)} night{'s' * (len(numbers) != 1)}" if numbers else "empty: the first night starts it"
