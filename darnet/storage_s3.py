"""An S3 prefix as a store: keys and bytes go in, objects and named errors come out.

Nothing but this and `s3_answers` knows boto3.
"""

import functools
import hashlib
import io
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

import boto3.session
import botocore.session
import urllib3.exceptions
from botocore import exceptions as boto_errors
from botocore.config import Config
from botocore.utils import parse_timestamp

from darnet.errors import ObjectMissing, PutUncertain, RunError, ScanError, Status, StorageError, UsageError
from darnet.range_reader import RangeReader
from darnet.s3_answers import (
    BROKEN_BODY,
    DAMAGED_BODY,
    NO_ANSWER,
    OtherSpan,
    check_answer,
    explain_error,
    explain_fetch,
    explain_s3_errors,
    http_status,
    is_of_span,
    is_uncertain,
    is_unknown_identity,
    name_error,
    tell_gone,
)
from darnet.scan import StoredObject
from darnet.storage_local import COPY_CHUNK_BYTES

CONNECT_TIMEOUT_S = 10.0  # Source: ours; a reachable store answers within one
READ_TIMEOUT_S = 60.0  # Source: botocore's default; silence of this length is a dead connection
REQUEST_ATTEMPTS = 5  # Source: ours; standard mode waits at most 20 s between two of them
DEFAULT_REGION, ANY_REGION = "us-east-1", "aws-global"  # boto3 signs for the former where it says the latter
BODY_PAUSES_S = (0.2, 1.0)  # Source: ours; before a body that broke off is asked for again, which botocore does not do
UPLOADS = 3  # Source: ours; how often a body is sent that arrives damaged
# Source: ours; a slice takes some ms of this process and some tens of ms of waiting (`make bench-fetching`).
TRANSFERS = 16  # objects one process moves at once, each on a thread and a connection of its own


def connect_s3(*, is_endpoint_ignored: bool = False) -> Any:
    """A client from boto3's own chain (environment, profile, instance role), with bounded waiting."""
    settings = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": REQUEST_ATTEMPTS},
        max_pool_connections=2 * TRANSFERS,  # of a source, and of the one that is fetched ahead
    )
    core = botocore.session.get_session()
    if is_endpoint_ignored:
        core.set_config_variable("ignore_configured_endpoint_urls", value=True)
    core.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_parse_time)
    return boto3.session.Session(botocore_session=core).client("s3", config=settings)


@dataclass(frozen=True, slots=True)
class S3Endpoint:
    """Another server than Amazon's, for libraries that do not ask boto3: `url`, the region that requests are signed
    for, whether buckets are part of the host's name, and the file of the authorities to trust, if not the usual ones.
    """

    url: str
    region: str
    is_virtual: bool
    ca_file: str | None


def find_s3_endpoint() -> S3Endpoint | None:
    """The server that boto3's own chain names, in whichever way (environment, profile, services); None if it does not.

    Raises: UsageError if what it says cannot be used.
    """
    try:
        client, plain = connect_s3(), connect_s3(is_endpoint_ignored=True)
    except (boto_errors.BotoCoreError, ValueError) as error:
        raise UsageError(f"S3 settings: {error}; correct the environment or ~/.aws/config") from error
    if client.meta.endpoint_url == plain.meta.endpoint_url:
        return None
    style = (client.meta.config.s3 or {}).get("addressing_style")
    ca_file = botocore.session.get_session().get_config_variable("ca_bundle")
    region = client.meta.region_name
    if region in (None, ANY_REGION):
        region = DEFAULT_REGION
    return S3Endpoint(client.meta.endpoint_url, region, style == "virtual", ca_file)


def _parse_time(value: Any) -> datetime:
    """A response's time. Listings write ISO times, on which botocore's own parser spends four fifths of a listing."""
    if isinstance(value, str) and value[10:11] == "T" and value.endswith("Z"):
        return datetime.fromisoformat(value)
    parsed: datetime = parse_timestamp(value)
    return parsed


_connecting = threading.Lock()  # else the threads of a first transfer would make a client each


@functools.lru_cache(maxsize=8)
def _share_client(connect: Callable[[], Any], process_id: int) -> Any:  # noqa: ARG001
    """One client for all stores of a process; the id is part of the key because a fork must not share sockets."""
    return connect()


