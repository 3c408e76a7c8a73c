"""Numbered objects of a store: ours are found, others left alone or named."""

import time

import pytest

from darnet.errors import StorageError
from darnet.publishing import objects
from darnet.publishing.objects import list_commit_objects, list_commits, read_commit_number
from darnet.storage import Store
from tests.results_fixtures import make_row, publish_rows, read_statuses


def test_a_foreign_file_in_the_table_stops_the_run(local: Store) -> None:
    local.write_bytes("predictions/c00000001.parquet", b"not Parquet")
    with pytest.raises(StorageError, match=r"c00000001\.parquet: cannot be read as a results file .* from a copy"):
        publish_rows(local, "run", make_row("a"))


REMEDIES = {
    "predictions/c00000001.parquet": "try again, and if it stays so, restore it from a copy",
    "_runs/r/plan.parquet": "try again, and if it stays so, say python -m jobs.score --results RESULTS --discard r ",
    f"_runs/r/parts/0-{'0' * 32}.parquet": "delete it, and what is in it is made again",
    "_runs/r/parts/x.parquet": "move it away",
}


@pytest.mark.parametrize(("key", "remedy"), REMEDIES.items())
def test_each_kind_of_object_has_its_remedy(local: Store, key: str, remedy: str) -> None:
    """Of a foreign file, and of one with a damaged page. A night whose store answered with other bytes may be sound."""
    remedy = remedy.replace("RESULTS", local.uri)
    local.write_bytes(key, b"not Parquet")
    with pytest.raises(StorageError) as caught:
        objects.read_stored(local, key)
    assert f"; {remedy}" in str(caught.value)

    with pytest.raises(StorageError, match=r"damaged \(a page\); ") as caught, objects.explain_damage(local, key):
        raise OSError("a page")
    assert f"; {remedy}" in str(caught.value)


@pytest.mark.parametrize("whole_bytes", [0, 1 << 20])
def test_a_damaged_object_is_named(local: Store, monkeypatch: pytest.MonkeyPatch, whole_bytes: int) -> None:
    """First where only reading the rows finds it out, then in what describes them."""
    monkeypatch.setattr(objects, "WHOLE_BYTES", whole_bytes)
    publish_rows(local, "run", make_row("a"))
    sound = local.read_bytes("predictions/c00000001.parquet")
    for num_spoiled, complaint in ((99, "damaged"), (len(sound) // 2, "cannot be read as a results file of ours")):
        local.write_bytes("predictions/c00000001.parquet", bytes(num_spoiled) + sound[num_spoiled:])
        with pytest.raises(StorageError, match=rf"c00000001\.parquet: {complaint}"):
            list(objects.stream_objects(local, list_commit_objects(local), ["run_id", "source"]))


@pytest.mark.parametrize("columns", [[], ["source"]])
def test_a_large_object_comes_in_small_pieces(
    local: Store, monkeypatch: pytest.MonkeyPatch, columns: list[str]
) -> None:
    """Even of no column at all: its run must be known."""
    publish_rows(local, "run", *(make_row(f"{number:02d}") for number in range(20)))
    monkeypatch.setattr(objects, "WHOLE_BYTES", 0)
    monkeypatch.setattr(objects, "PIECE_ROWS", 8)
    pieces = list(objects.stream_objects(local, list_commit_objects(local), columns))
    assert [(piece.run_id, piece.rows.num_rows) for piece in pieces] == [("run", 8), ("run", 8), ("run", 4)]


def test_no_more_is_read_ahead_than_may_be_held(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of small objects; a large one among them is read when its turn comes, in its place."""
    for number in range(9):
        publish_rows(
            local, f"run{number}", *(make_row(f"{number}{row:02d}") for row in range(200 if number == 4 else 1))
        )
    items = list_commit_objects(local)
    (large,) = (item for item in items if item.num_bytes == max(item.num_bytes for item in items))
    monkeypatch.setattr(objects, "WHOLE_BYTES", large.num_bytes - 1)
    monkeypatch.setattr(objects, "HELD_BYTES", items[0].num_bytes * 2 + 1)
    read, read_stored = list[str](), objects.read_stored

    def note(store: Store, key: str, columns: list[str]) -> objects.Stored:
        read.append(key)
        return read_stored(store, key, columns)

    monkeypatch.setattr(objects, "read_stored", note)
    stream = objects.stream_objects(local, items, ["source"])
    found = [next(stream).run_id]
    time.sleep(0.3)  # in which all of them would be read
    assert sorted(read) == [item.key for item in items[:3]]
    found += [stored.run_id for stored in stream]
    assert found == [f"run{number}" for number in range(9)]
    assert sorted(read) == [item.key for item in items if item is not large]


def test_commits_are_listed_by_their_numbers(store: Store) -> None:
    assert list_commits(store) == []
    for number in (1, 2, 3):
        assert publish_rows(store, f"run{number}", make_row(str(number))) == number
    store.write_bytes("predictions/c100000000.parquet", b"after nine digits comes ten")
    store.write_bytes("predictions/c99999999.parquet", b"")
    numbers = [read_commit_number(item.key) for item in list_commit_objects(store)]
    assert numbers == [1, 2, 3, 99_999_999, 100_000_000]


def test_other_files_beside_the_commits_are_left_alone(local: Store) -> None:
    local.write_bytes("predictions/README.txt", b"")
    local.write_bytes("predictions/.c00000009.parquet.tmp", b"")
    local.write_bytes("predictions/copy/c00000009.parquet", b"")
    assert publish_rows(local, "run", make_row("a")) == 1
    assert read_statuses(local) == {"a": "OK"}
