"""Staged rows come piece by piece, every source whole, and never lie in memory all at once."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest

from darnet.publishing import staged
from darnet.publishing.rows import make_table
from darnet.publishing.staged import StagedRows
from tests.results_fixtures import make_row, stage


def test_pieces_follow_the_keys_and_split_no_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staged, "PIECE_ROWS", 5)
    rows = stage([make_row(f"{number // 3}#{number}") for number in range(30)], rows_per_part=3)
    pieces = list(rows.stream(["source", "scan_id"]))
    assert [len(piece) for _, piece in pieces] == [6] * 5
    for where, piece in pieces:
        assert piece["scan_id"].to_pylist() == rows.keys["scan_id"][where].to_pylist()
    assert [scan for _, piece in pieces for scan in piece["scan_id"].to_pylist()] == [
        f"{n // 3}#{n}" for n in range(30)
    ]
    sources = [set(piece["source"].to_pylist()) for _, piece in pieces]
    assert sum(map(len, sources)) == len(set.union(*sources)) == 10


def test_what_another_part_has_is_left_out_of_pieces_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources a and c come twice: once with an ERR row, once in two parts of equal right."""
    monkeypatch.setattr(staged, "PIECE_ROWS", 1)
    parts = [
        make_table([make_row("a", "ERR_STORAGE"), make_row("b"), make_row("c", "BAD_TILT")]),
        make_table([make_row("a#1"), make_row("a#2"), make_row("c")]),
    ]
    rows = StagedRows(lambda columns: (part.select(columns) for part in parts))
    expected = [("b", "OK"), ("c", "BAD_TILT"), ("a#1", "OK"), ("a#2", "OK")]
    found = [(row["scan_id"], row["status"]) for _, piece in rows.stream() for row in piece.to_pylist()]
    assert found == expected
    assert list(zip(*(rows.keys[name].to_pylist() for name in ("scan_id", "status")), strict=True)) == expected
    assert [where for where, _ in rows.stream(["source"])] == [slice(0, 2), slice(2, 4)]


def test_a_run_that_staged_nothing_has_no_row() -> None:
    rows = stage([])
    assert (rows.num_rows, list(rows.stream())) == (0, [])


def test_of_rows_already_passed_only_the_keys_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 120 kB each: what is allocated when a part is read does not grow with the number of those before it."""
    monkeypatch.setattr(staged, "PIECE_ROWS", 64)
    row = make_row("a") | {"cam_depth_profile": [0.5] * 400}
    held: list[int] = []

    def read(columns: list[str]) -> Iterator[Any]:
        for number in range(40):
            held.append(pa.total_allocated_bytes())
            yield make_table(
                [row | {"source": f"{number}", "scan_id": f"{number}#{scan}"} for scan in range(64)]
            ).select(columns)

    rows = StagedRows(read)
    held.clear()
    for _ in rows.stream():
        pass
    assert max(held) - held[0] < 1 << 20
