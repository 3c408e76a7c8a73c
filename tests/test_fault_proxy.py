"""What a store that fails does to the code that reads, stages and publishes; and that the proxy fails as it says."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3.session
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, FlexibleChecksumError

from darnet.errors import CredentialsError, ObjectMissing, ScanError, Status, StorageError
from darnet.publishing.check import check_table
from darnet.publishing.commit import check_rows, publish
from darnet.publishing.runs import RunFolder
from darnet.storage import open_store, transfer_all
from darnet.storage_s3 import S3Store, connect_s3
from tests.fault_proxy import Fault, FaultProxy, Policy, Request, Weather, run_fault_proxy
from tests.results_fixtures import ORIGIN, begin_run, make_listing, make_row, make_source
from tests.small_disk import MountRefused, mount_small_disk

NUM_OBJECTS = 60
STORM = Weather(
    12,
    {
        **{Fault("SlowDown"): 0.2, Fault("InternalError"): 0.05, Fault("reset"): 0.03, Fault("slow", 0.2): 0.02},
        **{Fault("truncated"): 0.05, Fault("flipped"): 0.05},
    },
)


@pytest.fixture
def proxy(s3: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy before the S3 server; what connects from now on goes through it."""
    s3()
    with run_fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        yield running


def connect_quickly() -> Any:
    """A client that tries once."""
    return boto3.session.Session().client("s3", config=Config(retries={"total_max_attempts": 1}))


def open_through(uri: str, connect: Callable[[], Any] = connect_s3) -> S3Store:
    """A store with a client of its own: those of other tests go to the server itself."""
    store = open_store(uri)
    assert isinstance(store, S3Store)
    return S3Store(store.bucket, store.prefix, lambda: connect())


def only(fault: Fault, method: str, part: str, times: int = 1) -> Policy:
    """This fault for the first requests of the method to paths with this part in them."""

    def policy(request: Request) -> Fault | None:
        return fault if request.method == method and part in request.path and request.attempt < times else None

    return policy


# The proxy


def test_the_same_seed_gives_the_same_weather_and_the_shares_are_as_stated() -> None:
    requests = [Request("GET", f"/b/{number}", "", attempt) for number in range(5000) for attempt in range(2)]
    drawn = [STORM(request) for request in requests]
    assert drawn == [Weather(12, STORM.shares)(request) for request in requests]
    assert drawn != [Weather(8, STORM.shares)(request) for request in requests]
    for fault, share in STORM.shares.items():
        assert drawn.count(fault) / len(drawn) == pytest.approx(share, abs=0.02)


@pytest.mark.s3
@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault("SlowDown"), ClientError),
        (Fault("AccessDenied"), ClientError),
        (Fault("reset"), BotoCoreError),
        (Fault("truncated"), BotoCoreError),
        (Fault("flipped"), FlexibleChecksumError),
    ],
)
def test_a_fault_is_what_it_is_called(
    s3: Callable[[], str], proxy: FaultProxy, fault: Fault, expected: type[Exception]
) -> None:
    bucket = s3().removeprefix("s3://")
    client = connect_quickly()
    client.put_object(Bucket=bucket, Key="k", Body=b"0123456789")
    proxy.policy = only(fault, "GET", "/k")
    with pytest.raises(expected) as caught:
        client.get_object(Bucket=bucket, Key="k")["Body"].read()
    if isinstance(caught.value, ClientError):
        assert caught.value.response["Error"]["Code"] == fault.kind
    assert client.get_object(Bucket=bucket, Key="k")["Body"].read() == b"0123456789"
    assert proxy.done[fault.kind] == 1
    client.close()


@pytest.mark.s3
def test_a_lost_answer_is_to_a_request_that_was_carried_out(s3: Callable[[], str], proxy: FaultProxy) -> None:
    bucket = s3().removeprefix("s3://")
    client = connect_quickly()
    for kind, is_there in (("reset", False), ("lost", True)):
        proxy.policy = only(Fault(kind), "PUT", f"/{kind}")
        with pytest.raises(BotoCoreError):
            client.put_object(Bucket=bucket, Key=kind, Body=b"0")
        found = client.list_objects_v2(Bucket=bucket, Prefix=kind).get("Contents", [])
        assert bool(found) == is_there
    client.close()


