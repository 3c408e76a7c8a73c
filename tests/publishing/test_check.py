"""What `python -m jobs.results` finds, removes, copies and documents."""

import hashlib
import io
import json
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from darnet.job import run_job
from darnet.publishing.check import check_table, clean_runs, run_verb
from darnet.publishing.objects import to_parquet
from darnet.publishing.rows import SCHEMA, make_table
from darnet.publishing.runs import RunFolder
from darnet.scan import StoredObject
from darnet.settings import ResultsSettings
from darnet.storage import Store
from darnet.storage_local import LocalStore
from tests.results_fixtures import begin_run, flip_bit, has_plan, make_row, make_source, publish_rows


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, Any], str]:
    """The job's summary and what it printed before."""
    code = run_job("results", ResultsSettings, run_verb, list(arguments))
    *printed, last = capsys.readouterr().out.splitlines()
    summary = json.loads(last)
    assert summary["exit_code"] == code
    return summary, "".join(f"{line}\n" for line in printed)


def put_object(store: Store, number: int, run_id: str, *rows: dict[str, Any], numbered: int | None = None) -> None:
    """An object as no program of ours would publish it."""
    table = make_table([{**row, "run_id": run_id} for row in rows])
    numbers = pa.array([numbered or number] * len(rows), pa.int64())
    table = table.set_column(SCHEMA.get_field_index("commit"), SCHEMA.field("commit"), numbers)
    store.write_bytes(f"predictions/c{number:08d}.parquet", to_parquet(table, run_id))