@dataclass(frozen=True)
class S3Store:
    """Objects of a bucket below a prefix, which is empty or ends in `/`. `connect` yields the boto3 client."""

    bucket: str
    prefix: str = ""
    connect: Callable[[], Any] = connect_s3

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def list_objects(self, prefix: str = "") -> Iterator[StoredObject]:
        with explain_s3_errors(self.uri):
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix + prefix):
                for found in page.get("Contents", []):
                    key = found["Key"][len(self.prefix) :]
                    if key:  # consoles leave an empty object named like the prefix itself
                        modified_s = found["LastModified"].timestamp()
                        yield StoredObject(key, found["Size"], found["ETag"].strip('"'), modified_s)

    def read_bytes(self, key: str) -> bytes:
        sink = io.BytesIO()
        with self._read_errors(key):
            self._download(key, sink)
        return sink.getvalue()

    @contextmanager
    def _read_errors(self, key: str) -> Iterator[None]:
        """As `explain_s3_errors`, of an object that is read.

        Raises: ObjectMissing also where S3 says 403 of what is gone.
        """
        uri = f"{self.uri}/{key}"
        with explain_s3_errors(uri):
            try:
                yield
            except boto_errors.ClientError as error:
                if self._is_gone(error, key):
                    raise ObjectMissing(f"{uri}: no such object") from error
                raise

    def _is_gone(self, error: Exception, key: str) -> bool:
        """Whether an object is refused to us because it is not there: a listing that we may see lacks it.

        S3 tells a missing object to those who may list a whole bucket alone, and others that they may not read it.
        Source: the S3 documentation of GetObject.
        """
        if name_error(error) == "AccessDenied":
            with suppress(RunError):
                return all(item.key != key for item in islice(self.list_objects(key), 1))  # the first of its prefix
        return False

    def fetch(self, item: StoredObject, path: Path) -> None:
        with path.open("wb") as sink:
            self._copy(item, sink)

    def fetch_span(self, item: StoredObject, path: Path, span: range) -> bool:
        with path.open("r+b" if path.exists() else "wb") as sink:
            return self._copy(item, sink, span)

    def local_path(self, key: str) -> Path | None:  # noqa: ARG002
        return None

    def write_bytes(self, key: str, data: bytes) -> None:
        with explain_s3_errors(f"{self.uri}/{key}"):
            self._upload(key, io.BytesIO(data))

    def open_range_reader(self, item: StoredObject) -> BinaryIO:
        return cast(BinaryIO, RangeReader(item.num_bytes, functools.partial(self._read_span, item.key)))

    def put_if_absent(self, key: str, data: bytes | Path) -> bool:
        uri = f"{self.uri}/{key}"
        try:
            with data.open("rb") if isinstance(data, Path) else io.BytesIO(data) as body:
                self._upload(key, body, is_if_absent=True)
        except boto_errors.ClientError as error:
            if http_status(error) == 412:
                return False
            if is_uncertain(error):
                raise PutUncertain(f"{uri}: the store did not say whether it wrote ({name_error(error)})") from error
            raise explain_error(error, uri) from error
        except NO_ANSWER as error:
            raise PutUncertain(f"{uri}: no answer from the store ({name_error(error)})") from error
        except boto_errors.BotoCoreError as error:
            raise explain_error(error, uri) from error
        return True

    def delete(self, key: str) -> None:
        with explain_s3_errors(f"{self.uri}/{key}"):
            self._client.delete_object(Bucket=self.bucket, Key=self.prefix + key)

    def read_clock(self) -> datetime:
        with explain_s3_errors(self.uri):
            answer = self._client.list_objects_v2(Bucket=self.bucket, Prefix=self.prefix, MaxKeys=1)
        told = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        if told is None:
            raise StorageError(f"{self.uri}: the store's answers have no date; use one that gives it, as HTTP demands")
        return parsedate_to_datetime(told)

    def child(self, prefix: str) -> "S3Store":
        return S3Store(self.bucket, f"{self.prefix}{prefix.rstrip('/')}/", self.connect)

    @property
    def _client(self) -> Any:
        with _connecting:
            return _share_client(self.connect, os.getpid())

    def _upload(self, key: str, body: io.BufferedIOBase, *, is_if_absent: bool = False) -> None:
        """Put a body, again where other bytes of it arrived: the store says so, or the ETag of what it took does.

        A server asked for no checksum takes what comes. What was put if absent is ours then, and damaged: it is put
        right in its place, on the condition that it still lies there.
        Raises: boto3's errors; StorageError where it stays damaged.
        """
        conditions: dict[str, str] = {"IfNoneMatch": "*"} if is_if_absent else {}
        md5 = hashlib.file_digest(body, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        is_there = False
        for attempt in range(UPLOADS):
            body.seek(0)
            try:
                answer = self._client.put_object(Bucket=self.bucket, Key=self.prefix + key, Body=body, **conditions)
            except (boto_errors.ClientError, boto_errors.BotoCoreError) as error:
                if is_there and not is_unknown_identity(error):
                    if self._holds(key, md5):  # the second put was carried out, and only its answer is lost
                        return
                    break
                if is_there or name_error(error) not in DAMAGED_BODY or attempt == UPLOADS - 1:
                    raise
                continue
            if not self._is_md5(answer) or answer["ETag"].strip('"') == md5:
                return
            is_there = True
            conditions = {"IfMatch": answer["ETag"]} if is_if_absent else {}
        raise StorageError(
            f"{self.uri}/{key}: other bytes lie there than were sent, and this job may not replace them; look at the "
            "way to the store, let somebody who may delete the object, and start the same command again"
        )

    def _holds(self, key: str, md5: str) -> bool:
        """Whether these bytes lie there, as far as the store answers."""
        try:
            answer = self._client.head_object(Bucket=self.bucket, Key=self.prefix + key)
        except (boto_errors.ClientError, boto_errors.BotoCoreError):
            return False
        return bool(answer["ETag"].strip('"') == md5)

    def _copy(self, item: StoredObject, sink: BinaryIO, span: range | None = None) -> bool:
        """Write exactly this object, or a span of it, to a file; whether all of it came. Raises: as `fetch`."""
        try:
            is_whole = self._download(item.key, sink, item, span=span)
            came, due = sink.tell(), item.num_bytes if span is None or is_whole else span.stop
            sink.truncate(item.num_bytes)
        except (OtherSpan, boto_errors.ClientError, boto_errors.BotoCoreError, OSError) as error:
            if span is not None and is_of_span(error):
                return self._copy(item, sink)
            if self._is_gone(error, item.key):
                raise tell_gone() from error
            raise explain_fetch(error, self.uri) from error
        if came != due:
            raise ScanError(Status.ERR_STORAGE, f"{came} of {due} bytes came")
        return is_whole

    def _read_span(self, key: str, span: range) -> tuple[bytes, bool]:
        """These bytes of an object; or all of it and True, where the store gives no spans."""
        sink = io.BytesIO()
        with self._read_errors(key):
            try:
                is_whole = self._download(key, sink, span=span)
            except (OtherSpan, boto_errors.ClientError, boto_errors.BotoCoreError) as error:
                if not is_of_span(error):
                    raise
                is_whole = self._download(key, sink)
        return sink.getvalue(), is_whole

    def _download(
        self, key: str, sink: BinaryIO, planned: StoredObject | None = None, *, span: range | None = None
    ) -> bool:
        """Write an object to `sink`, again from the start if its body breaks off or is not what its digest says;
        whether all of it came.

        A span goes to the sink's beginning, or to its place where the object is `planned`.
        Raises: ScanError(ERR_INPUT_CHANGED) if it is another than `planned`; OtherSpan; boto3's errors.
        """
        for pause_s in BODY_PAUSES_S:
            answer = self._request(key, planned, span)
            try:
                return self._take_body(answer, sink, planned, span)
            except boto_errors.FlexibleChecksumError:
                continue  # what was read wrongly may be right at once; what lies there so gets no better by waiting
            except BROKEN_BODY:
                time.sleep(pause_s)
        return self._take_body(self._request(key, planned, span), sink, planned, span)

    def _request(self, key: str, planned: StoredObject | None, span: range | None) -> Mapping[str, Any]:
        """The answer to a request for an object, its planned version or a span of it, with its body unread.

        What fails here, botocore has tried again already. But it reads a refusal's text as it comes: one that breaks
        off is asked for again here.
        """
        conditions = {} if planned is None else {"IfMatch": f'"{planned.version}"'}
        conditions |= {} if span is None else {"Range": f"bytes={span.start}-{span.stop - 1}"}
        ask = functools.partial(self._client.get_object, Bucket=self.bucket, Key=self.prefix + key, **conditions)
        for pause_s in BODY_PAUSES_S:
            with suppress(urllib3.exceptions.HTTPError):
                return cast(Mapping[str, Any], ask())
            time.sleep(pause_s)
        try:
            return cast(Mapping[str, Any], ask())
        except urllib3.exceptions.HTTPError as error:
            raise boto_errors.ResponseStreamingError(error=error) from error

    def _take_body(
        self, answer: Mapping[str, Any], sink: BinaryIO, planned: StoredObject | None, span: range | None
    ) -> bool:
        """Write an answer's body to `sink`, as `_download` says; whether it is the whole object."""
        is_whole = span is None or "ContentRange" not in answer
        with closing(answer["Body"]) as body:
            check_answer(answer, planned, span)
            if span is None or planned is None or is_whole:
                sink.seek(0)
                sink.truncate()
            else:
                sink.seek(span.start)
            md5 = hashlib.md5(usedforsecurity=False)
            while chunk := body.read(COPY_CHUNK_BYTES):
                md5.update(chunk)
                sink.write(chunk)
        if self._is_md5(answer) and md5.hexdigest() != answer["ETag"].strip('"'):
            raise boto_errors.FlexibleChecksumError(error_msg="the bytes are not those of the ETag")
        return is_whole

    def _is_md5(self, response: Mapping[str, Any]) -> bool:
        """Whether the tag is the MD5 of the body. It may be the only digest: boto3 checks what the uploader computed.

        Source: the S3 documentation of ETag: not of an upload in parts, under KMS or a customer's key, or in a
            directory bucket; nor has a span of an object a tag of its own.
        """
        is_secret = (
            str(response.get("ServerSideEncryption", "")).startswith("aws:kms") or "SSECustomerAlgorithm" in response
        )
        is_other = is_secret or self.bucket.endswith("--x-s3") or "ContentRange" in response
        return not is_other and re.fullmatch(r'"?[0-9a-f]{32}"?', response.get("ETag", "")) is not None
