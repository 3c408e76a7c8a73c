"""The secret of pseudonyms: long enough, the same everywhere, and told nowhere."""

import hashlib
import pickle
from pathlib import Path

import pytest

from darnet.archive import list_sources
from darnet.config import DecodeConfig, VolumeConfig
from darnet.errors import UsageError
from darnet.pseudonym import (
    OPEN_KEYS,
    PSEUDONYM_VARIABLE,
    KeyNames,
    choose_names,
    mark_secret,
    pseudonymise,
    read_secret,
)
from darnet.reading.road import Road
from darnet.storage import open_store
from tests.ct_fixtures import write_chest

SECRET = "a secret of thirty-two bytes or more"


def hmac_by_hand(key: bytes, text: bytes) -> str:
    """RFC 2104 as it is written there."""
    block = key.ljust(64, b"\0")
    inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in block) + text).digest()
    return hashlib.sha256(bytes(byte ^ 0x5C for byte in block) + inner).hexdigest()


def test_a_pseudonym_is_the_keyed_digest_of_the_value() -> None:
    expected = hmac_by_hand(SECRET.encode(), b"Doe^Jane")
    assert pseudonymise("Doe^Jane", SECRET.encode()) == expected
    assert pseudonymise("", SECRET.encode()) is None
    assert pseudonymise("Doe^Jane", None) is None


@pytest.mark.parametrize(("secret", "is_long_enough"), [("x" * 31, False), ("x" * 32, True), ("ü" * 16, True)])
def test_a_secret_has_32_bytes_at_least(secret: str, is_long_enough: bool) -> None:
    if is_long_enough:
        assert read_secret({PSEUDONYM_VARIABLE: secret}) == secret.encode()
        return
    with pytest.raises(UsageError, match="shorter than 32 bytes") as caught:
        read_secret({PSEUDONYM_VARIABLE: secret})
    assert secret not in str(caught.value)


def test_no_secret_is_none() -> None:
    assert read_secret({}) is read_secret({PSEUDONYM_VARIABLE: ""}) is mark_secret(None) is None


def test_a_mark_tells_secrets_apart_and_is_no_pseudonym() -> None:
    marks = {mark_secret(f"{index:032d}".encode()) for index in range(1000)}
    assert len(marks) == 1000
    assert SECRET not in str(mark_secret(SECRET.encode()))
    assert mark_secret(SECRET.encode()) == mark_secret(SECRET.encode())


def test_names_are_keys_or_keyed_digests_under_the_mark_of_the_secret() -> None:
    assert (OPEN_KEYS.name_source("ct/Doe"), OPEN_KEYS.name_scan("ct/Doe#1")) == ("ct/Doe", "ct/Doe#1")
    names = KeyNames(SECRET.encode())
    head = f"hmac:{hmac_by_hand(SECRET.encode(), b'which secret of plain digests')[:16]}:"
    assert names.name_source("ct/Doe") == head + hmac_by_hand(SECRET.encode(), b"ct/Doe")
    assert names.name_scan("ct/Doe#1") == head + hmac_by_hand(SECRET.encode(), b"ct/Doe#1")
    assert SECRET not in repr(names)


def test_digests_need_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PSEUDONYM_VARIABLE, raising=False)
    assert choose_names("key") is OPEN_KEYS
    with pytest.raises(UsageError, match=PSEUDONYM_VARIABLE):
        choose_names("hmac")
    monkeypatch.setenv(PSEUDONYM_VARIABLE, SECRET)
    assert choose_names("hmac") == KeyNames(SECRET.encode())


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("other", ["", SECRET[::-1], "k33p-out"])
def test_a_node_that_joins_with_another_secret_stops_the_run(
    other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker checks its own node's secret before it decodes anything; the failure goes to the driver whole."""
    from darnet.decoded_scan import unpack_scan
    from darnet.ray_cluster import decode_row

    write_chest(tmp_path / "archive" / "chest")
    store = open_store(str(tmp_path / "archive"))
    (source,) = list_sources(store.list_objects())
    road = Road(VolumeConfig(shape=(16, 32, 32)), DecodeConfig(), secret_mark=mark_secret(SECRET.encode()))
    monkeypatch.setenv(PSEUDONYM_VARIABLE, other)
    (row,) = decode_row({"source": pickle.dumps(source)}, store, road)
    failure = unpack_scan(row["record"], row["voxels"], row["lung"]).failure
    assert isinstance(failure, UsageError)
    assert PSEUDONYM_VARIABLE in str(failure)
    assert not other or other not in str(failure)
