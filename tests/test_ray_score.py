"""The scoring road on a real Ray cluster: every scan accounted for, the same bits wherever it lies, published once."""

import hashlib
import hmac
import os
import pickle
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray.data import Dataset

import jobs.score
from darnet import NOTICE
from darnet.archive import EVERYTHING, Selection, list_sources
from darnet.code_version import name_scoring_code
from darnet.config import DecodeConfig, ScoreConfig
from darnet.errors import CredentialsError, HeldError, ObjectMissing, RunError, UsageError
from darnet.manifest import RunFacts, read_manifest
from darnet.publishing.commit import check_rows
from darnet.publishing.hold import decide_hold, refuse_if_held
from darnet.publishing.objects import suggest_discard
from darnet.publishing.planning import plan_night
from darnet.publishing.runs import RunFolder, Work, find_unfinished
from darnet.ray_actor import ScoringActor
from darnet.ray_cluster import connect
from darnet.ray_metrics import ScanCounters
from darnet.ray_score import (
    NightRequest,
    collect_sources,
    describe_work,
    finish_run,
    preview_archive,
    score_archive,
    score_planned,
    stage_rows,
)
from darnet.results import read_predictions
from darnet.scan import StoredObject
from darnet.settings import ScoreSettings, read_settings
from darnet.storage import open_store
from darnet.storage_local import LocalStore
from tests.bundle_fixtures import write_random_bundle
from tests.ct_fixtures import SERIES_UID, make_chest, write_chest
from tests.night_jobs import PollingReader, count_parts, finish_job, start_job, write_archive
from tests.places import ROOT
from tests.results_fixtures import ORIGIN, begin_run, flip_bit, make_row, make_source

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("default")]

CONFIG = ScoreConfig(part_scans=2)
SECRET = "a secret of thirty-two bytes or more"
NUMBERS = ["probability_cp", "probability_ncp", "probability_normal", "fold_std_ncp", "cam_in_lung_fraction"]
NIGHT = date(2026, 1, 1)
REAL_CT = ROOT.parent / "shared" / "data" / "ct"


class LockedStore(LocalStore):
    """A store whose files can be listed and not fetched."""

    def local_path(self, key: str) -> None:  # type: ignore[override]  # noqa: ARG002
        return None

    def fetch(self, item: StoredObject, path: Path) -> None:  # noqa: ARG002
        raise CredentialsError("nobody enters")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "bundle"
    write_random_bundle(folder)
    return str(folder)


def _score(archive: Path | str, model: str, results: Path | str) -> dict[str, Any]:
    stores = open_store(str(archive)), open_store(model), open_store(str(results), create=True)
    return score_archive(NightRequest(*stores, CONFIG, NIGHT))


def _list_operators(dataset: Dataset) -> list[str]:
    """Names of the operators as they are executed, after Ray's fusion."""
    from ray.data._internal.logical.optimizers import get_execution_plan

    plan = get_execution_plan(dataset._logical_plan)[0]
    return [operator.name for operator in plan.dag.post_order_iter()]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_decode_and_model_are_different_operators(model: str, tmp_path: Path) -> None:
    write_chest(tmp_path / "archive" / "a")
    archive = open_store(str(tmp_path / "archive"))
    run = RunFacts("r", NIGHT, read_manifest(open_store(model), CONFIG), "0")
    sources = list(list_sources(archive.list_objects()))
    request = NightRequest(archive, open_store(model), open_store(str(tmp_path / "results")), CONFIG)
    dataset = score_planned(request, run, [0], lambda _: sources)
    names = _list_operators(dataset)
    assert [name for name in names if "FlatMap" in name and "ScoringActor" in name] == []
    assert sum("FlatMap" in name for name in names) == sum("ScoringActor" in name for name in names) == 1


