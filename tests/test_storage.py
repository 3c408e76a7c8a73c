"""Local folders and S3 behave alike, and what goes wrong has a name."""

import io
import os
import pickle
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3.session
import pytest
from botocore.config import Config
from botocore.exceptions import ReadTimeoutError
from botocore.response import StreamingBody
from botocore.stub import ANY, Stubber
from botocore.utils import parse_timestamp

from darnet.errors import (
    CredentialsError,
    FolderMissing,
    ObjectMissing,
    PutUncertain,
    ScanError,
    Status,
    StorageError,
    UsageError,
)
from darnet.scan import StoredObject
from darnet.storage import Store, open_store, read_file, transfer_all
from darnet.storage_local import LocalStore
from darnet.storage_s3 import BODY_PAUSES_S, TRANSFERS, S3Endpoint, S3Store, _parse_time, find_s3_endpoint
from tests.object_server import Answer, serve_objects

TRICKY_KEYS = ["a-b/c", "a.b", "a/b", "a/c.d", "a/c/d", "a0", "a b/ü+%20&.dcm", "A", "z", "é/x", "日本/1", "\U0001f600"]


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store, once of each kind, rooted below the top."""
    if request.param == "local":
        return open_store(str(tmp_path / "root" / "deep"), create=True)
    return open_store(request.getfixturevalue("s3")() + "/root/deep")


def list_keys(store: Store, prefix: str = "") -> list[str]:
    return [item.key for item in store.list_objects(prefix)]


# One file that a person named


def test_a_named_file_is_read_wherever_it_lies(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write_bytes("in/t.csv", b"1")
    assert read_file(f"{store.uri}/in/t.csv", "table") == ("t.csv", b"1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_bytes(b"2")
    assert read_file("t.csv", "table") == read_file("./t.csv", "table") == ("t.csv", b"2")


def test_a_name_without_a_file_is_wrong_use_and_says_what_was_wanted(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write_bytes("in/t.csv", b"1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unlikely-name.csv").touch()
    for uri in (f"{store.uri}/in/other.csv", f"{store.uri}/in", "/unlikely-name.csv"):
        with pytest.raises(UsageError, match=f"{uri}: no such file; name a cohort table"):
            read_file(uri, "cohort table")
    with pytest.raises(UsageError):
        read_file(f"{tmp_path}/", "cohort table")


# Where S3 is, for libraries that do not ask boto3

PROFILE_ENDPOINT = "[profile own]\nregion = eu-west-1\nendpoint_url = http://ceph:8080\n"
SERVICE_ENDPOINT = """[profile own]
services = ours
ca_bundle = /etc/ours.pem
s3 =
  addressing_style = virtual
[services ours]
s3 =
  endpoint_url = https://minio.example
