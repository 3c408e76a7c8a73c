"""The paper's comparison from the command line: each network as if alone, pairs by scikit-learn, tables counted."""

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import accuracy_score, roc_auc_score

from darnet import NOTICE
from darnet.bundle import load_networks, read_bundle
from darnet.cam import upsample_cam
from darnet.config import ModelConfig, VolumeConfig
from darnet.errors import UsageError
from darnet.evaluation.evaluate import find_sided, run_evaluation
from darnet.evaluation.paper import MODEL_NAMES, TABLE_1, TABLE_3
from darnet.evaluation.paper import NETWORKS as PAPER_NETWORKS
from darnet.evaluation.seeds import merge_seeds, refuse_unlike
from darnet.evaluation.study_maps import choose_cases
from darnet.evaluation.truth import Truth, write_truth
from darnet.job import run_job
from darnet.manifest import NETWORKS, name_model
from darnet.model import DARNet, count_parameters
from darnet.settings import EvaluateSettings
from darnet.storage import open_store
from darnet.volumes_folder import write_facts, write_index
from tests.browser_fixtures import draw_screen, list_requests, read_dom
from tests.bundle_fixtures import SHAPE, write_four_bundles, write_random_bundle
from tests.volumes_fixtures import make_cohort

pytestmark = pytest.mark.slow

VOLUME = VolumeConfig(shape=SHAPE)
NUM_TRAIN, NUM_TEST = 10, 12
HISTORY = "".join(
    json.dumps(
        {"fold": fold, "epoch": epoch, "train_loss": 1 / (epoch + 1), "validation_loss": 1.0, "accuracy_3class": 0.5}
    )
    + "\n"
    for fold in range(5)
    for epoch in range(3)
)
NO_HISTORY = "The bundles do not keep every fold model's history, and curves are of those kept"


