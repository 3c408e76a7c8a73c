"""What the table settles is what a person would find who reads it row by row."""

import hashlib
import os
import random
import re
import resource
import sqlite3
import struct
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from darnet.errors import StorageError
from darnet.publishing import objects, scored_keys
from darnet.publishing.rows import Reason
from darnet.publishing.scored_keys import ScoredKeys, _digest_pairs, _explain_disk, read_scored_keys
from darnet.scan import Source
from darnet.storage import Store
from tests.marks import mark_slow
from tests.results_fixtures import MODEL, ORIGIN, make_row, make_source, publish_rows, read_statuses

NUM_MANY = 3000
KEYS = ["a", "b", "c é", "caf\udce9"]


def read_keys(store: Store, model: str = MODEL, preprocessing: str = "1-abc") -> AbstractContextManager[ScoredKeys]:
    return read_scored_keys(store, model, preprocessing, ORIGIN)


def find_reasons(store: Store, *sources: Source, **under: str) -> list[Reason | None]:
    with read_keys(store, **under) as keys:
        return keys.find_reasons(sources)


def make_rows_of(source: Source, *scans: str, status: str = "OK", **changes: Any) -> list[dict[str, Any]]:
    facts = {"source": source.key, "input_sha256": source.input_sha256} | changes
    return [make_row(scan or source.key, status, **facts) for scan in scans or ("",)]


def test_reasons_follow_what_was_published(store: Store) -> None:
    a, b, c = (make_source(key) for key in ("a", "b", "caf\udce9"))
    assert find_reasons(store, a, b, c) == [Reason.NEW] * 3
    troubled = [*make_rows_of(a, "a#1"), *make_rows_of(a, "a#2", status="ERR_TIMEOUT")]
    publish_rows(store, "one", *troubled, *make_rows_of(b, status="BAD_TILT"), *make_rows_of(c))
    assert find_reasons(store, a, b, c) == [Reason.RETRY, None, None]
    assert find_reasons(store, make_source("a", "2"), make_source("b", "2")) == [Reason.CHANGED] * 2
    publish_rows(store, "two", *make_rows_of(a, "a#1", "a#2"))
    assert find_reasons(store, a, b, make_source("d")) == [None, None, Reason.NEW]
    with read_keys(store) as keys:
        assert keys.last_commit == 2


def test_another_model_or_preprocessing_scores_all_anew_and_says_so(local: Store) -> None:
    a, b = make_source("a"), make_source("b")
    publish_rows(local, "one", *make_rows_of(a), *make_rows_of(b))
    for model, preprocessing in (("n" * 64, "1-abc"), (MODEL, "2-abc")):
        asked = (a, make_source("b", "2"), make_source("c"))
        told = find_reasons(local, *asked, model=model, preprocessing=preprocessing)
        assert told == [Reason.OTHER_MODEL, Reason.OTHER_MODEL, Reason.NEW]
    publish_rows(local, "two", *make_rows_of(a, model_sha256="n" * 64))
    told = find_reasons(local, a, make_source("a", "2"), b, model="n" * 64)
    assert told == [None, Reason.CHANGED, Reason.OTHER_MODEL]


def test_a_source_error_does_not_outlive_its_scans(local: Store) -> None:
    source = make_source("a")
    publish_rows(local, "one", *make_rows_of(source, status="ERR_STORAGE"))
    publish_rows(local, "two", *make_rows_of(source, "a#1", "a#2"))
    assert find_reasons(local, source) == [None]
    assert read_statuses(local) == {"a#1": "OK", "a#2": "OK"}


def count_by_hand(nights: list[list[dict[str, Any]]], source: Source) -> Reason | None:
    """The same question put to every row ever published."""
    ours = [[row for row in rows if row["model_sha256"] == MODEL and row["source"] == source.key] for rows in nights]
    same = [rows for rows in ([r for r in rows if r["input_sha256"] == source.input_sha256] for rows in ours) if rows]
    if same:
        return Reason.RETRY if any(row["status"].startswith("ERR_") for row in same[-1]) else None
    if any(ours):
        return Reason.CHANGED
    seen = any(row["source"] == source.key for rows in nights for row in rows)
    return Reason.OTHER_MODEL if seen else Reason.NEW