"""


@pytest.mark.parametrize(
    ("config", "variables", "expected"),
    [
        ("", {}, None),
        ("[profile own]\nregion = eu-west-1\n", {}, None),
        (PROFILE_ENDPOINT, {}, S3Endpoint("http://ceph:8080", "eu-west-1", False, None)),
        (SERVICE_ENDPOINT, {}, S3Endpoint("https://minio.example", "us-east-1", True, "/etc/ours.pem")),
        ("", {"AWS_ENDPOINT_URL": "http://env:1"}, S3Endpoint("http://env:1", "us-east-1", False, None)),
        (
            PROFILE_ENDPOINT,
            {"AWS_ENDPOINT_URL_S3": "http://env:1"},
            S3Endpoint("http://env:1", "eu-west-1", False, None),
        ),
    ],
)
def test_the_endpoint_is_found_wherever_boto3_finds_it(
    config: str,
    variables: dict[str, str],
    expected: S3Endpoint | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION", "AWS_REGION", "AWS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "config").write_text(config or "[profile own]\n")
    settings = {"AWS_CONFIG_FILE": str(tmp_path / "config"), "AWS_PROFILE": "own", **variables}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert find_s3_endpoint() == expected


# Both stores


def test_written_bytes_come_back(store: Store) -> None:
    store.write_bytes("a/b", b"first")
    store.write_bytes("a/b", b"second")
    assert store.read_bytes("a/b") == b"second"
    assert list_keys(store) == ["a/b"]


def test_listing_is_in_the_order_of_utf8_bytes(store: Store) -> None:
    for key in random.Random(0).sample(TRICKY_KEYS, len(TRICKY_KEYS)):
        store.write_bytes(key, key.encode())
    assert list_keys(store) == sorted(TRICKY_KEYS, key=str.encode)
    assert [store.read_bytes(key).decode() for key in list_keys(store)] == list_keys(store)


@pytest.mark.parametrize("prefix", ["", "a", "a/", "a/c", "a/c/", "a/c/d", "a/c/d/", "é", "nothing"])
def test_prefix_selects_by_the_start_of_the_key(store: Store, prefix: str) -> None:
    for key in TRICKY_KEYS:
        store.write_bytes(key, b"")
    assert list_keys(store, prefix) == sorted(key for key in TRICKY_KEYS if key.startswith(prefix))


def test_a_child_sees_only_what_is_below_it(store: Store) -> None:
    store.write_bytes("a/b", b"in")
    store.write_bytes("ab", b"beside")
    child = store.child("a/")
    assert list_keys(child) == ["b"]
    assert child.read_bytes("b") == b"in"
    assert child.uri == store.uri + "/a"


def test_put_if_absent_creates_once(store: Store) -> None:
    assert store.put_if_absent("slot", b"first")
    assert not store.put_if_absent("slot", b"second")
    assert store.read_bytes("slot") == b"first"
    assert list_keys(store) == ["slot"]


def test_a_file_is_put_like_bytes(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 3_000_000)
    assert store.put_if_absent("a/1", tmp_path / "file")
    assert not store.put_if_absent("a/1", tmp_path / "file")
    assert store.read_bytes("a/1") == b"x" * 3_000_000


def test_parts_of_an_object_are_read_as_of_a_file(store: Store) -> None:
    data = random.Random(0).randbytes(5000)
    store.write_bytes("a/1", data)
    (item,) = store.list_objects()
    reader = store.open_range_reader(item)
    for seek, whence, size in ((0, 0, 10), (-8, 2, 8), (-8, 2, 100), (17, 0, 0), (4000, 0, -1), (-900, 1, 5)):
        expected = io.BytesIO(data)
        expected.seek(reader.tell())
        assert reader.seek(seek, whence) == expected.seek(seek, whence)
        assert reader.read(size) == expected.read(size)
        assert reader.tell() == expected.tell()
    reader.seek(6000)
    assert reader.read(5) == b""
    reader.close()


def test_a_missing_object_has_no_parts(store: Store) -> None:
    store.write_bytes("a/1", b"1")
    (item,) = store.list_objects()
    store.delete("a/1")
    with pytest.raises(ObjectMissing):
        store.open_range_reader(item).read()


@pytest.mark.s3
def test_listed_times_are_those_of_botocore(s3: Callable[[], str]) -> None:
    store = open_store(s3())
    assert isinstance(store, S3Store)
    store.write_bytes("a", b"1")
    (item,) = store.list_objects()
    plain = boto3.session.Session().client("s3").list_objects_v2(Bucket=store.bucket)["Contents"][0]
    assert item.modified_s == plain["LastModified"].timestamp()


@pytest.mark.parametrize("value", ["2026-01-01T02:03:04.567Z", "Thu, 01 Jan 2026 02:03:04 GMT", "1767232984"])
def test_other_spellings_of_times_are_read_too(value: str) -> None:
    assert _parse_time(value).timestamp() == parse_timestamp(value).timestamp()


def test_a_store_tells_its_own_time_and_keeps_nothing_of_it(store: Store) -> None:
    store.write_bytes("a", b"")
    told = store.read_clock()
    store.write_bytes("b", b"")
    first, second = store.list_objects()  # a bucket's clock shows whole seconds
    assert int(first.modified_s) <= told.timestamp() <= second.modified_s
    assert told.tzinfo is not None


@pytest.mark.parametrize("headers", [{"date": "Tue, 01 Jan 2030 00:00:05 GMT"}, {}])
def test_the_time_of_a_bucket_is_that_of_its_answer(headers: dict[str, str]) -> None:
    client = connect_stub()
    stub = Stubber(client)
    answer = {"KeyCount": 0, "ResponseMetadata": {"HTTPStatusCode": 200, "HTTPHeaders": headers}}
    stub.add_response("list_objects_v2", answer, {"Bucket": "bucket", "Prefix": "top/", "MaxKeys": 1})
    stub.activate()
    store = S3Store("bucket", "top/", lambda: client)
    if headers:
        assert store.read_clock() == datetime(2030, 1, 1, 0, 0, 5, tzinfo=UTC)
        return
    with pytest.raises(StorageError, match="have no date"):
        store.read_clock()


def test_one_of_many_racing_puts_wins(store: Store) -> None:
    barrier = threading.Barrier(8)
    won: list[int] = []

    def put(number: int) -> None:
        barrier.wait()
        if store.put_if_absent("slot", str(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=put, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [int(store.read_bytes("slot"))] == won


def test_missing_object_is_named(store: Store) -> None:
    with pytest.raises(ObjectMissing, match="deep/a/b"):
        store.read_bytes("a/b")


def test_deleting_is_idempotent(store: Store) -> None:
    store.write_bytes("a", b"")
    store.delete("a")
    store.delete("a")
    assert list_keys(store) == []


def test_fetch_copies_the_listed_object(store: Store, tmp_path: Path) -> None:
    data = bytes(range(256)) * 9000
    store.write_bytes("a b/ü", data)
    (item,) = store.list_objects()
    assert item.num_bytes == len(data)
    assert item.modified_s > 1.7e9
    store.fetch(item, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data


def test_fetch_tells_a_deleted_object(store: Store, tmp_path: Path) -> None:
    store.write_bytes("a", b"1")
    (item,) = store.list_objects()
    store.delete("a")
    with pytest.raises(ScanError) as caught:
        store.fetch(item, tmp_path / "copy")
    assert caught.value.status is Status.ERR_GONE


@pytest.mark.parametrize("replacement", [b"2", b"longer"])
def test_fetch_tells_a_replaced_object(store: Store, tmp_path: Path, replacement: bytes) -> None:
    store.write_bytes("a", b"1")
    (item,) = store.list_objects()
    store.write_bytes("a", replacement)
    with pytest.raises(ScanError) as caught:
        store.fetch(item, tmp_path / "copy")
    assert caught.value.status is Status.ERR_INPUT_CHANGED


def test_a_store_travels_to_another_process(store: Store) -> None:
    store.write_bytes("a", b"1")
    copy: Store = pickle.loads(pickle.dumps(store))
    assert copy == store
    assert copy.read_bytes("a") == b"1"


def test_local_path_is_known_for_a_disk_only(tmp_path: Path) -> None:
    assert LocalStore(tmp_path).local_path("a/b") == tmp_path / "a" / "b"
    assert S3Store("bucket").local_path("a/b") is None


@pytest.mark.s3
@pytest.mark.slow
def test_listing_goes_on_after_a_thousand_keys(s3: Callable[[], str]) -> None:
    store = open_store(s3())
    keys = [f"{number:04d}" for number in range(1005)]
    for key in keys:
        store.write_bytes(key, b"")
    assert list_keys(store) == keys


@pytest.mark.s3
def test_keys_that_no_disk_could_hold_are_listed(s3: Callable[[], str]) -> None:
    store = open_store(s3() + "/top")
    for key in ("a", "a/", "a/b", "a//b", "a/../b"):
        store.write_bytes(key, b"")
    store.write_bytes("", b"")  # the marker a console leaves for the folder itself
    assert list_keys(store) == ["a", "a/", "a/../b", "a//b", "a/b"]


@pytest.mark.s3
def test_a_missing_bucket_is_named(s3: Callable[[], str]) -> None:
    store = open_store(s3() + "-missing/top")
    with pytest.raises(UsageError, match=r"s3://bucket-\d+-missing/top: no such bucket"):
        list_keys(store)
    with pytest.raises(UsageError, match="no such bucket"):
        store.put_if_absent("a", b"")


# Addresses


@pytest.mark.parametrize(
    ("uri", "bucket", "prefix"),
    [("s3://b", "b", ""), ("s3://b/", "b", ""), ("s3://b/p/q", "b", "p/q/"), ("s3://b/p/", "b", "p/")],
)
def test_s3_addresses(uri: str, bucket: str, prefix: str) -> None:
    store = open_store(uri)
    assert isinstance(store, S3Store)
    assert (store.bucket, store.prefix) == (bucket, prefix)
    assert store.uri == uri.rstrip("/")


@pytest.mark.parametrize("uri", ["", "s3://", "s3:///p", "s3:/b/p", "gs://b/p", "https://b/p", "file:///tmp"])
def test_unknown_addresses_are_wrong_use(uri: str) -> None:
    with pytest.raises(UsageError, match="folder or s3://"):
        open_store(uri)


def test_a_relative_folder_means_the_same_in_another_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store("here", create=True)
    store.write_bytes("a", b"1")
    monkeypatch.chdir("/")
    assert store.read_bytes("a") == b"1"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FolderMissing, match="absent: no such folder"):
        list_keys(open_store(str(tmp_path / "absent")))


def test_a_file_is_not_an_archive(tmp_path: Path) -> None:
    (tmp_path / "scan.nii").write_bytes(b"")
    with pytest.raises(UsageError, match="a file, not a folder"):
        list_keys(open_store(str(tmp_path / "scan.nii")))


# S3 answers that no test server gives: a real client whose network is botocore's own stub


def connect_stub(**settings: Any) -> Any:
    """A client that cannot reach anything by itself."""
    return boto3.session.Session().client(
        "s3",
        region_name="us-east-1",
        endpoint_url="http://127.0.0.1:9",
        aws_access_key_id="test",
        aws_secret_access_key="test",
        config=Config(retries={"total_max_attempts": 1}, **settings),
    )


def answer_with_error(method: str, code: str, status: int) -> S3Store:
    client = connect_stub()
    stub = Stubber(client)
    stub.add_client_error(method, service_error_code=code, http_status_code=status)
    stub.activate()
    return S3Store("bucket", "top/", lambda: client)


@pytest.mark.parametrize(
    ("code", "status", "expected"),
    [
        ("AccessDenied", 403, CredentialsError),
        ("InvalidAccessKeyId", 403, CredentialsError),
        ("SignatureDoesNotMatch", 403, CredentialsError),
        ("ExpiredToken", 400, CredentialsError),
        ("NoSuchBucket", 404, UsageError),
        ("SlowDown", 503, StorageError),
        ("InvalidBucketName", 400, UsageError),
    ],
)
def test_refused_listings_have_the_right_name(code: str, status: int, expected: type[Exception]) -> None:
    with pytest.raises(expected, match="s3://bucket/top: "):
        list_keys(answer_with_error("list_objects_v2", code, status))


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("ConditionalRequestConflict", 409),
        ("InternalError", 500),
        ("ServiceUnavailable", 503),
        ("RequestTimeout", 400),
    ],
)
def test_an_ambiguous_answer_to_a_put_is_uncertain(code: str, status: int) -> None:
    with pytest.raises(PutUncertain, match=code):
        answer_with_error("put_object", code, status).put_if_absent("slot", b"")


@pytest.mark.parametrize(
    ("code", "status", "expected"),
    [
        ("AccessDenied", 403, CredentialsError),
        ("NoSuchBucket", 404, UsageError),
        ("NotImplemented", 501, StorageError),
    ],
)
def test_a_clear_refusal_of_a_put_is_not_uncertain(code: str, status: int, expected: type[Exception]) -> None:
    with pytest.raises(expected) as caught:
        answer_with_error("put_object", code, status).put_if_absent("slot", b"")
    assert not isinstance(caught.value, PutUncertain)


def refuse_to_read(listed: list[str] | None) -> tuple[S3Store, Stubber]:
    """S3's answers about `top/a` to a role that may list its prefix alone: 403 of what is not there as of what it may
    not read, then what is listed, or that it may not list either.
    """
    client = connect_stub()
    stub = Stubber(client)
    stub.add_client_error("get_object", service_error_code="AccessDenied", http_status_code=403)
    if listed is None:
        stub.add_client_error("list_objects_v2", service_error_code="AccessDenied", http_status_code=403)
    else:
        found = [{"Key": key, "Size": 1, "ETag": '"e"', "LastModified": datetime.now(UTC)} for key in listed]
        stub.add_response("list_objects_v2", {"Contents": found}, {"Bucket": "bucket", "Prefix": "top/a"})
    stub.activate()
    return S3Store("bucket", "top/", lambda: client), stub


PLANNED = StoredObject("a", 8, "tag")


@pytest.mark.parametrize(
    "read", [lambda store: store.read_bytes("a"), lambda store: store.open_range_reader(PLANNED).read()]
)
@pytest.mark.parametrize(
    ("listed", "expected"),
    [(["top/a2"], ObjectMissing), (["top/a", "top/a2"], CredentialsError), (None, CredentialsError)],
)
def test_what_is_missing_is_so_for_a_role_that_may_list_its_prefix_alone(
    listed: list[str] | None, expected: type[Exception], read: Callable[[Store], bytes]
) -> None:
    store, stub = refuse_to_read(listed)
    with pytest.raises(expected, match="s3://bucket/top/a: "):
        read(store)
    stub.assert_no_pending_responses()


@pytest.mark.parametrize(
    "fetch",
    [
        lambda store, path: store.fetch(PLANNED, path),
        lambda store, path: store.fetch_span(PLANNED, path, range(4, 6)),
    ],
)
@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ([], Status.ERR_GONE),
        (["top/a2"], Status.ERR_GONE),
        (["top/a", "top/a2"], Status.ERR_DENIED),
        (None, Status.ERR_DENIED),
    ],
)
def test_a_scan_deleted_since_the_plan_is_gone_and_not_denied_for_such_a_role(
    listed: list[str] | None, expected: Status, fetch: Callable[[Store, Path], object], tmp_path: Path
) -> None:
    store, stub = refuse_to_read(listed)
    with pytest.raises(ScanError) as caught:
        fetch(store, tmp_path / "copy")
    assert caught.value.status is expected
    stub.assert_no_pending_responses()


def test_an_unreachable_store_is_a_storage_error() -> None:
    store = S3Store("bucket", "", connect_stub)
    with pytest.raises(StorageError, match="cannot reach the store"):
        list_keys(store)
    with pytest.raises(PutUncertain):
        store.put_if_absent("slot", b"")


def test_no_credentials_is_a_credentials_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "absent"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    client = boto3.session.Session().client("s3", region_name="us-east-1")
    with pytest.raises(CredentialsError, match="s3://bucket: the store does not let us in"):
        list_keys(S3Store("bucket", "", lambda: client))


@pytest.mark.parametrize(
    ("code", "status", "expected"),
    [
        ("NoSuchKey", 404, Status.ERR_GONE),
        ("PreconditionFailed", 412, Status.ERR_INPUT_CHANGED),
        ("AccessDenied", 403, Status.ERR_DENIED),
        ("InvalidObjectState", 403, Status.ERR_ARCHIVED),
        ("SlowDown", 503, Status.ERR_STORAGE),
    ],
)
def test_trouble_with_one_object_concerns_one_scan(code: str, status: int, expected: Status, tmp_path: Path) -> None:
    with pytest.raises(ScanError) as caught:
        answer_with_error("get_object", code, status).fetch(StoredObject("a", 1, "tag"), tmp_path / "copy")
    assert caught.value.status is expected


@pytest.mark.parametrize(
    ("code", "status", "remedy"),
    [
        ("ExpiredToken", 400, "AWS_ACCESS_KEY_ID"),
        ("Unauthorized", 401, "AWS_ACCESS_KEY_ID"),
        ("RequestTimeTooSkewed", 403, f"set the clock of {os.uname().nodename}"),
    ],
)
def test_what_refuses_every_request_stops_the_job_instead_of_failing_every_scan(
    code: str, status: int, remedy: str, tmp_path: Path
) -> None:
    with pytest.raises(CredentialsError, match=remedy):
        answer_with_error("get_object", code, status).fetch(StoredObject("a", 1, "tag"), tmp_path / "copy")


class BreakingBody(io.BytesIO):
    """A response whose connection dies after the first bytes."""

    def read(self, size: int | None = None) -> bytes:
        if self.tell() > 0:
            raise ReadTimeoutError(endpoint_url="http://127.0.0.1:9")
        return super().read(min(size or 4, 4))


def answer_with_bodies(*bodies: io.BytesIO) -> S3Store:
    client = connect_stub()
    stub = Stubber(client)
    for body in bodies:
        response = {"Body": StreamingBody(body, len(body.getvalue()))}
        stub.add_response("get_object", response, {"Bucket": "bucket", "Key": "a", "IfMatch": ANY})
    stub.activate()
    return S3Store("bucket", "", lambda: client)


def test_a_broken_transfer_starts_again(tmp_path: Path) -> None:
    store = answer_with_bodies(BreakingBody(b"01234567"), io.BytesIO(b"01234567"))
    store.fetch(StoredObject("a", 8, "tag"), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"01234567"


def test_a_transfer_that_keeps_breaking_is_a_storage_row(tmp_path: Path) -> None:
    store = answer_with_bodies(*[BreakingBody(b"01234567") for _ in range(3)])
    started_s = time.monotonic()
    with pytest.raises(ScanError) as caught:
        store.fetch(StoredObject("a", 8, "tag"), tmp_path / "copy")
    assert caught.value.status is Status.ERR_STORAGE
    assert time.monotonic() - started_s >= sum(BODY_PAUSES_S)  # a connection that breaks is given time to come back


def test_an_answer_without_a_length_that_ends_early_is_a_storage_row(tmp_path: Path) -> None:
    client = connect_stub()
    stub = Stubber(client)
    response = {"Body": StreamingBody(io.BytesIO(b"0123"), None), "ETag": '"tag"'}
    stub.add_response("get_object", response, {"Bucket": "bucket", "Key": "a", "IfMatch": ANY})
    stub.activate()
    with pytest.raises(ScanError, match="4 of 8 bytes came") as caught:
        S3Store("bucket", "", lambda: client).fetch(StoredObject("a", 8, "tag"), tmp_path / "copy")
    assert caught.value.status is Status.ERR_STORAGE


# A server that does not keep its word


def fetch_from(answers: list[Answer], path: Path) -> None:
    """Fetch an object listed with 8 bytes and the tag `tag`; each GET takes the next answer."""
    with serve_objects(lambda _: answers.pop(0)) as connect:
        S3Store("bucket", "", connect).fetch(StoredObject("a", 8, "tag"), path)


@pytest.mark.s3
def test_a_body_shorter_than_declared_is_fetched_again(tmp_path: Path) -> None:
    fetch_from([Answer(b"0123", 8), Answer(b"01234567", 8)], tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"01234567"


@pytest.mark.s3
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (Answer(b"0123", 8), Status.ERR_STORAGE),  # cut, and cut again
        (Answer(b"0123", 4), Status.ERR_INPUT_CHANGED),  # whole, of another length than listed
        (Answer(b"0123456789", 10), Status.ERR_INPUT_CHANGED),
        (Answer(b"76543210", 8, tag="other"), Status.ERR_INPUT_CHANGED),  # If-Match ignored
    ],
)
def test_what_is_not_the_listed_object_is_no_scan(answer: Answer, expected: Status, tmp_path: Path) -> None:
    with pytest.raises(ScanError) as caught:
        fetch_from([answer] * 3, tmp_path / "copy")
    assert caught.value.status is expected


FIRST, OTHER = b"01234567", b"01234566"  # a bit apart
MD5 = "2e9ec317e197819358fbc43afca7d837"  # of the first; echo -n 01234567 | md5sum


@pytest.mark.s3
def test_a_body_with_a_flipped_bit_is_fetched_again(tmp_path: Path) -> None:
    answers = [Answer(OTHER, 8, tag=MD5), Answer(FIRST, 8, tag=MD5)]
    with serve_objects(lambda _: answers.pop(0)) as connect:
        S3Store("bucket", "", connect).fetch(StoredObject("a", 8, MD5), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == FIRST


@pytest.mark.s3
def test_a_body_that_stays_flipped_is_no_scan_and_no_object(tmp_path: Path) -> None:
    with serve_objects(lambda _: Answer(OTHER, 8, tag=MD5)) as connect:
        store = S3Store("bucket", "", connect)
        with pytest.raises(ScanError) as caught:
            store.fetch(StoredObject("a", 8, MD5), tmp_path / "copy")
        assert caught.value.status is Status.ERR_STORAGE
        with pytest.raises(StorageError, match="bucket/a: the store failed"):
            store.read_bytes("a")


@pytest.mark.s3
@pytest.mark.parametrize(
    ("tag", "bucket", "headers"),
    [
        (f"{MD5}-1", "bucket", {}),  # uploaded in parts
        (MD5, "bucket", {"x-amz-server-side-encryption": "aws:kms"}),
        (MD5, "bucket", {"x-amz-server-side-encryption-customer-algorithm": "AES256"}),
        (MD5, "bucket--use1-az4--x-s3", {}),
    ],
)
def test_a_tag_that_is_no_md5_condemns_nothing(
    tag: str, bucket: str, headers: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_S3_DISABLE_EXPRESS_SESSION_AUTH", "true")
    with serve_objects(lambda _: Answer(OTHER, 8, tag=tag, headers=headers)) as connect:
        S3Store(bucket, "", connect).fetch(StoredObject("a", 8, tag), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == OTHER


# Spans


def test_a_span_goes_to_its_place(store: Store, tmp_path: Path) -> None:
    """A disk may give the whole object, a bucket gives what it is asked for."""
    data = random.Random(0).randbytes(5000)
    store.write_bytes("a", data)
    (item,) = store.list_objects()
    given = [store.fetch_span(item, tmp_path / "copy", span) for span in (range(100), range(4900, 5000))]
    expected = data if store.local_path("a") else data[:100] + bytes(4800) + data[4900:]
    assert given == [store.local_path("a") is not None] * 2
    assert (tmp_path / "copy").read_bytes() == expected


@pytest.mark.parametrize("change", ["deleted", "replaced", "replaced by a shorter one"])
def test_a_span_of_another_object_is_no_span_of_the_listed_one(store: Store, tmp_path: Path, change: str) -> None:
    store.write_bytes("a", b"01234567")
    (item,) = store.list_objects()
    if change == "deleted":
        store.delete("a")
    else:
        store.write_bytes("a", b"76543210" if change == "replaced" else b"0")
    with pytest.raises(ScanError) as caught:
        store.fetch_span(item, tmp_path / "copy", range(4, 8))
    assert caught.value.status is (Status.ERR_GONE if change == "deleted" else Status.ERR_INPUT_CHANGED)


def fetch_span_from(answers: list[Answer], path: Path) -> bool:
    """Fetch bytes 4 and 5 of an object listed with 8 bytes and their MD5; each GET takes the next answer."""
    with serve_objects(lambda _: answers.pop(0)) as connect:
        return S3Store("bucket", "", connect).fetch_span(StoredObject("a", 8, MD5), path, range(4, 6))


WHOLE = Answer(FIRST, 8, tag=MD5)
SPAN = Answer(FIRST, 8, tag=MD5, heeds=("Range",))


@pytest.mark.s3
@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([SPAN], b"\0\0\0\x0045\0\0"),
        ([WHOLE], FIRST),  # Range ignored
        ([Answer(OTHER, 8, tag=MD5), WHOLE], FIRST),  # the same, with a wrong bit
        ([replace(SPAN, headers={"Content-Range": "bytes 0-1/8"}), WHOLE], FIRST),  # other bytes
        ([replace(SPAN, headers={"Content-Range": "bytes 4-5/*"}), WHOLE], FIRST),
        ([Answer(b"0123", 4, tag=MD5, heeds=("Range",)), WHOLE], FIRST),  # no such bytes
        ([replace(SPAN, headers={"x-amz-checksum-crc32": "AAAAAA=="})] * 3 + [WHOLE], FIRST),  # a whole's checksum
    ],
)
def test_what_is_no_span_is_asked_for_whole(answers: list[Answer], expected: bytes, tmp_path: Path) -> None:
    left = list(answers)
    assert fetch_span_from(left, tmp_path / "copy") == (expected == FIRST)
    assert left == []
    assert (tmp_path / "copy").read_bytes() == expected


@pytest.mark.s3
@pytest.mark.parametrize(
    "answers",
    [
        [replace(SPAN, tag="other")],
        [Answer(FIRST + b"8", 9, tag=MD5, heeds=("Range",))],
        [Answer(b"0123", 4, tag="other", heeds=("Range",)), Answer(b"0123", 4, tag="other")],
        [Answer(b"0123", 4, tag="other")],
    ],
)
def test_a_span_of_what_was_not_listed_is_no_scan(answers: list[Answer], tmp_path: Path) -> None:
    """Though the store ignores If-Match."""
    with pytest.raises(ScanError) as caught:
        fetch_span_from(list(answers), tmp_path / "copy")
    assert caught.value.status is Status.ERR_INPUT_CHANGED


@pytest.mark.s3
@pytest.mark.parametrize(
    ("answers", "num_requests"),
    [
        ([SPAN, SPAN, SPAN], 3),
        ([WHOLE], 1),  # Range ignored: the object is kept
        ([SPAN, WHOLE], 2),
        ([replace(SPAN, headers={"Content-Range": "bytes 0-1/8"}), WHOLE], 2),  # other bytes
        ([replace(SPAN, headers={"x-amz-checksum-crc32": "AAAAAA=="})] * 3 + [WHOLE], 4),  # a whole's checksum
    ],
)
def test_a_range_reader_gives_the_asked_for_bytes_of_any_answer(answers: list[Answer], num_requests: int) -> None:
    left = list(answers)
    with serve_objects(lambda _: left.pop(0)) as connect:
        reader = S3Store("bucket", "", connect).open_range_reader(StoredObject("a", 8, MD5))
        for start, num_bytes, expected in ((4, 2, b"45"), (0, 3, b"012"), (6, 9, b"67")):
            reader.seek(start)
            assert reader.read(num_bytes) == expected
            assert reader.tell() == start + len(expected)
        assert (reader.read(1), len(answers) - len(left)) == (b"", num_requests)


# Many at once


def test_transfers_go_side_by_side_and_the_first_failure_in_order_is_told() -> None:
    barrier = threading.Barrier(TRANSFERS, timeout=30)  # never lets go if fewer move at once
    transfer_all(lambda _: barrier.wait(), range(TRANSFERS))
    moved: list[int] = []

    def move(number: int) -> None:
        if number in (3, 5):
            raise ScanError(Status.ERR_GONE, str(number))
        moved.append(number)

    with pytest.raises(ScanError, match="3"):
        transfer_all(move, range(8))
    assert {0, 1, 2} <= set(moved)


def test_the_threads_of_a_process_share_one_client() -> None:
    made: list[int] = []
    barrier = threading.Barrier(4)

    def connect() -> int:
        made.append(1)
        time.sleep(0.05)
        return 0

    def touch(_: int) -> None:
        barrier.wait()
        _ = S3Store("bucket", "", connect)._client

    transfer_all(touch, range(4))
    assert len(made) == 1