def run(*arguments: Any) -> int:
    return run_job("evaluate", EvaluateSettings, run_evaluation, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Volumes, four bundles (one with a history), and the report on them."""
    home = tmp_path_factory.mktemp("study")
    cohort = make_cohort(home / "volumes", NUM_TRAIN, 2, NUM_TEST, VOLUME)
    write_index(open_store(str(home / "volumes")), cohort, VOLUME)
    bundles = write_four_bundles(home / "bundles")
    (bundles / "darnet-da" / "metrics.jsonl").write_text(HISTORY)
    store = open_store(str(home / "truth"), create=True)
    for number in range(NUM_TRAIN, NUM_TRAIN + NUM_TEST):
        lung, lesion = np.zeros(SHAPE, np.bool_), np.zeros(SHAPE, np.bool_)
        lung[2:14, 4:28, 4:28] = True
        if number % 3 != 2:  # the third is Normal
            lesion[4 : 6 + number % 5, 8:16, 8:16] = True
        write_truth(store, Truth(f"scan-{number:03d}", lesion, lung, (5.0, 4.0, 4.0)))
    places = ("--model", bundles, "--volumes", home / "volumes", "--out", home / "out")
    assert run(*places, "--truth", home / "truth") == 0
    return {name: home / name for name in ("volumes", "bundles", "out", "truth")}


@pytest.fixture(scope="module")
def metrics(places: dict[str, Path]) -> dict[str, Any]:
    return json.loads((places["out"] / "metrics.json").read_text())


def test_names_are_those_of_the_bundles_in_the_papers_order() -> None:
    assert tuple(MODEL_NAMES) == tuple(name_model(ModelConfig(**attentions)) for attentions in NETWORKS)
    assert tuple(MODEL_NAMES.values()) == PAPER_NETWORKS == tuple(TABLE_3["auc_ncp"])
    assert {name: sum(counts.values()) for name, counts in TABLE_1.items()} == {"train": 3600, "test": 472}


def test_the_full_network_speaks_at_the_top_level(metrics: dict[str, Any]) -> None:
    assert metrics["network"] == "DA+CA"
    assert list(metrics["networks"]) == ["ResNet18", "CA", "DA", "DA+CA"]
    full = metrics["networks"]["DA+CA"]
    assert {name: metrics[name] for name in full} == full
    assert metrics["model_name"] == "darnet-da-ca"
    assert metrics["notice"] == NOTICE


@pytest.mark.parametrize("attentions", NETWORKS)
def test_each_network_is_measured_as_if_alone(
    attentions: dict[str, bool], places: dict[str, Path], metrics: dict[str, Any], tmp_path: Path
) -> None:
    model = name_model(ModelConfig(**attentions))
    run("--model", places["bundles"] / model, "--volumes", places["volumes"], "--out", tmp_path)
    alone = json.loads((tmp_path / "metrics.json").read_text())
    found = dict(metrics["networks"][MODEL_NAMES[model]])
    config = ModelConfig(volume_shape=SHAPE, base_channels=4, **attentions)
    assert found.pop("num_parameters") == count_parameters(DARNet(config))
    assert found.pop("input") == f"predictions-{model}.parquet"
    alone.pop("input")
    assert found == alone


def test_a_pair_has_the_differences_of_its_networks(places: dict[str, Path], metrics: dict[str, Any]) -> None:
    pairs = {(pair["first"], pair["second"]): pair for pair in metrics["comparisons"]}
    values = {}
    for name, model in (("DA", "darnet-da"), ("ResNet18", "darnet-plain")):
        table = pd.read_parquet(places["out"] / f"predictions-{model}.parquet")
        mean = table.groupby("scan_id")[["prob_cp", "prob_ncp", "prob_normal"]].mean()
        labels = table.groupby("scan_id")["label"].first().to_numpy()
        called = np.array(["CP", "NCP", "Normal"])[mean.to_numpy().argmax(axis=1)]
        values[name] = accuracy_score(labels, called), roc_auc_score(labels == "NCP", mean["prob_ncp"])
    found = pairs["DA", "ResNet18"]
    assert found["differences"]["accuracy_3class"] == pytest.approx(values["DA"][0] - values["ResNet18"][0])
    assert found["auc_ncp_delong"]["difference"] == pytest.approx(values["DA"][1] - values["ResNet18"][1])


def test_every_two_networks_are_compared_whatever_their_accuracy(metrics: dict[str, Any]) -> None:
    assert [(pair["first"], pair["second"]) for pair in metrics["comparisons"]] == [
        *(("CA", "ResNet18"), ("DA", "ResNet18"), ("DA+CA", "ResNet18")),
        *(("DA", "CA"), ("DA+CA", "CA"), ("DA+CA", "DA")),
    ]


def test_the_report_has_the_papers_tables_beside_this_run(places: dict[str, Path]) -> None:
    report = (places["out"] / "report.html").read_text()
    for part in ("Table 1", "Table 2", "Table 3", "ROC curves", "Training curves", "Networks compared"):
        assert f"<h2>{part}" in report, part
    assert "paper: DA+CA" in report
    assert "0.9470 ± 0.0054" in report
    for name, num_scans in (("Zhang et al. 2020 [25]", 389), ("Jin et al. 2020 [12]", 3784), ("He", 798)):
        assert f'<th scope="row" class="text">{name}' in report
        assert f'<td class="number">{num_scans}</td>' in report
    assert '<td class="number">35.15</td>' in report
    assert '<td class="number">1320</td>' in report
    assert NOTICE in report
    assert "not shown" in report
    for name in ("tables.csv", "tables.tex"):
        assert "Research use only" in (places["out"] / name).read_text()
    assert set(pd.read_csv(places["out"] / "tables.csv")["network"].dropna()) == set(PAPER_NETWORKS)


def test_table_1_fold_differences_and_maps_are_in_the_tables_for_programs(
    places: dict[str, Path], metrics: dict[str, Any]
) -> None:
    table = pd.read_csv(places["out"] / "tables.csv")
    counts = table[table["network"].isna()].set_index("metric")["value"]
    assert (counts["scans_train_cp"], counts["scans_test_normal"], len(counts)) == (4, 4, 6)
    pair = next(item for item in metrics["comparisons"] if item["first"] == "CA")
    where = (table["network"] == "CA") & (table["minus"] == "ResNet18")
    row = table[where & (table["metric"] == "accuracy_3class")].iloc[0]
    fold = pair["folds"]["accuracy_3class"]
    assert [row["folds_ci95_low"], row["folds_ci95_high"]] == pytest.approx(fold["ci95"])
    ncp = metrics["activation_maps"][0]
    where = (table["network"] == "DA") & (table["metric"] == "maps_ncp_dice_half_maximum")
    one, difference = table[where & table["minus"].isna()].iloc[0], table[where & table["minus"].notna()].iloc[0]
    assert one["value"] == pytest.approx(ncp["networks"]["DA"]["dice_half_maximum"]["mean"])
    assert one["by_chance"] == pytest.approx(ncp["chance"]["dice_half_maximum"])
    (found,) = [item for item in ncp["differences"] if (item["first"], item["measure"]) == ("DA", "dice_half_maximum")]
    assert difference["folds_mean"] == pytest.approx(found["folds"]["mean"])
    tex = (places["out"] / "tables.tex").read_text()
    for label in ("cohorts", "maps-NCP", "map-differences-NCP", "maps-CP", "map-differences-CP"):
        assert rf"\label{{tab:{label}}}" in tex


def test_cohorts_are_counted(metrics: dict[str, Any]) -> None:
    assert metrics["cohort_counts"] == {
        "train": {"CP": 4, "NCP": 3, "Normal": 3},
        "test": {"CP": 4, "NCP": 4, "Normal": 4},
    }


def test_maps_are_measured_on_scans_with_lesions_against_their_truth(
    places: dict[str, Path], metrics: dict[str, Any]
) -> None:
    ncp, cp = metrics["activation_maps"]
    assert [(item["diagnosis"], item["num_scans"]) for item in (ncp, cp)] == [("NCP", 4), ("CP", 4)]
    assert set(ncp["networks"]) == set(PAPER_NETWORKS)
    assert {(item["first"], item["second"]) for item in ncp["differences"]} == {
        ("DA", "ResNet18"),
        ("DA+CA", "CA"),
        ("DA+CA", "ResNet18"),
    }
    networks = load_networks(read_bundle(open_store(str(places["bundles"] / "darnet-da"))))
    frame = pd.read_parquet(places["volumes"] / "cohort.parquet")
    frame = frame[(frame["cohort"] == "test") & (frame["diagnosis"] == "NCP")]
    shares = []
    for name in frame["array"]:
        voxels = torch.from_numpy(np.load(places["volumes"] / name))[None, None].float() / 255
        with torch.inference_mode():
            maps = [torch.einsum("cdhw,c->dhw", item.features(voxels)[0], item.head.weight[1]) for item in networks]
        cam = upsample_cam(torch.stack(maps).mean(0), SHAPE)
        shares.append(cam[2:14, 4:28, 4:28].sum() / cam.sum() if cam.max() > 0 else np.nan)
    found = ncp["networks"]["DA"]["cam_in_lung"]["mean"]
    assert (found is None) == bool(np.isnan(shares).all())
    assert found is None or found == pytest.approx(np.nanmean(shares), abs=1e-4)
    assert set(ncp["redrawn_rank_correlation"]) == set(PAPER_NETWORKS)


def test_the_report_says_of_depth_attention_what_the_differences_say(
    places: dict[str, Path], metrics: dict[str, Any]
) -> None:
    report = (places["out"] / "report.html").read_text()
    pairs = {("DA", "ResNet18"), ("DA+CA", "CA")}
    for maps in metrics["activation_maps"]:
        verdicts = {item["verdict"] for item in maps["differences"] if (item["first"], item["second"]) in pairs}
        told = f"<p>{maps['diagnosis']}: that depth attention helps maps find lesions is not shown"
        assert (told in report) == (verdicts == {"not shown"})


def test_maps_of_networks_that_know_nothing_are_doubted(places: dict[str, Path], metrics: dict[str, Any]) -> None:
    report = (places["out"] / "report.html").read_text()
    doubtful = [name for name, item in metrics["networks"].items() if not item["auc_ncp_ci95"][0] > 0.5]
    assert doubtful  # the bundles are untrained
    assert f"Mind: {', '.join(doubtful)}: not shown to tell NCP from the rest" in report


def test_only_scans_in_hounsfield_units_are_known_by_side(tmp_path: Path) -> None:
    """Slice images keep no side; a folder without facts of its scans says nothing of them."""
    settings = EvaluateSettings(model=str(tmp_path), volumes=str(tmp_path), out=str(tmp_path / "out"))
    assert find_sided(settings) == frozenset()
    facts = pd.DataFrame({"scan_id": ["a", "b", "c"], "intensity": ["HU", "DISPLAY", None]})
    write_facts(open_store(str(tmp_path)), facts)
    assert find_sided(settings) == {"a"}


def test_cases_are_the_least_middle_and_most_severe() -> None:
    assert choose_cases([0.5, 0.1, 0.9, 0.3, 0.7]) == [1, 0, 2]
    assert choose_cases([0.5, 0.1]) == [1, 0]
    assert choose_cases([]) == []


def test_figure_two_is_a_picture_of_its_own_too(places: dict[str, Path]) -> None:
    image = cv2.imread(str(places["out"] / "fig2.png")).astype(int)
    assert image.shape[1] > image.shape[0] > 500
    assert ((image[..., 0] - image[..., 2]) > 60).sum() > 100  # the outline of a known lesion
    assert "NCP test cases of least, middle and most severity. Left" in (places["out"] / "report.html").read_text()


@pytest.mark.slow
def test_without_truth_maps_are_shown_and_not_measured(seeds: Path) -> None:
    report = (seeds / "out" / "report.html").read_text()
    assert json.loads((seeds / "out" / "metrics.json").read_text())["activation_maps"] == []
    assert "No truth about lesions was given (--truth)" in report
    assert "NCP test cases of least, middle and highest NCP probability by DA+CA. How ill" in report
    assert "most severity" not in report


def test_truth_without_a_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--predictions", "t.csv", "--truth", tmp_path, "--out", tmp_path / "out") == 2
    assert "truth needs model" in capsys.readouterr().err


def test_a_folder_without_bundles_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bundles").mkdir()
    assert run("--model", tmp_path / "bundles", "--volumes", tmp_path, "--out", tmp_path / "out") == 2
    assert "nor in darnet-plain, darnet-ca, darnet-da, darnet-da-ca" in capsys.readouterr().err


def test_a_second_table_has_no_place_beside_several_networks(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = places["out"] / "predictions-darnet-da.parquet"
    arguments = ("--model", places["bundles"], "--volumes", places["volumes"], "--out", tmp_path, "--compare", table)
    assert run(*arguments) == 2
    assert "holds several networks" in capsys.readouterr().err


def test_two_bundles_of_one_network_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("darnet-da", "darnet-ca"):
        write_random_bundle(tmp_path / "bundles" / name)
    write_index(open_store(str(tmp_path / "volumes")), make_cohort(tmp_path / "volumes", 4, 2, 3, VOLUME), VOLUME)
    arguments = ("--model", tmp_path / "bundles", "--volumes", tmp_path / "volumes", "--out", tmp_path / "out")
    assert run(*arguments) == 2
    assert "of the same network" in capsys.readouterr().err


def test_networks_of_two_trainings_are_no_pair(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundles = write_four_bundles(tmp_path / "bundles")
    path = bundles / "darnet-da" / "bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cohort_sha256": "1" * 64}))
    assert run("--model", bundles, "--volumes", places["volumes"], "--out", tmp_path / "out") == 2
    assert "darnet-plain and darnet-da were not trained alike (cohort)" in capsys.readouterr().err


def test_a_damaged_history_is_refused_by_name(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundles = write_four_bundles(tmp_path / "bundles")
    (bundles / "darnet-ca" / "metrics.jsonl").write_text("{half")
    assert run("--model", bundles, "--volumes", places["volumes"], "--out", tmp_path / "out") == 2
    assert "darnet-ca/metrics.jsonl: not a line of JSON an epoch" in capsys.readouterr().err


def test_the_report_says_which_fold_models_have_no_history(places: dict[str, Path], seeds: Path) -> None:
    report = html.unescape((places["out"] / "report.html").read_text())
    assert f"{NO_HISTORY} (ResNet18: 0 of 5; CA: 0 of 5; DA+CA: 0 of 5)." in report
    report = html.unescape((seeds / "out" / "report.html").read_text())
    assert f"{NO_HISTORY} (ResNet18: 5 of 10)." in report


@pytest.fixture(scope="module")
def seeds(places: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on two networks, each trained with two seeds, without truth; one bundle of four keeps no history."""
    home = tmp_path_factory.mktemp("seeds")
    for seed in (0, 1):
        for attentions in NETWORKS[::3]:
            folder = home / "bundles" / f"seed{seed}" / name_model(ModelConfig(**attentions))
            write_random_bundle(folder, f"v{seed}", attentions=attentions, seed=seed)
            if (seed, attentions) != (1, NETWORKS[0]):
                (folder / "metrics.jsonl").write_text(HISTORY)
    assert run("--model", home / "bundles", "--volumes", places["volumes"], "--out", home / "out") == 0
    return home


def test_bundles_of_several_seeds_are_paired_by_fold_and_seed(seeds: Path) -> None:
    metrics = json.loads((seeds / "out" / "metrics.json").read_text())
    assert list(metrics["networks"]) == ["ResNet18", "DA+CA"]
    assert (metrics["seeds"], metrics["num_seeds"], metrics["num_folds"]) == (["0", "1"], 2, 5)
    assert re.fullmatch(r"v0-\w{8}, v1-\w{8}", metrics["model_version"])
    (pair,) = metrics["comparisons"]
    assert {(item["num_pairs"], item["num_seeds"]) for item in pair["folds"].values()} == {(10, 2)}
    accuracies = {}
    for model in ("darnet-plain", "darnet-da-ca"):
        table = pd.read_parquet(seeds / "out" / f"predictions-{model}.parquet")
        called = table[["prob_cp", "prob_ncp", "prob_normal"]].to_numpy().argmax(axis=1)
        is_right = np.array(["CP", "NCP", "Normal"])[called] == table["label"]
        accuracies[model] = is_right.groupby([table["fold"], table["seed"]]).mean()
        assert len(accuracies[model]) == 10
    difference = accuracies["darnet-da-ca"] - accuracies["darnet-plain"]
    assert pair["folds"]["accuracy_3class"]["mean"] == pytest.approx(difference.mean())
    report = (seeds / "out" / "report.html").read_text()
    assert "each of 10 fold models (5 folds, 2 seeds)" in report
    assert "or this training seed" not in report


def test_each_seed_says_in_company_what_it_says_alone(seeds: Path, places: dict[str, Path], tmp_path: Path) -> None:
    alone = seeds / "bundles" / "seed1" / "darnet-da-ca"
    assert run("--model", alone, "--volumes", places["volumes"], "--out", tmp_path) == 0
    together = pd.read_parquet(seeds / "out" / "predictions-darnet-da-ca.parquet").query("seed == 1")
    expected = pd.read_parquet(tmp_path / "predictions.parquet")
    pd.testing.assert_frame_equal(together.reset_index(drop=True), expected)


def test_networks_of_other_seeds_than_the_rest_are_refused(
    seeds: Path, places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundles = tmp_path / "bundles"
    shutil.copytree(seeds / "bundles", bundles)
    shutil.rmtree(bundles / "seed1" / "darnet-plain")
    assert run("--model", bundles, "--volumes", places["volumes"], "--out", tmp_path / "out") == 2
    assert "DA+CA has other folds or seeds" in capsys.readouterr().err


def test_a_training_that_differs_in_more_than_its_seed_is_refused(
    seeds: Path, places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(seeds / "bundles" / "seed0", tmp_path / "bundles" / "seed0")
    other = tmp_path / "bundles" / "seed1" / "darnet-da-ca"
    write_random_bundle(other, "v1", attentions=NETWORKS[3], seed=1)
    manifest = json.loads((other / "bundle.json").read_text())
    (other / "bundle.json").write_text(json.dumps(manifest | {"cohort_sha256": "1" * 64}))
    assert run("--model", tmp_path / "bundles", "--volumes", places["volumes"], "--out", tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert re.search(r"darnet-da-ca: v0-\w{8} and v1-\w{8} differ in more than train\.seed", told)


@pytest.mark.parametrize(
    ("num_folds", "code_version", "complaint"),
    [
        (5, "1", r"v0-\w{8} was trained by code version 0, v1-\w{8} by 1: what differs may be the code"),
        (3, "0", r"v0-\w{8} has the folds \[0, 1, 2, 3, 4\], v1-\w{8} \[0, 1, 2\]; every seed must have the same"),
    ],
)
def test_seeds_of_other_code_or_folds_are_not_averaged(
    num_folds: int, code_version: str, complaint: str, tmp_path: Path
) -> None:
    one, other = (write_random_bundle(tmp_path / str(seed), f"v{seed}", seed=seed).manifest for seed in (0, 1))
    changed = {"folds": other.folds[:num_folds], "code_version": code_version}
    with pytest.raises(UsageError, match=complaint):
        merge_seeds([one, other.model_copy(update=changed)])
    assert len(merge_seeds([one, other]).folds) == 10


def test_seeds_and_networks_of_other_numbers_of_workers_are_refused(tmp_path: Path) -> None:
    one, other = (write_random_bundle(tmp_path / str(seed), f"v{seed}", seed=seed).manifest for seed in (0, 1))
    folds = tuple(fold.model_copy(update={"world_size": 4}) for fold in other.folds)
    changed = other.model_copy(update={"folds": folds})
    with pytest.raises(UsageError, match=r"v0-\w{8} was trained by 1 worker a fold, v1-\w{8} by 4 workers"):
        merge_seeds([one, changed])
    network = changed.model_copy(update={"model_name": "darnet-da"})
    with pytest.raises(UsageError, match="darnet-da-ca was trained by 1 worker a fold, darnet-da by 4 workers"):
        refuse_unlike([one, network])
    refuse_unlike([one, other])


def test_networks_of_other_code_are_not_compared(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(places["bundles"], tmp_path / "bundles")
    path = tmp_path / "bundles" / "darnet-da" / "bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"code_version": "1"}))
    assert run("--model", tmp_path / "bundles", "--volumes", places["volumes"], "--out", tmp_path / "out") == 2
    assert "darnet-plain was trained by code version 0, darnet-da by 1: what differs" in capsys.readouterr().err


def test_map_differences_of_both_diagnoses_are_corrected_together(
    places: dict[str, Path], metrics: dict[str, Any]
) -> None:
    """Three pairs in four measures of two diagnoses: a sign test of 24 needs 1 + log2(24 / 0.05) = 9.9 patients."""
    assert [len(maps["differences"]) for maps in metrics["activation_maps"]] == [12, 12]
    report = (places["out"] / "report.html").read_text()
    told = "for the 24 differences of maps in this report; undefined with fewer than 10 patients"
    assert report.count(told) == 2


def test_maps_of_one_seed_are_said_to_be_of_these_networks_alone_and_show_nothing(
    places: dict[str, Path], metrics: dict[str, Any]
) -> None:
    differences = [item for maps in metrics["activation_maps"] for item in maps["differences"]]
    assert {item["verdict"] for item in differences} == {"not shown"}
    assert {(item["folds"]["num_pairs"], item["folds"]["num_seeds"]) for item in differences} == {(5, 1)}
    report = (places["out"] / "report.html").read_text()
    assert report.count("not shown (one seed)") == len(differences)
    assert report.count("95% interval, for these trained networks alone") == 2
    assert "NCP: that depth attention helps maps find lesions is not shown, nor can it be with one seed" in report


@pytest.mark.slow
def test_maps_of_three_seeds_are_paired_by_fold_and_seed(places: dict[str, Path], tmp_path: Path) -> None:
    """Each model's map by itself, of its own bundle, in bundles that are not found in the order of their seeds."""
    for folder, seed in (("a", 2), ("b", 0), ("c", 1)):
        for attentions in (NETWORKS[0], NETWORKS[2]):
            place = tmp_path / "bundles" / folder / name_model(ModelConfig(**attentions))
            write_random_bundle(place, f"v{seed}", attentions=attentions, seed=seed)
            (place / "metrics.jsonl").write_text(HISTORY)
    out = tmp_path / "out"
    arguments = ("--model", tmp_path / "bundles", "--volumes", places["volumes"], "--out", out)
    assert run(*arguments, "--truth", places["truth"]) == 0
    ncp = json.loads((out / "metrics.json").read_text())["activation_maps"][0]
    frame = pd.read_parquet(places["volumes"] / "cohort.parquet")
    names = frame.loc[(frame["cohort"] == "test") & (frame["diagnosis"] == "NCP"), ["array", "scan_id"]]
    dice: dict[str, list[float]] = {"darnet-plain": [], "darnet-da": []}
    for model, values in dice.items():
        for folder in ("b", "c", "a"):
            for network in load_networks(read_bundle(open_store(str(tmp_path / "bundles" / folder / model)))):
                for name, scan_id in names.itertuples(index=False):
                    voxels = torch.from_numpy(np.load(places["volumes"] / name))[None, None].float() / 255
                    with torch.inference_mode():
                        features = network.features(voxels)[0]
                        class_map = torch.einsum("cdhw,c->dhw", features, network.head.weight[1])
                    cam = upsample_cam(class_map, SHAPE)
                    strong, depth = (cam > 0) & (cam >= cam.max() / 2), 2 + int(scan_id[-3:]) % 5
                    overlap = strong[4 : 4 + depth, 8:16, 8:16].sum()
                    values.append(2 * overlap / (strong.sum() + depth * 64))
    (found,) = [item for item in ncp["differences"] if item["measure"] == "dice_half_maximum"]
    assert (found["folds"]["num_pairs"], found["folds"]["num_seeds"]) == (15, 3)
    expected = np.mean(dice["darnet-da"]) - np.mean(dice["darnet-plain"])
    assert abs(expected) > 1e-3
    assert found["folds"]["mean"] == pytest.approx(expected, abs=1e-4)
    report = html.unescape((out / "report.html").read_text())
    assert "(one seed)" not in report
    assert NO_HISTORY not in report


def test_one_seed_is_named_as_such_and_shows_nothing_by_fold(places: dict[str, Path], metrics: dict[str, Any]) -> None:
    verdicts = {item["verdict"] for pair in metrics["comparisons"] for item in pair["folds"].values()}
    assert verdicts == {"not shown"}
    report = (places["out"] / "report.html").read_text()
    assert "with fewer than 3 training seeds none can be" in report
    assert report.count("or this training seed") == 5 + len(metrics["comparisons"])


def test_p_values_of_a_study_are_corrected_for_its_pairs(metrics: dict[str, Any], places: dict[str, Path]) -> None:
    pairs = metrics["comparisons"]
    assert len(pairs) == 6
    for name in ("auc_ncp_clustered", "decisions_clustered"):
        order = sorted(pairs, key=lambda pair: pair[name]["p_value"])
        least = order[0]["holm"][name]["p_value"]
        assert least == pytest.approx(min(1, len(pairs) * order[0][name]["p_value"]))
    table = pd.read_csv(places["out"] / "tables.csv")
    row = table[(table["network"] == "DA") & (table["minus"] == "ResNet18") & (table["metric"] == "auc_ncp")].iloc[0]
    (pair,) = [pair for pair in pairs if (pair["first"], pair["second"]) == ("DA", "ResNet18")]
    assert row["p_holm"] == pytest.approx(pair["holm"]["auc_ncp_clustered"]["p_value"])
    tex = (places["out"] / "tables.tex").read_text()
    for label in ("confusion-DA", "folds-DA", "auc-pairs", "decision-pairs", "folds-DA-ResNet18"):
        assert rf"\label{{tab:{label}}}" in tex


@pytest.mark.browser
def test_a_browser_shows_the_study_and_asks_the_network_for_nothing(places: dict[str, Path]) -> None:
    page = places["out"] / "report.html"
    dom = read_dom(page)
    assert '<th scope="row" class="text">auc_ncp, this run</th>' in dom
    assert dom.count("<img") == 1 + 8 + 3 + 1  # ROC; confusion and calibration of four networks; curves; figure 2
    assert list_requests(page) == []


@pytest.mark.browser
@pytest.mark.parametrize("width", [1000, 500])
def test_the_study_fits_a_screen_and_a_phone(places: dict[str, Path], tmp_path: Path, width: int) -> None:
    draw_screen(places["out"] / "report.html", tmp_path / "screen.png", width, 6000)
    pixels = cv2.imread(str(tmp_path / "screen.png"))
    assert pixels.shape[:2] == (6000, width)
    assert np.ptp(pixels[:, : width // 2].reshape(-1, 3), axis=0).min() > 150
    assert (pixels[:, -8:] > 200).mean() > 0.99  # nothing runs off the right edge


def test_the_maps_of_a_single_bundle_are_measured_too(places: dict[str, Path], tmp_path: Path) -> None:
    one = ("--model", places["bundles"] / "darnet-da", "--volumes", places["volumes"])
    assert run(*one, "--truth", places["truth"], "--out", tmp_path / "one") == 0
    told = json.loads((tmp_path / "one" / "metrics.json").read_text())
    everything = json.loads((places["out"] / "metrics.json").read_text())
    assert told["network"] == "DA"
    assert told["accuracy_3class"] == everything["networks"]["DA"]["accuracy_3class"]
    for alone, beside in zip(told["activation_maps"], everything["activation_maps"], strict=True):
        assert alone["networks"]["DA"] == beside["networks"]["DA"]
    assert run(*one, "--truth", tmp_path / "nowhere", "--out", tmp_path / "two") == 2
