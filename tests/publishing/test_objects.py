"""Numbered objects of a store: ours are found, others left alone or named."""

import pytest

from darnet.errors import StorageError
from darnet.publishing.objects import find_last_commit
from darnet.storage import Store
from tests.results_fixtures import make_row, publish_rows, read_statuses


def test_a_foreign_file_in_the_table_stops_the_run(local: Store) -> None:
    local.write_bytes("predictions/c00000001.parquet", b"not Parquet")
    with pytest.raises(StorageError, match=r"c00000001\.parquet: not a results file"):
        publish_rows(local, "run", make_row("a"))


def test_the_last_commit_is_the_highest_number(store: Store) -> None:
    assert find_last_commit(store) == 0
    for number in (1, 2, 3):
        assert publish_rows(store, f"run{number}", make_row(str(number))) == number
        assert find_last_commit(store) == number


def test_other_files_beside_the_commits_are_left_alone(local: Store) -> None:
    local.write_bytes("predictions/README.txt", b"")
    local.write_bytes("predictions/.c00000009.parquet.tmp", b"")
    local.write_bytes("predictions/copy/c00000009.parquet", b"")
    assert publish_rows(local, "run", make_row("a")) == 1
    assert read_statuses(local) == {"a": "OK"}