def test_a_sound_table_passes_and_its_digests_are_sha256sums(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish_rows(store, "one", make_row("a", "ERR_TIMEOUT"), make_row("b"))
    publish_rows(store, "two", make_row("a"))
    summary, printed = run(capsys, "check", "--results", store.uri)
    assert (summary["exit_code"], summary["objects"], summary["held"]) == (0, 2, [])
    keys = ["predictions/c00000001.parquet", "predictions/c00000002.parquet"]
    assert printed == "".join(f"{hashlib.sha256(store.read_bytes(key)).hexdigest()}  {key}\n" for key in keys)
    run(capsys, "check", "--results", store.uri, "--out", str(tmp_path / "sums"))
    assert (tmp_path / "sums").read_text() == printed


def test_each_kind_of_damage_is_named(local: Store, capsys: pytest.CaptureFixture[str]) -> None:
    publish_rows(local, "one", make_row("a"))
    sound = local.read_bytes("predictions/c00000001.parquet")
    for spoil, complaint in (
        (lambda: put_object(local, 3, "three", make_row("c")), "c00000002.parquet is missing"),
        (
            lambda: put_object(local, 2, "two", make_row("b", "ERR_TIMEOUT"), make_row("a")),
            "c00000002.parquet: the scan in row 2 has 2 final rows",
        ),
        (lambda: put_object(local, 2, "two", make_row("b"), make_row("b")), "a scan has two rows"),
        (lambda: put_object(local, 2, "two", make_row("b"), numbered=7), "its rows carry another number"),
        (
            lambda: local.write_bytes("predictions/c00000002.parquet", sound[:-200]),
            "cannot be read as a results file of ours",
        ),
        (lambda: local.write_bytes("predictions/c00000002.parquet", b"\0" * 99 + sound[99:]), "c00000002.parquet"),
    ):
        spoil()
        summary, _ = run(capsys, "check", "--results", local.uri)
        assert summary["exit_code"] == 1
        assert complaint in summary["error"]
        local.delete("predictions/c00000002.parquet")
        local.delete("predictions/c00000003.parquet")
    assert run(capsys, "check", "--results", local.uri)[0]["exit_code"] == 0


def test_the_newest_objects_are_missed_by_what_runs_said(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """Each run's end tells its own number; the table is cleaned before."""
    for night in (1, 2, 3, 4):
        folder = begin_run(store, make_source(f"s{night}"), run_id=f"run{night}")
        folder.write_end(publish_rows(store, folder.run_id, make_row(f"s{night}", night=night)))
    run(capsys, "clean", "--results", store.uri, "--keep-commits", "0")
    keys = [f"predictions/c{number:08d}.parquet" for number in (1, 2, 3, 4)]
    for number, complaint in ((4, f"{keys[3]} is missing"), (3, f"{keys[2]} to {keys[3]} are missing")):
        store.delete(keys[number - 1])
        summary, _ = run(capsys, "check", "--results", store.uri)
        assert (summary["exit_code"], complaint in summary["error"]) == (1, True)
    for key in keys[:2]:
        store.delete(key)
    assert f"{keys[0]} to {keys[3]} are missing" in run(capsys, "check", "--results", store.uri)[0]["error"]


def test_a_run_that_never_ended_knew_the_table_that_it_found(local: Store) -> None:
    """The driver that published number 3 died before it said so; that of the next night, before it published."""
    for night in (1, 2, 3):
        publish_rows(local, f"run{night}", make_row("a", night=night, input_sha256=f"{night}" * 64))
    begin_run(local, make_source("a"), last_commit=3)
    assert check_table(local)[1] == []
    local.delete("predictions/c00000003.parquet")
    assert check_table(local)[1] == ["predictions/c00000003.parquet is missing"]


@pytest.mark.parametrize("damaged", [b"", b"[]", b"{}", b'{"published": "x"}', b"\xff"])
def test_a_damaged_end_of_a_run_is_named(local: Store, damaged: bytes) -> None:
    publish_rows(local, "run1", make_row("a"))
    folder = begin_run(local, make_source("a"), run_id="run1")
    local.write_bytes(folder.locate("ENDED.json"), damaged)
    (fault,) = check_table(local)[1]
    assert "run1/ENDED.json: damaged" in fault


def test_a_bit_that_flipped_in_any_column_is_found(local: Store) -> None:
    """What passes says the same: sizes and statistics that nothing is read by, texts of the footer."""
    publish_rows(local, "one", make_row("a"), make_row("b", "BAD_TILT"))
    key = "predictions/c00000001.parquet"
    sound = local.read_bytes(key)
    rows = pq.read_table(io.BytesIO(sound))
    footer = len(sound) - 8 - int.from_bytes(sound[-8:-4], "little")
    found = []
    for place in [*range(0, footer, 13), *range(footer, len(sound), 131)]:
        data = flip_bit(sound, place)
        local.write_bytes(key, data)
        if check_table(local)[1]:
            found.append(place)
        else:
            assert pq.read_table(io.BytesIO(data)).equals(rows)
    assert sum(place < footer for place in found) > footer // 13 * 0.6


def test_a_value_that_is_another_under_the_same_length_is_found(local: Store) -> None:
    """A probability as it would be read, from an object without checksums and from one of ours."""
    publish_rows(local, "one", make_row("a"))
    key = "predictions/c00000001.parquet"
    sound = local.read_bytes(key)
    place = sound.index(struct.pack("<d", 0.7))
    local.write_bytes(key, flip_bit(sound, place + 2))
    assert pq.read_table(io.BytesIO(local.read_bytes(key)))["probability_ncp"].to_pylist() != [0.7]
    assert [fault for fault in check_table(local)[1] if key in fault]


def test_other_keys_or_an_error_before_make_no_double(local: Store, capsys: pytest.CaptureFixture[str]) -> None:
    for number, change in enumerate([{}, {"input_sha256": "j" * 64}, {"model_sha256": "n" * 64}]):
        publish_rows(local, f"run{number}", make_row("a", **change))
    assert run(capsys, "check", "--results", local.uri)[0]["objects"] == 3


def test_only_the_work_of_runs_long_published_is_removed(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    for run_id in ("r1", "r2", "r3", "unpublished"):
        folder = begin_run(store, make_source(run_id), run_id=run_id)
        folder.write_part("p", [make_row(run_id, run_id=run_id)])
        store.write_bytes(folder.locate("nightly.html"), b"page")
        if run_id != "unpublished":
            publish_rows(store, run_id, make_row(run_id))
    summary, _ = run(capsys, "clean", "--results", store.uri, "--keep-commits", "2")
    assert (summary["cleaned_runs"], summary["removed_objects"]) == (1, 2)
    assert summary["unpublished_runs"] == ["unpublished"]
    assert [item.key for item in store.list_objects("_runs/r1/")] == [
        "_runs/r1/nightly.html",
        "_runs/r1/run.json",
    ]
    assert [has_plan(RunFolder(store, run_id)) for run_id in ("r2", "r3", "unpublished")] == [True] * 3
    assert run(capsys, "clean", "--results", store.uri, "--keep-commits", "2")[0]["removed_objects"] == 0
    assert run(capsys, "check", "--results", store.uri)[0]["objects"] == 3


@dataclass(frozen=True)
class CountingStore(LocalStore):
    """Notes what is read whole."""

    whole: list[str] = field(default_factory=list)

    def read_bytes(self, key: str) -> bytes:
        self.whole.append(key)
        return super().read_bytes(key)


def test_cleaning_reads_no_large_object_whole(tmp_path: Path) -> None:
    store = CountingStore(tmp_path)
    noise = random.Random(0).randbytes(3 << 20).hex()
    publish_rows(store, "large", make_row("a", "BAD_TILT", status_detail=noise))
    publish_rows(store, "small", make_row("b"))
    begin_run(store, make_source("a"), run_id="large")
    store.whole.clear()
    assert clean_runs(store, 1)["cleaned_runs"] == 1
    assert store.whole == ["predictions/c00000002.parquet"]


def test_the_work_of_a_run_that_had_nothing_to_publish_is_removed(
    local: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    publish_rows(local, "r1", make_row("a"))
    begin_run(local, make_source("a"), run_id="late").write_end(None)
    summary, _ = run(capsys, "clean", "--results", local.uri)
    assert (summary["cleaned_runs"], summary["unpublished_runs"]) == (1, [])
    assert not has_plan(RunFolder(local, "late"))


class EndingStore:
    """A real store in which a run is published and ends once its table has been listed."""

    def __init__(self, real: Store) -> None:
        self._real, self._is_over = real, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def list_objects(self, prefix: str = "") -> Iterator[StoredObject]:
        yield from list(self._real.list_objects(prefix))
        if prefix.startswith("predictions/") and not self._is_over:
            self._is_over = True
            RunFolder(self._real, "late").write_end(publish_rows(self._real, "late", make_row("b")))


def test_a_run_that_ends_while_the_table_is_cleaned_keeps_its_work(local: Store) -> None:
    publish_rows(local, "r1", make_row("a"))
    begin_run(local, make_source("b"), run_id="late")
    assert clean_runs(EndingStore(local), 28)["removed_objects"] == 0  # type: ignore[arg-type]
    assert has_plan(RunFolder(local, "late"))


def test_what_a_live_driver_staged_of_a_discarded_run_is_removed(local: Store) -> None:
    publish_rows(local, "r1", make_row("a"))
    folder = begin_run(local, make_source("b"))
    local.write_bytes(folder.locate("DISCARDED.json"), b"{}")
    folder.write_part("p", [make_row("b", run_id=folder.run_id)])
    assert clean_runs(local, 28) == {"cleaned_runs": 1, "removed_objects": 2, "unpublished_runs": []}


def test_latest_is_one_row_a_scan_in_both_formats(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish_rows(store, "one", make_row("a", "ERR_TIMEOUT"), make_row("b"))
    publish_rows(store, "two", make_row("a"))
    for name in ("latest.csv", "latest.parquet"):
        summary, _ = run(capsys, "latest", "--results", store.uri, "--out", str(tmp_path / name))
        assert summary["scans"] == 2
    table = pq.read_table(tmp_path / "latest.parquet")
    assert table["scan_id"].to_pylist() == ["a", "b"]
    assert table["status"].to_pylist() == ["OK", "OK"]
    assert table.schema.metadata[b"notice"] == b"research use only"
    assert table.schema.field("commit").metadata[b"description"].startswith(b"Number of the object")
    frame = pd.read_csv(io.BytesIO((tmp_path / "latest.csv").read_bytes()))
    assert list(frame.columns) == [*SCHEMA.names, "notice"]
    assert frame["probability_ncp"].tolist() == [0.7, 0.7]
    assert json.loads(frame["cam_depth_profile"][0]) == [0.25] * 4
    assert set(frame["notice"]) == {"research use only"}


def test_the_schema_describes_every_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary, printed = run(capsys, "schema")
    lines = printed.splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == SCHEMA.names
    assert summary["columns"] == len(lines) - 2
    run(capsys, "schema", "--out", str(tmp_path / "columns.md"))
    assert (tmp_path / "columns.md").read_text() == printed


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["check"], "results: Field required"),
        (["latest", "--results", "r", "--out", "x.xlsx"], "ending in .parquet or .csv"),
        (["mend", "--results", "r"], "'check', 'clean', 'latest' or 'schema'"),
        (["check", "--results", "/nowhere"], "no results table here"),
    ],
)
def test_wrong_use_says_what_to_do(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    summary, _ = run(capsys, *arguments)
    assert summary["exit_code"] == 2
    assert complaint in summary["error"]