@pytest.mark.parametrize("seed", mark_slow(range(6), but=(0, 1)))
@pytest.mark.parametrize("is_large", [False, True])
def test_every_history_is_read_as_by_hand(
    local: Store, seed: int, is_large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large objects come in pieces of two rows and of one, so that a source lies in several of them."""
    if is_large:
        monkeypatch.setattr(objects, "WHOLE_BYTES", 0)
        monkeypatch.setattr(objects, "ROW_GROUP_ROWS", 3)
        monkeypatch.setattr(objects, "PIECE_ROWS", 2)
    rng = random.Random(seed)
    nights: list[list[dict[str, Any]]] = []
    for night in range(1, 8):
        rows = []
        for key in rng.sample(KEYS, rng.randint(1, 4)):
            source, model = make_source(key, rng.choice("12")), rng.choice([MODEL, MODEL, "n" * 64])
            for scan in range(rng.randint(1, 4)):
                status = rng.choice(["OK", "ERR_TIMEOUT", "SKIP_NO_LUNG"])
                rows += make_rows_of(source, f"{key}#{scan}", status=status, night=night, model_sha256=model)
        one_model = [row for row in rows if row["model_sha256"] == rows[0]["model_sha256"]]
        before = len(objects.list_commits(local))
        publish_rows(local, f"run{night}", *one_model)
        if len(keys := objects.list_commits(local)) > before:
            nights.append(read_back(local, keys[-1]))
    asked = [make_source(key, version) for key in [*KEYS, "z"] for version in "123"]
    assert find_reasons(local, *asked) == [count_by_hand(nights, source) for source in asked]


def read_back(store: Store, key: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = objects.read_stored(store, key).rows.to_pylist()
    return [row | {"source": row["source"].replace("\\xe9", "\udce9")} for row in rows]


def test_a_large_object_is_not_fetched_whole(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source("a")
    publish_rows(store, "one", *make_rows_of(source, *(f"a#{number}" for number in range(99))))
    monkeypatch.setattr(objects, "WHOLE_BYTES", 0)
    monkeypatch.setattr(type(store), "read_bytes", None)
    assert find_reasons(store, source) == [None]


def test_digests_are_those_of_hashlib_in_the_integers_of_sqlite() -> None:
    keys = [f"k{number}" for number in range(500)]
    pairs = list(_digest_pairs(keys, ["i"] * len(keys)))
    for key, pair in zip(keys, pairs, strict=True):
        expected = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in (key, f"{key}\0i"))
        assert struct.pack(">qq", *pair) == b"".join(expected)
    assert min(pairs)[0] < 0 < max(pairs)[0]


def publish_many(store: Store) -> list[Source]:
    sources = [make_source(f"ct/{number:05d}") for number in range(NUM_MANY)]
    publish_rows(store, "many", *(make_rows_of(source)[0] for source in sources))
    return sources


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This machine's folder for temporary files, and next to no memory for the database."""
    monkeypatch.setattr(scored_keys, "CACHE_KIB", 16)
    folder = tmp_path / "it's scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def list_nameless_files() -> list[Path]:
    """This process's files of SQLite that no folder names, by their descriptors."""
    return [file for file in Path("/proc/self/fd").iterdir() if "etilqs" in os.path.realpath(file)]


def test_what_is_settled_lies_on_disk_and_several_threads_may_ask(local: Store, scratch: Path) -> None:
    sources = publish_many(local)
    with read_keys(local) as keys:
        files = list_nameless_files()
        assert {Path(os.path.realpath(file)).parent for file in files} == {scratch}
        assert sum(file.stat().st_size for file in files) > len(sources) * 16
        asked = [[*sources[start : start + 300], make_source(f"new/{start}")] for start in range(0, NUM_MANY, 300)]
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(keys.find_reasons, asked)) == [[None] * 300 + [Reason.NEW]] * 10
    assert not list_nameless_files()
    with pytest.raises(sqlite3.ProgrammingError):
        keys.find_reasons(sources)


@contextmanager
def limit_files(num_bytes: int) -> Iterator[None]:
    """Let no file of this process grow further."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("num_bytes", [NUM_MANY * 10, NUM_MANY * 30])
def test_a_full_disk_is_told_with_what_to_do(local: Store, scratch: Path, num_bytes: int) -> None:
    """While rows are read, which takes some 23 bytes of each, or while they are sorted."""
    publish_many(local)
    told = f"{re.escape(str(scratch))}: .*; make room there, or set TMPDIR"
    with pytest.raises(StorageError, match=told), limit_files(num_bytes), read_keys(local):
        pass
    assert not list_nameless_files()


def test_a_disk_that_fails_while_the_archive_is_listed_is_told(local: Store, scratch: Path) -> None:
    sources = publish_many(local)
    with read_keys(local) as keys:
        for file in list_nameless_files():
            os.truncate(file, 0)
        with pytest.raises(StorageError, match=f"{re.escape(str(scratch))}: cannot keep what is settled"):
            keys.find_reasons(sources)


def test_what_is_no_fault_of_a_disk_is_not_told_as_one() -> None:
    with pytest.raises(sqlite3.OperationalError, match="syntax"), _explain_disk():
        sqlite3.connect(":memory:").execute("SELEC")


def test_arrow_gives_memory_back_while_keys_are_read_and_not_later(
    local: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_rows(local, "one", *make_rows_of(make_source("a")))
    seen = []

    def look(*_: Any) -> None:
        seen.append(pa.default_memory_pool().backend_name)
        raise KeyError

    monkeypatch.setattr(scored_keys, "_note", look)
    usual = pa.default_memory_pool().backend_name
    with pytest.raises(KeyError), read_keys(local):
        pass
    assert [*seen, pa.default_memory_pool().backend_name] == ["system", usual]