@pytest.mark.s3
def test_what_is_held_waits_for_its_release_and_nothing_else_does(s3: Callable[[], str], proxy: FaultProxy) -> None:
    store = open_through(s3())
    proxy.hold("/held")
    with ThreadPoolExecutor() as pool:
        written = pool.submit(store.write_bytes, "held", b"0")
        store.write_bytes("other", b"0")
        assert [item.key for item in store.list_objects()] == ["other"]
        proxy.release()
        written.result()
    assert [item.key for item in store.list_objects()] == ["held", "other"]
    assert proxy.done["held"] == 1


# Reading


@pytest.mark.s3
@pytest.mark.parametrize("has_checksum", [True, False], ids=["checksums", "etags alone"])
def test_what_is_fetched_in_a_storm_is_what_was_stored(
    s3: Callable[[], str], proxy: FaultProxy, tmp_path: Path, has_checksum: bool
) -> None:
    """Without a checksum of the uploader's, as older tools leave objects, the ETag alone tells a flipped bit."""
    store = open_through(s3() + "/ct")
    setting = Config(request_checksum_calculation="when_supported" if has_checksum else "when_required")
    uploader = boto3.session.Session().client("s3", config=setting)
    for number in range(NUM_OBJECTS):
        uploader.put_object(Bucket=store.bucket, Key=f"ct/{number:03d}", Body=make_body(number))
    uploader.close()
    proxy.done.clear()
    proxy.policy = STORM
    items = list(store.list_objects())
    assert len(items) == NUM_OBJECTS
    transfer_all(lambda item: store.fetch(item, tmp_path / item.key), items)
    for number in range(NUM_OBJECTS):
        assert (tmp_path / f"{number:03d}").read_bytes() == make_body(number)
    assert proxy.done["flipped"] > 0
    assert proxy.done["truncated"] > 0
    assert proxy.done["SlowDown"] > NUM_OBJECTS * 0.1


