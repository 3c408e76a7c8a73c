"""What an answer of S3 means: boto3's errors and a response's headers go in, our named errors come out."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from botocore import exceptions as boto_errors

from darnet.errors import CredentialsError, ObjectMissing, RunError, ScanError, Status, StorageError, UsageError
from darnet.scan import StoredObject

BROKEN_BODY = (
    boto_errors.IncompleteReadError,
    boto_errors.ResponseStreamingError,
    boto_errors.ReadTimeoutError,
)
# Even a refused connection may be the repetition of a request that was carried out.
NO_ANSWER = (boto_errors.HTTPClientError, boto_errors.ConnectionError)
_NO_IDENTITY = (
    boto_errors.NoCredentialsError,
    boto_errors.PartialCredentialsError,
    boto_errors.CredentialRetrievalError,
    boto_errors.TokenRetrievalError,
    boto_errors.SSOError,
    boto_errors.ProfileNotFound,
)
# The stores' words for a body that was damaged on its way, before anything is done; botocore's standard mode does not
# ask again for them. Source: the S3 documentation's error responses, the last from MinIO.
DAMAGED_BODY = frozenset({"BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"})
# The store's words for "I do not know you", as against "you may not read this object".
_REFUSED_IDENTITY = frozenset(
    {
        *("ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch", "TokenRefreshRequired"),
        *("AccountProblem", "NotSignedUp"),
        "RequestTimeTooSkewed",  # this machine's clock is a quarter of an hour off; so is every request of it
    }
)


class OtherSpan(Exception):  # noqa: N818
    """A store answered with other bytes than it was asked for."""


def is_of_span(error: Exception) -> bool:
    """Whether the whole object may come where a span did not: other bytes came, no such ones, or a whole's checksum."""
    return http_status(error) == 416 or isinstance(error, OtherSpan | boto_errors.FlexibleChecksumError)


def check_answer(response: Mapping[str, Any], planned: StoredObject | None, span: range | None) -> None:
    """Some stores ignore the condition of a request, so the answer's own tag and length are held against the plan."""
    tag, num_bytes = response.get("ETag", "").strip('"'), response.get("ContentLength")
    if span is not None and "ContentRange" in response:
        told = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response["ContentRange"])
        if told is None or range(int(told[1]), int(told[2]) + 1) != span:
            raise OtherSpan
        num_bytes = int(told[3])
    if planned is None:
        return
    found = tag or planned.version, planned.num_bytes if num_bytes is None else num_bytes
    if found != (planned.version, planned.num_bytes):
        raise ScanError(Status.ERR_INPUT_CHANGED, "replaced since it was listed")


def name_error(error: Exception) -> str:
    """The store's name for what went wrong, or this machine's, or the exception's."""
    if isinstance(error, boto_errors.ClientError):
        return str(error.response.get("Error", {}).get("Code", "")) or f"HTTP {http_status(error)}"
    if isinstance(error, OSError) and error.strerror:  # this machine's own, such as a full disk
        return f"{error.strerror} on the decoding machine"
    return type(error).__name__


def http_status(error: Exception) -> int:
    """The status of the store's answer; 0 where there was none."""
    if not isinstance(error, boto_errors.ClientError):
        return 0
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def is_unknown_identity(error: Exception) -> bool:
    """Whether every other request would fail the same way: we say nobody, or somebody whom the store does not know."""
    return isinstance(error, _NO_IDENTITY) or name_error(error) in _REFUSED_IDENTITY or http_status(error) == 401


def is_uncertain(error: boto_errors.ClientError) -> bool:
    """Whether a put may have happened in spite of this answer. 501 and 400 are refusals before anything is done."""
    status = http_status(error)
    return status == 409 or (status >= 500 and status != 501) or name_error(error) == "RequestTimeout"


def explain_error(error: Exception, uri: str) -> RunError:
    """What a boto3 error means to whoever started the job, and what to do about it."""
    code, status = name_error(error), http_status(error)
    if is_unknown_identity(error) or status == 403:
        remedy = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or AWS_PROFILE, and the bucket's policy"
        if code == "RequestTimeTooSkewed":
            remedy = f"set the clock of {os.uname().nodename}"
        return CredentialsError(f"{uri}: the store does not let us in ({code}); {remedy}")
    if code == "NoSuchBucket":
        return UsageError(f"{uri}: no such bucket; create it or correct the address")
    if status == 404:
        return ObjectMissing(f"{uri}: no such object")
    if isinstance(error, boto_errors.ParamValidationError) or code == "InvalidBucketName":
        return UsageError(f"{uri}: not a valid bucket or key; correct the address")
    if code == "NotImplemented":
        return StorageError(f"{uri}: the store lacks a request we need (conditional writes?); use one that has it")
    if isinstance(error, NO_ANSWER):
        return StorageError(f"{uri}: cannot reach the store ({code}); check AWS_ENDPOINT_URL and the network")
    return StorageError(f"{uri}: the store failed ({code}); try again, then ask who runs it")


def explain_fetch(error: Exception, uri: str) -> ScanError | RunError:
    """What an error means to the one scan being fetched, or to all of them if the store refuses who we are."""
    code, status = name_error(error), http_status(error)
    if is_unknown_identity(error):
        return explain_error(error, uri)
    if code == "InvalidObjectState":
        return ScanError(Status.ERR_ARCHIVED, f"in a storage class for archives ({code}); restore it")
    if status == 403:
        return ScanError(Status.ERR_DENIED, f"may not be read ({code}); give this job the right to")
    if status == 412:
        return ScanError(Status.ERR_INPUT_CHANGED, "replaced since it was listed")
    if status == 404 and code != "NoSuchBucket":
        return tell_gone()
    return ScanError(Status.ERR_STORAGE, code)


def tell_gone() -> ScanError:
    """Of an object that is no longer there."""
    return ScanError(Status.ERR_GONE, "deleted since it was listed")


@contextmanager
def explain_s3_errors(uri: str) -> Iterator[None]:
    """Turn boto3's errors into ours, naming the place."""
    try:
        yield
    except (boto_errors.ClientError, boto_errors.BotoCoreError) as error:
        raise explain_error(error, uri) from error