@pytest.mark.usefixtures("ray_cluster")
def test_every_scan_is_accounted_for_and_only_what_is_new_is_scored_again(model: str, tmp_path: Path) -> None:
    archive, results = tmp_path / "archive", tmp_path / "results"
    write_archive(archive, 3)
    stores = open_store(str(archive)), open_store(model), open_store(str(results), create=True)
    with pytest.raises(UsageError, match=r"score\.device is gpu, and the cluster has no GPU"):
        score_archive(NightRequest(*stores, CONFIG.model_copy(update={"device": "gpu"}), NIGHT))
    assert (
        find_unfinished(stores[2], describe_work(NightRequest(*stores, CONFIG), read_manifest(stores[1], CONFIG))) == []
    )
    first = _score(archive, model, results)
    assert (first["published"], first["device"]) == (1, "cpu")
    assert first["statuses"] == {"OK": 5, "BAD_MISSING_SLICE": 1}
    assert first["planned_sources"] == 5

    again = _score(archive, model, results)
    assert (again["published"], again["planned_sources"]) == (None, 0)
    assert again["message"] == "nothing new in the archive: nothing to score, nothing published"

    write_chest(archive / "late", make_chest()[:, :, ::-1])
    early = score_archive(NightRequest(*stores, CONFIG, NIGHT, Selection(settle_s=3600)))
    assert (early["published"], early["waiting_sources"]) == (None, 1)
    assert early["message"].endswith("nothing published; sources that still arrive, left to the next night: 1")
    os.utime(archive / "chest01" / "000.dcm", ns=(1, 1))
    second = _score(archive, model, results)
    assert (second["published"], second["planned_sources"], second["scans"]) == (2, 2, 2)
    rows = read_predictions(str(results))
    assert len(rows) == 7
    assert set(rows["code_version"]) == {name_scoring_code()}
    assert set(rows.loc[rows["commit"] == 2, "source"]) == {"chest01", "late"}
    assert sorted(path.name for path in (results / "predictions").iterdir()) == [
        "c00000001.parquet",
        "c00000002.parquet",
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_some_folds_are_another_model_and_another_backend_is_the_same(model: str, tmp_path: Path) -> None:
    archive, results = tmp_path / "archive", tmp_path / "results"
    write_archive(archive, 2)
    _score(archive, model, results)
    stores = open_store(str(archive)), open_store(model), open_store(str(results))
    openvino = CONFIG.model_copy(update={"backend": "openvino", "cache": tmp_path / "cache"})
    assert score_archive(NightRequest(*stores, openvino, NIGHT))["published"] is None
    chosen = openvino.model_copy(update={"folds": (2, 0)})
    assert [score_archive(NightRequest(*stores, chosen, NIGHT))["published"] for _ in range(2)] == [2, None]
    nights = (pq.read_table(path).to_pandas() for path in sorted((results / "predictions").iterdir()))
    whole, part = (rows[rows["status"] == "OK"].set_index("scan_id").sort_index() for rows in nights)
    assert set(part["model_version"]) == {f"{version} folds 0,2" for version in whole["model_version"]}
    assert list(part.index) == list(whole.index) != []
    for scan_id, row in part.iterrows():
        folds = np.array(whole.loc[scan_id, "fold_probability_ncp"])[[0, 2]]
        np.testing.assert_allclose(row["fold_probability_ncp"], folds, atol=1e-4)
        assert row["probability_ncp"] == pytest.approx(folds.mean(), abs=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_night_of_spoiled_scans_is_held_until_it_is_accepted(model: str, tmp_path: Path) -> None:
    write_chest(tmp_path / "archive" / "good")
    results = open_store(str(tmp_path / "results"), create=True)
    stores = open_store(str(tmp_path / "archive")), open_store(model), results
    config = CONFIG.model_copy(update={"gate_min_scans": 1, "gate_min_nights": 1})
    first = score_archive(NightRequest(*stores, config, NIGHT))
    assert first["gates"] == "not judged: 0 earlier nights, the gates need 1"
    assert NOTICE in Path(first["report"]).read_text()
    write_chest(tmp_path / "archive" / "gap")[7].unlink()
    with pytest.raises(HeldError, match=r"share of BAD 1\.000 \(limit 0\.050\)") as caught:
        score_archive(NightRequest(*stores, config, date(2026, 1, 2)))
    with pytest.raises(HeldError, match=caught.value.facts["held"]):
        score_archive(NightRequest(*stores, config, date(2026, 1, 3)))
    assert len(read_predictions(results.uri)) == 1

    settings = ScoreSettings(results=results.uri, accept=caught.value.facts["held"], reason="seen")
    assert decide_hold(results, settings)["published"] == 2
    assert set(read_predictions(results.uri)["status"]) == {"OK", "BAD_MISSING_SLICE"}
    assert score_archive(NightRequest(*stores, config, date(2026, 1, 3)))["published"] is None


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_late_driver_of_a_published_run_holds_nothing_back(model: str, tmp_path: Path) -> None:
    """Its storage failed: the rows it staged last would be held, had the run not been published."""
    archive, results = open_store(str(tmp_path / "archive")), open_store(str(tmp_path / "results"), create=True)
    config = CONFIG.model_copy(update={"gate_min_scans": 1, "gate_min_nights": 1})
    for number in (1, 2):
        write_chest(tmp_path / "archive" / f"night{number}")
        run_id = score_archive(NightRequest(archive, open_store(model), results, config, date(2026, 1, number)))[
            "run_id"
        ]
    folder = RunFolder(results, run_id)
    (part,) = [path.stem for path in (tmp_path / "results" / "_runs" / run_id / "parts").iterdir()]
    (source,) = folder.list_planned_sources()
    folder.write_part(part, [make_row(source, "ERR_STORAGE", run_id=run_id)])
    late = finish_run(
        NightRequest(archive, open_store(model), results, config), read_manifest(open_store(model), config), folder
    )
    assert (late["published"], late["gates"]) == (2, "judged by another driver")
    refuse_if_held(results)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_prometheus_hears_of_scans_bytes_and_seconds() -> None:
    import ray

    rows = [make_row("a", fetch_s=1.5, decode_s=2.0, model_s=0.25), make_row("b", "BAD_TILT", fetch_s=0.5)]
    counters = ScanCounters()
    counters.note(rows)
    address = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    expected = {
        "scans OK": 1,
        "scans BAD_TILT": 1,
        "bytes ": 2000,
        "stage_seconds fetch": 2,
        "stage_seconds model": 0.25,
    }
    deadline_s = time.monotonic() + 60
    counted: dict[str, float] = {}
    while time.monotonic() < deadline_s and any(counted.get(name, 0) < least for name, least in expected.items()):
        time.sleep(0.2)
        counted = _read_counters(address)
    assert all(counted[name] >= least for name, least in expected.items())  # more if other tests scored before


def _read_counters(address: str) -> dict[str, float]:
    """What Ray's metrics agent says of our counters, each by its name and tag."""
    with urllib.request.urlopen(address, timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples = [sample for family in families for sample in family.samples if sample.name.startswith("ray_darnet_")]
    counted: dict[str, float] = {}
    for sample in samples:
        tag = sample.labels.get("status", sample.labels.get("stage", ""))
        name = f"{sample.name.removeprefix('ray_darnet_').removesuffix('_total')} {tag}"
        counted[name] = counted.get(name, 0) + sample.value
    return counted


def _digest_source(archive: Path, source: Path) -> str:
    """`input_sha256` by its definition: sorted key, modification time and size."""
    lines = []
    for path in sorted(source.iterdir()):
        found = path.stat()
        lines.append(f"{path.relative_to(archive)}\0{found.st_mtime_ns}\0{found.st_size}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _hmac(value: str) -> str:
    return hmac.new(SECRET.encode(), value.encode(), hashlib.sha256).hexdigest()


@pytest.mark.slow
def test_published_rows_are_filled_and_their_pictures_kept(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Null is only what design allows: of a scan that was not scored, and of images, which have no physical unit.

    The page lists both scored scans, and so there are pictures of them, though none is chosen.
    """
    archive, images = tmp_path / "archive", tmp_path / "images"
    write_chest(archive / "Doe^Jane", Manufacturer="GE MEDICAL SYSTEMS")
    write_chest(archive / "gap")[7].unlink()
    (archive / "png").mkdir()
    for index, pixels in enumerate((make_chest() + 1000).clip(0, 255).astype(np.uint8)):
        cv2.imwrite(str(archive / "png" / f"{index:03d}.png"), pixels)
    monkeypatch.setenv("DARNET_PSEUDONYM_KEY", SECRET)
    flags = ["--cam-images", str(images), "--cam-choice.share", "0"]
    summary = finish_job(start_job(archive, model, tmp_path / "results", *flags))
    assert summary["cam_images"] == {"place": str(images), "chosen": 0, "written": 0}
    table = pq.read_table(tmp_path / "results" / "predictions" / "c00000001.parquet")
    rows = {row["source"]: row for row in table.to_pylist()}
    nulls = {source: {name for name, value in row.items() if value is None} for source, row in rows.items()}
    unscored = {name for name in table.column_names if name.startswith(("probability", "fold", "cam", "depth_gate"))}
    unscored |= {"prediction", "lung_fraction", "model_s"}
    no_unit = {"slice_spacing_mm", "pixel_spacing_mm", "cam_in_lung_fraction", "cam_left_fraction", "lung_fraction"}
    assert nulls == {
        "Doe^Jane": set(),
        "gap": unscored | {"intensity", "slice_spacing_mm", "pixel_spacing_mm"},
        "png": no_unit | {"patient_key", "series_key", "manufacturer"},
    }
    for source, row in rows.items():
        files = list((archive / source).iterdir())
        assert (row["num_files"], row["num_bytes"]) == (len(files), sum(path.stat().st_size for path in files))
        assert row["input_sha256"] == _digest_source(archive, archive / source)
        assert (row["commit"], row["night"], row["run_id"]) == (1, NIGHT, summary["run_id"])
        assert row["decode_s"] > 0
        assert row["fetch_s"] > 0
    chest = rows["Doe^Jane"]
    assert chest["scan_id"] == f"Doe^Jane#{hashlib.sha256(SERIES_UID.encode()).hexdigest()[:8]}"
    assert (chest["patient_key"], chest["series_key"]) == (_hmac("patient-1"), _hmac(SERIES_UID))
    assert (chest["slice_spacing_mm"], chest["pixel_spacing_mm"], chest["num_slices"]) == (12.0, 6.0, 24)
    assert (chest["manufacturer"], chest["intensity"], rows["png"]["intensity"]) == ("GE", "HU", "DISPLAY")
    assert (len(chest["cam_depth_profile"]), len(chest["depth_gate_profile"])) == (16, 2)
    names = {
        hashlib.sha256((row["input_sha256"] + row["scan_id"]).encode()).hexdigest()
        for row in rows.values()
        if row["status"] == "OK"
    }
    kept = [path.relative_to(images) for path in images.rglob("*") if path.is_file()]
    assert sorted(map(str, kept)) == sorted(f"{summary['run_id']}/{name}.png" for name in names)
    page = Path(summary["report"]).read_text()
    listed = {source for source in ("Doe^Jane", "png") if f">{rows[source]['scan_id']}</th>" in page}
    assert listed == {"Doe^Jane", "png"}  # the folds of this bundle disagree on every scan
    assert page.count("data:image/jpeg;base64,") == len(listed)


@pytest.mark.slow
@pytest.mark.s3
@pytest.mark.usefixtures("ray_cluster")
def test_a_bucket_gives_the_bits_of_a_folder(model: str, s3: Callable[[], str], tmp_path: Path) -> None:
    """The bucket's by a job of its own, since workers of the shared cluster do not know this server."""
    write_archive(tmp_path / "archive", 3)
    bucket = s3()
    local, remote = open_store(str(tmp_path / "archive")), open_store(f"{bucket}/archive/with space")
    for item in local.list_objects():
        remote.write_bytes(item.key, local.read_bytes(item.key))
    pictures = []
    for archive, place in ((str(tmp_path / "archive"), str(tmp_path)), (remote.uri, bucket)):
        flags = ["--cam-images", f"{place}/images", "--cam-choice.predictions", "CP,NCP,Normal"]
        if place == bucket:
            summary = finish_job(start_job(archive, model, f"{place}/results", *flags))
        else:
            places = ["--archive", archive, "--model", model, "--results", f"{place}/results", "--night", "2026-01-01"]
            summary = jobs.score.work(read_settings(ScoreSettings, [*places, *flags], "x"))
        assert summary["published"] == 1
        assert summary["cam_images"] == {"place": f"{place}/images", "chosen": 5, "written": 5}
        images = open_store(f"{place}/images")
        pictures.append(sorted(images.read_bytes(item.key) for item in images.list_objects(f"{summary['run_id']}/")))
    here, there = read_predictions(str(tmp_path / "results")), read_predictions(f"{bucket}/results")
    assert list(here["scan_id"]) == list(there["scan_id"])
    assert here[NUMBERS].equals(there[NUMBERS])
    assert here.loc[here["status"] == "OK", NUMBERS[0]].nunique() == 4  # one chest is there twice: the same bits
    assert [len(found) for found in pictures] == [5, 5]
    assert pictures[0] == pictures[1]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_store_that_lets_nobody_in_stops_the_job_with_that_error(model: str, tmp_path: Path) -> None:
    """Raised in a worker, it must reach the driver as what it is: the exit code depends on it."""
    write_chest(tmp_path / "archive" / "a")
    archive = LockedStore(tmp_path / "archive")
    stores = open_store(model), open_store(str(tmp_path / "results"), create=True)
    with pytest.raises(CredentialsError, match="nobody enters"):
        score_archive(NightRequest(archive, *stores, CONFIG, NIGHT))
    assert not list((tmp_path / "results").glob("predictions/*"))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_plan_that_workers_cannot_read_stops_the_job_with_that_error(model: str, tmp_path: Path) -> None:
    """As where the results lie on a disk that only the driver sees."""
    write_chest(tmp_path / "archive" / "a")
    archive, results = open_store(str(tmp_path / "archive")), open_store(str(tmp_path / "elsewhere"))
    run = RunFacts("r", NIGHT, read_manifest(open_store(model), CONFIG), "0")
    request = NightRequest(archive, open_store(model), results, CONFIG)
    dataset = score_planned(request, run, [0], RunFolder(results, "run").read_sources)
    with pytest.raises(ObjectMissing, match="every node must see"):
        next(collect_sources(dataset))


def test_a_bundle_that_an_actor_refuses_stops_the_job_with_that_error(tmp_path: Path) -> None:
    """One wrong byte: the driver reads no weights."""
    manifest = write_random_bundle(tmp_path / "model").manifest
    path = tmp_path / "model" / "fold3.safetensors"
    path.write_bytes(flip_bit(path.read_bytes(), 5000))

    class Blocks:
        def iter_batches(self, **_: Any) -> Iterator[dict[str, list[bytes]]]:
            run = RunFacts("run", NIGHT, manifest, "0")
            yield ScoringActor(LocalStore(tmp_path / "model"), run, CONFIG, "cpu")(pa.table({}))

    with pytest.raises(UsageError, match=r"fold3\.safetensors: damaged"):
        next(collect_sources(Blocks()))  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_kill_loses_so_many_scans_and_not_sources(tmp_path: Path) -> None:
    """Five sources of three scans, and one of one: a part is written as soon as four scans or more are whole."""
    folder, left = RunFolder(open_store(str(tmp_path)), "run"), []

    class Blocks:
        def iter_batches(self, **_: Any) -> Iterator[dict[str, list[bytes]]]:
            for source in "abcde":
                for scan in range(3):
                    num_staged = sum(pq.read_metadata(path).num_rows for path in tmp_path.rglob("*.parquet"))
                    left.append(3 * "abcde".index(source) - num_staged)
                    yield {"row": [pickle.dumps((source, 3, make_row(f"{source}#{scan}")))]}
            yield {"row": [pickle.dumps(("f", 1, make_row("f")))]}

    stage_rows(Blocks(), folder, 6, part_scans=4)  # type: ignore[arg-type]
    assert sorted(pq.read_metadata(path).num_rows for path in tmp_path.rglob("*.parquet")) == [4, 6, 6]
    assert max(left) == 3
    assert folder.read_parts().num_rows == 16


class Told:
    """Blocks as actors yield them: of each row its source, how many scans that has, and the scan."""

    def __init__(self, *blocks: list[tuple[str, int, str]]) -> None:
        self._blocks = blocks

    def iter_batches(self, **_: Any) -> Iterator[dict[str, list[bytes]]]:
        for block in self._blocks:
            yield {"row": [pickle.dumps((source, number, make_row(scan))) for source, number, scan in block]}


def test_a_task_run_again_that_reads_otherwise_doubles_no_scan(tmp_path: Path) -> None:
    """First a had trouble, a row; the second time it had three scans, and the block after the first begins earlier."""
    first = [("a", 1, "a"), ("b", 1, "b"), ("c", 2, "c#1")]
    second = [("c", 2, "c#1"), ("d", 1, "d")]  # the second scan of c stays in a block that Ray has had already
    folder = begin_run(open_store(str(tmp_path)), *map(make_source, "abcd"), run_id="run")
    stage_rows(Told(first, second), folder, 4, part_scans=64)  # type: ignore[arg-type]
    assert sorted(folder.read_parts().keys["scan_id"].to_pylist()) == ["a", "b", "d"]
    discard = "say python -m jobs.score .* --discard run --reason WHY"
    lost = "row 3 of .* is planned, but has no row.*start the same night again"
    with pytest.raises(RunError, match=f"{lost}.*{discard}"):
        check_rows(folder.list_planned_sources(), folder.read_parts(), ORIGIN, suggest_discard(folder.store, "run"))

    stage_rows(Told([("c", 2, "c#1"), ("c", 2, "c#2")]), folder, 1, part_scans=64)  # type: ignore[arg-type]
    check_rows(folder.list_planned_sources(), folder.read_parts(), ORIGIN)
    assert folder.read_parts().num_rows == 5


def test_of_a_source_told_in_two_ways_the_newest_counts() -> None:
    """With as many scans as its last rows say, and none of another telling."""
    blocks = Told(
        [("a", 3, "a#1"), ("a", 3, "a#2")], [("a", 1, "a")], [("b", 1, "b"), ("b", 2, "b#1"), ("b", 2, "b#2")]
    )
    whole = [(key, [row["scan_id"] for row in rows]) for key, rows in collect_sources(blocks)]  # type: ignore[arg-type]
    assert whole == [("a", ["a"]), ("b", ["b"]), ("b", ["b#1", "b#2"])]


@pytest.mark.slow
def test_an_archive_without_a_scan_is_taken_for_a_wrong_address(model: str, tmp_path: Path) -> None:
    """A mistyped prefix of a bucket lists as empty, and no night may call that success."""
    (tmp_path / "README.txt").write_text("no scan")
    stores = LocalStore(tmp_path), open_store(model), open_store(str(tmp_path / "results"), create=True)
    with pytest.raises(UsageError, match="nothing in it looks like a scan"):
        score_archive(NightRequest(*stores, CONFIG, NIGHT))


@pytest.mark.slow
def test_a_run_is_resumed_only_under_the_same_settings(model: str, tmp_path: Path) -> None:
    """Limits decide final rows: parts of two settings must not end in one run."""
    night = NightRequest(LocalStore(tmp_path), open_store(model), LocalStore(tmp_path), CONFIG)
    manifest = read_manifest(night.model, CONFIG)
    limits = ScoreConfig(decode=DecodeConfig(min_slices=5))
    backend = CONFIG.model_copy(update={"backend": "openvino"})
    decode = CONFIG.decode.model_copy(update={"num_threads": 3})
    moved = CONFIG.model_copy(update={"cache": tmp_path, "part_scans": 7, "decode": decode})
    assert (
        len({describe_work(replace(night, config=each), manifest) for each in (CONFIG, limits, backend, CONFIG, moved)})
        == 3
    )


def _begin_night(archive: Path, model: str, results: Path) -> str:
    """What a job killed right after planning leaves; the run's id."""
    request = NightRequest(LocalStore(archive), open_store(model), open_store(str(results), create=True), CONFIG)
    work = replace(describe_work(request, read_manifest(request.model, CONFIG)), device="cpu")
    folder = plan_night(request.archive, request.results, work, NIGHT, EVERYTHING).folder
    assert folder is not None
    return folder.run_id


def test_only_what_changes_a_row_is_part_of_what_a_run_is(model: str, tmp_path: Path) -> None:
    """A night that a driver left behind goes on with more actors, or under gates that a person has moved meanwhile."""
    night = NightRequest(LocalStore(tmp_path), open_store(model), LocalStore(tmp_path), CONFIG)
    manifest = read_manifest(night.model, CONFIG)

    def describe(**changes: Any) -> Work:
        return describe_work(replace(night, config=CONFIG.model_copy(update=changes)), manifest)

    for change in (
        {"gate_psi": 0.5},
        {"gate_min_scans": 1},
        {"gate_err_share": 0.5},
        {"num_actors": 2},
        {"part_scans": 9},
    ):
        assert describe(**change) == describe()
    for change in ({"batch_size": 2}, {"decode": DecodeConfig(max_slices=20)}, {"backend": "openvino"}):
        assert describe(**change) != describe()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_an_unfinished_run_is_finished_first_and_what_arrived_since_after_it(model: str, tmp_path: Path) -> None:
    archive, results = tmp_path / "archive", tmp_path / "results"
    for name in ("a", "b"):
        write_chest(archive / name)
    begun = _begin_night(archive, model, results)
    write_chest(archive / "late", make_chest()[:, :, ::-1])
    stores = open_store(str(archive)), open_store(model), open_store(str(results))
    preview = preview_archive(NightRequest(*stores, CONFIG))
    assert (preview["unfinished_runs"], preview["planned_sources"]) == ([begun], 3)

    summary = score_archive(NightRequest(*stores, CONFIG, date(2026, 1, 2)))
    (first,) = summary["finished_first"]
    assert (first["run_id"], first["night"], first["planned_sources"], first["published"]) == (
        begun,
        "2026-01-01",
        2,
        1,
    )
    assert (summary["night"], summary["planned_sources"], summary["published"]) == ("2026-01-02", 1, 2)
    assert summary["run_id"] != begun
    rows = read_predictions(str(results))
    assert [(row.source, row.commit, str(row.night)) for row in rows.itertuples()] == [
        ("a", 1, "2026-01-01"),
        ("b", 1, "2026-01-01"),
        ("late", 2, "2026-01-02"),
    ]
    assert (
        find_unfinished(stores[2], describe_work(NightRequest(*stores, CONFIG), read_manifest(stores[1], CONFIG))) == []
    )
    assert score_archive(NightRequest(*stores, CONFIG, NIGHT))["published"] is None


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_discarded_run_is_not_finished_and_its_sources_are_planned_anew(model: str, tmp_path: Path) -> None:
    archive, results = tmp_path / "archive", tmp_path / "results"
    write_chest(archive / "a")
    begun = _begin_night(archive, model, results)
    settings = ScoreSettings(results=str(results), discard=begun, reason="wrong bundle")
    assert decide_hold(open_store(str(results)), settings)["decision"] == "discarded"
    write_chest(archive / "b", make_chest()[:, :, ::-1])
    summary = _score(archive, model, results)
    assert (summary["finished_first"], summary["planned_sources"], summary["published"]) == ([], 2, 1)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["accept", "discard"])
def test_a_decision_makes_no_place_for_results(verb: str, tmp_path: Path) -> None:
    settings = ScoreSettings(results=str(tmp_path / "typo"), reason="seen", **{verb: "run"})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="typo: run 'run' is not held; held here: none"):
        jobs.score.work(settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_raised_limit_reopens_nothing_in_the_same_table(model: str, tmp_path: Path) -> None:
    """What docs/night.md says of limits: the key of a final row has none, and a table of its own scores such a scan."""
    write_chest(tmp_path / "archive" / "a")
    stores = open_store(str(tmp_path / "archive")), open_store(model)
    tables = [open_store(str(tmp_path / name), create=True) for name in ("results", "large")]
    narrow = CONFIG.model_copy(update={"decode": DecodeConfig(max_slices=20)})
    assert score_archive(NightRequest(*stores, tables[0], narrow, NIGHT))["statuses"] == {"BAD_LIMIT": 1}
    assert score_archive(NightRequest(*stores, tables[0], CONFIG, NIGHT))["planned_sources"] == 0
    assert score_archive(NightRequest(*stores, tables[1], CONFIG, NIGHT))["statuses"] == {"OK": 1}


@pytest.mark.slow
def test_a_killed_job_loses_no_row_and_doubles_none(model: str, tmp_path: Path) -> None:
    archive, results = tmp_path / "archive", tmp_path / "results"
    write_archive(archive, 30)
    (results / "predictions").mkdir(parents=True)
    reader = PollingReader(results)
    reader.start()
    job = start_job(archive, model, results)
    deadline_s = time.monotonic() + 180
    while count_parts(results) < 2 and time.monotonic() < deadline_s and job.poll() is None:
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    num_parts = count_parts(results)
    assert num_parts >= 2
    assert list((results / "predictions").iterdir()) == []
    parts = [pq.read_table(path) for path in results.glob("_runs/*/parts/*.parquet")]
    assert {part.num_rows for part in parts} <= {2, 3}  # 3: one scan, and a source of two

    summary = finish_job(start_job(archive, model, results))
    seen = reader.stop()
    assert (summary["exit_code"], summary["published"]) == (0, 1)
    assert summary["resumed_sources"] == sum(len(part["source"].unique()) for part in parts)
    assert summary["statuses"] == {"OK": 32, "BAD_MISSING_SLICE": 1}
    table = pq.read_table(results / "predictions" / "c00000001.parquet")
    keys = list(zip(table["source"].to_pylist(), table["scan_id"].to_pylist(), strict=True))
    assert len(keys) == len(set(keys)) == 33
    assert len(seen) > 100
    assert (set(seen), seen[-1]) == ({0, 33}, 33)  # nothing, then the whole run


@pytest.mark.s3
@pytest.mark.slow
@pytest.mark.skipif(not REAL_CT.is_dir(), reason="real CT scans (../shared/data/ct) are not on this machine")
def test_real_chests_have_the_same_bits_from_a_bucket(s3: Callable[[], str], tmp_path: Path) -> None:
    model = tmp_path / "bundle"
    write_random_bundle(model, shape=(32, 96, 96))
    bucket = s3()
    local, remote = open_store(str(REAL_CT)), open_store(f"{bucket}/ct")
    for item in local.list_objects():
        remote.write_bytes(item.key, local.read_bytes(item.key))
    for archive, results in ((str(REAL_CT), str(tmp_path / "results")), (remote.uri, f"{bucket}/results")):
        summary = finish_job(start_job(archive, str(model), results))
        assert (summary["exit_code"], summary["published"]) == (0, 1)
    here, there = read_predictions(str(tmp_path / "results")), read_predictions(f"{bucket}/results")
    assert list(here["scan_id"]) == list(there["scan_id"])
    assert here["status"].equals(there["status"])
    assert here[NUMBERS].equals(there[NUMBERS])
    assert sorted(here.loc[here["status"] == "OK", "num_slices"]) == [30, 98, 275]
    sources = {str(path.parent.relative_to(REAL_CT)) for path in (REAL_CT / "odd").rglob("*") if path.is_file()}
    assert sources <= set(here["source"])  # every odd file lies in a source that has its row


@pytest.mark.slow
def test_a_submitted_job_scores_on_a_running_cluster(head_node: Any, model: str, tmp_path: Path) -> None:
    ray, environment = head_node
    write_archive(tmp_path / "archive", 2)
    places = ["--archive", str(tmp_path / "archive"), "--model", model, "--results", str(tmp_path / "results")]
    command = [ray, "job", "submit", "--working-dir", str(ROOT), "--submission-id", "night-2026-01-01-a1", "--"]
    done = subprocess.run(
        [*command, "python", "-m", "jobs.score", *places],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = read_predictions(str(tmp_path / "results"))
    assert sorted(rows["status"]) == ["BAD_MISSING_SLICE", "OK", "OK", "OK", "OK"]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_connect_keeps_the_session_it_finds() -> None:
    import ray

    before = ray.get_runtime_context().get_node_id()
    connect()
    assert ray.get_runtime_context().get_node_id() == before