def make_body(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest() * 500


@pytest.mark.s3
def test_a_listing_that_is_cut_is_not_a_shorter_archive(s3: Callable[[], str], proxy: FaultProxy) -> None:
    store = open_through(s3())
    for number in range(20):
        store.write_bytes(str(number), b"")
    proxy.policy = only(Fault("truncated"), "GET", store.bucket, times=2)
    assert len(list(store.list_objects())) == 20
    assert proxy.done["truncated"] == 2


@pytest.mark.s3
def test_a_refusal_whose_text_is_cut_is_asked_for_again(
    s3: Callable[[], str], proxy: FaultProxy, tmp_path: Path
) -> None:
    store = open_through(s3())
    store.write_bytes("a", b"0")
    (item,) = store.list_objects()
    store.write_bytes("a", b"1")
    proxy.policy = only(Fault("truncated"), "GET", "/", times=1)
    with pytest.raises(ObjectMissing):
        store.read_bytes("b")
    with pytest.raises(ScanError) as caught:
        store.fetch(item, tmp_path / "a")
    assert caught.value.status is Status.ERR_INPUT_CHANGED
    assert proxy.done["truncated"] == 2
    proxy.policy = lambda _: Fault("truncated")
    with pytest.raises(StorageError, match="ResponseStreamingError"):
        store.read_bytes("b")
    assert proxy.done["truncated"] == 2 + 3


@pytest.mark.s3
@pytest.mark.parametrize("kind", ["AccessDenied", "InvalidObjectState"])
def test_an_object_that_is_refused_or_archived_spoils_no_other(
    s3: Callable[[], str], proxy: FaultProxy, tmp_path: Path, kind: str
) -> None:
    store = open_through(s3())
    for name in ("a", "b"):
        store.write_bytes(name, b"0")
    refused, other = store.list_objects()
    proxy.policy = only(Fault(kind), "GET", "/a", times=99)
    with pytest.raises(ScanError) as caught:
        store.fetch(refused, tmp_path / "a")
    assert caught.value.status.startswith("ERR_")
    store.fetch(other, tmp_path / "b")


@pytest.mark.s3
@pytest.mark.parametrize("kind", ["ExpiredToken", "RequestTimeTooSkewed"])
def test_who_is_no_longer_let_in_stops(s3: Callable[[], str], proxy: FaultProxy, tmp_path: Path, kind: str) -> None:
    store = open_through(s3())
    store.write_bytes("a", b"0")
    (item,) = store.list_objects()
    proxy.policy = lambda _: Fault(kind)
    for attempt in (lambda: store.fetch(item, tmp_path / "a"), lambda: store.put_if_absent("b", b"")):
        with pytest.raises(CredentialsError):
            attempt()


# Publishing


def stage_run(store: S3Store, num_sources: int) -> tuple[RunFolder, Any]:
    """A run that is planned and staged as the driver does it, read back."""
    keys = [f"s{number}" for number in range(num_sources)]
    folder = begin_run(store, *map(make_source, keys))
    for key in keys:
        folder.write_part(key, [make_row(key, run_id=folder.run_id)])
    rows = folder.read_parts()
    check_rows(folder.list_planned_sources(), rows, ORIGIN)
    return folder, rows


@pytest.mark.s3
def test_a_run_planned_staged_and_published_in_a_storm_is_whole(s3: Callable[[], str], proxy: FaultProxy) -> None:
    store = open_through(s3() + "/results")
    proxy.policy = STORM
    folder, rows = stage_run(store, 12)
    assert publish(store, folder.run_id, rows, make_listing(0), ORIGIN) == 1
    assert publish(store, folder.run_id, rows, make_listing(0), ORIGIN) == 1
    proxy.policy = lambda _: None
    digests, faults = check_table(store)
    assert (len(digests), faults) == (1, [])
    assert folder.read_parts().num_rows == 12


@pytest.mark.s3
@pytest.mark.parametrize(
    ("kind", "times"), [("lost", 1), ("lost", 7), ("reset", 7), ("ConditionalRequestConflict", 2), ("InternalError", 7)]
)
def test_a_put_without_a_clear_answer_publishes_once(
    s3: Callable[[], str], proxy: FaultProxy, kind: str, times: int
) -> None:
    """Seven times: boto3's five and more, so that the put itself is uncertain."""
    store = open_through(s3())
    folder, rows = stage_run(store, 1)
    proxy.policy = only(Fault(kind), "PUT", "/predictions/", times)
    assert publish(store, folder.run_id, rows, make_listing(0), ORIGIN, pause=lambda _: None) == 1
    assert [item.key for item in store.list_objects("predictions/")] == ["predictions/c00000001.parquet"]
    assert proxy.done[kind] >= min(times, 5 if kind == "lost" else times)


@pytest.mark.s3
def test_a_store_that_never_answers_is_a_storage_error(s3: Callable[[], str], proxy: FaultProxy) -> None:
    store = open_through(s3(), connect_quickly)
    folder, rows = stage_run(store, 1)
    proxy.policy = lambda _: Fault("reset")
    with pytest.raises(StorageError):
        publish(store, folder.run_id, rows, make_listing(0), ORIGIN, pause=lambda _: None)


# What is damaged on its way to the store


WAYS_OF_PUTTING = ["write_bytes", "put_if_absent"]
NO_CHECKSUMS = ("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")


@pytest.mark.s3
@pytest.mark.parametrize("put", WAYS_OF_PUTTING)
@pytest.mark.parametrize("kind", ["flipped_upload", "cut_upload", "BadDigest"])
def test_what_lies_in_the_store_is_what_was_sent(
    s3: Callable[[], str], proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, put: str, kind: str
) -> None:
    """The server of these tests looks at no checksum; one that does answers BadDigest."""
    monkeypatch.setenv(*NO_CHECKSUMS)
    store = open_through(s3())
    proxy.policy = only(Fault(kind), "PUT", "/k", 2)
    assert getattr(store, put)("k", make_body(0)) in (None, True)
    assert store.read_bytes("k") == make_body(0)
    assert proxy.done[kind] == 2


@pytest.mark.s3
@pytest.mark.parametrize("put", WAYS_OF_PUTTING)
def test_what_cannot_be_put_undamaged_is_a_storage_error(s3: Callable[[], str], proxy: FaultProxy, put: str) -> None:
    store = open_through(s3())
    for kind, told in (
        ("flipped_upload", r"/flipped_upload: other bytes lie there.*delete"),
        ("BadDigest", "BadDigest"),
    ):
        proxy.policy = only(Fault(kind), "PUT", "/", 99)
        with pytest.raises(StorageError, match=told):
            getattr(store, put)(kind, make_body(0))
    assert [item.key for item in store.list_objects()] == ["flipped_upload"]


@pytest.mark.s3
@pytest.mark.parametrize("kind", ["AccessDenied", "reset"])
def test_a_damaged_object_that_is_not_replaced_is_a_storage_error(
    s3: Callable[[], str], proxy: FaultProxy, kind: str
) -> None:
    """Not an uncertain put, whose holder would be asked for: it is ours. Denied is what demands put-if-absent."""
    store = open_through(s3(), connect_quickly)
    faults = [Fault("flipped_upload"), Fault(kind)]
    proxy.policy = lambda request: faults[min(request.attempt, 1)] if request.method == "PUT" else None
    with pytest.raises(StorageError, match="/k: other bytes lie there"):
        store.put_if_absent("k", make_body(0))


@pytest.mark.s3
def test_a_damaged_object_was_replaced_though_the_answer_is_lost(s3: Callable[[], str], proxy: FaultProxy) -> None:
    """boto3 asks again, and is refused, as what it would replace is gone."""
    store = open_through(s3())
    faults = [Fault("flipped_upload"), Fault("lost"), None]
    proxy.policy = lambda request: faults[min(request.attempt, 2)] if request.method == "PUT" else None
    assert store.put_if_absent("k", make_body(0))
    assert proxy.done["lost"] == 1
    assert store.read_bytes("k") == make_body(0)


@pytest.mark.s3
@pytest.mark.parametrize("kind", ["flipped_upload", "cut_upload"])
def test_a_run_of_which_every_object_is_damaged_on_its_way_is_whole(
    s3: Callable[[], str], proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv(*NO_CHECKSUMS)
    store = open_through(s3() + "/results")
    proxy.policy = only(Fault(kind), "PUT", "/results/")
    folder, rows = stage_run(store, 3)
    assert publish(store, folder.run_id, rows, make_listing(0), ORIGIN) == 1
    assert proxy.done[kind] == 6  # the run's record, its plan, three parts, a night
    digests, faults = check_table(store)
    assert (len(digests), faults) == (1, [])


# A full disk


def test_a_full_disk_is_a_storage_error_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    """The disk: a file system of 64 KiB in memory."""
    with contextlib.ExitStack() as stack:
        try:
            disk = stack.enter_context(mount_small_disk(tmp_path / "disk", 64))
        except MountRefused as refused:
            pytest.skip(str(refused))
        store = open_store(str(disk / "results"), create=True)
        store.write_bytes("a", b"0")
        for write in (store.write_bytes, store.put_if_absent):
            with pytest.raises(StorageError, match=r"No space left on device.*space"):
                write("predictions/c00000001.parquet", bytes(1 << 17))
        assert [path.name for path in disk.rglob("*") if path.is_file()] == ["a"]
        assert store.put_if_absent("predictions/c00000001.parquet", bytes(1 << 10))
