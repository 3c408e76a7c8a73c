"""A job in steps resumes and does not mix two studies; the paper's settings are the defaults, with their sources."""

import re
from typing import Any

import pytest

from darnet.errors import UsageError
from darnet.evaluation.intervals import MIN_SEEDS
from darnet.settings import EvaluateSettings, PaperSettings, PhantomsSettings, TrainSettings, read_settings
from darnet.steps import BEFORE_VOLUMES, SETTINGS_FILE, Step, claim_folder, run_steps
from darnet.storage import Store
from tests.places import ROOT

JOBS = ROOT / "jobs"
PLACES = ["--archive", "a", "--cohort", "c.csv", "--out", "o"]


def test_what_is_complete_is_not_made_again(store: Store) -> None:
    made: list[str] = []

    def make(name: str, fails: bool = False) -> Step:
        def work() -> dict[str, Any]:
            made.append(name)
            if fails:
                raise UsageError(name)
            store.write_bytes(f"made/{name}", b"")
            return {}

        return Step(name, store, f"made/{name}", work)

    with pytest.raises(UsageError):
        run_steps([make("one"), make("two", fails=True), make("three")])
    assert made == ["one", "two"]
    assert run_steps([make("one"), make("two"), make("three")]) == ["two", "three"]
    assert run_steps([make("one"), make("two"), make("three")]) == []


def test_a_place_of_other_settings_is_refused(store: Store) -> None:
    for more in ([], ["--mlflow", "http://mlflow", "--cache", "elsewhere"]):
        claim_folder(store, read_settings(PaperSettings, [*PLACES, *more], "x"), {"cohort": b"a table"})
    with pytest.raises(UsageError, match=r"begun with other settings \(train;"):
        claim_folder(store, read_settings(PaperSettings, [*PLACES, "--train.epochs", "3"], "x"), {"cohort": b"a table"})


def test_another_table_under_the_same_name_is_refused(store: Store) -> None:
    settings = read_settings(PaperSettings, PLACES, "x")
    claim_folder(store, settings, {"cohort": b"a table"})
    with pytest.raises(UsageError, match=r"begun with other settings \(cohort_sha256; _sha256: the content"):
        claim_folder(store, settings, {"cohort": b"a tabIe"})


def test_where_compiled_networks_are_kept_is_not_noted(store: Store) -> None:
    for cache in ("a", "b"):
        settings = read_settings(PaperSettings, [*PLACES, "--score.cache", cache], "x")
        claim_folder(store, settings, {"cohort": b"a table"})
    assert "score.cache" not in store.read_bytes(SETTINGS_FILE).decode()


def test_a_scan_that_never_decodes_can_leave_the_table_until_there_are_volumes(store: Store) -> None:
    """Or be given other limits; whatever else changes is refused, and so are these once volumes rest on them."""
    settings = read_settings(PaperSettings, PLACES, "x")
    limits = read_settings(PaperSettings, [*PLACES, "--score.decode.timeout-s", "999"], "x")
    batches = read_settings(PaperSettings, [*PLACES, "--score.batch-size", "7"], "x")
    claim_folder(store, settings, {"cohort": b"two scans"}, BEFORE_VOLUMES)
    claim_folder(store, limits, {"cohort": b"one scan"}, BEFORE_VOLUMES)
    with pytest.raises(UsageError, match=r"begun with other settings \(score;"):
        claim_folder(store, batches, {"cohort": b"one scan"}, BEFORE_VOLUMES)
    claim_folder(store, limits, {"cohort": b"one scan"})
    with pytest.raises(UsageError, match=r"begun with other settings \(cohort_sha256, score;"):
        claim_folder(store, settings, {"cohort": b"two scans"})


def test_the_papers_settings_are_the_defaults() -> None:
    told = read_settings(PaperSettings, [*PLACES, "--config", str(JOBS / "paper.toml")], "x")
    plain = read_settings(PaperSettings, PLACES, "x")
    assert told.model_dump(exclude={"config", "cohorts", "seeds"}) == plain.model_dump(
        exclude={"config", "cohorts", "seeds"}
    )
    assert len(told.seeds) >= MIN_SEEDS
    assert (told.cohorts.division, told.cohorts.drop_discarded, told.cohorts.drop_shuffled) == ("paper", False, False)
    assert (told.train.device, plain.train.device) == ("gpu", "auto")


def test_the_device_of_the_study_is_that_of_its_parts() -> None:
    """It is written nowhere, and so must not be lost where one job's settings are made from another's."""
    told = read_settings(PaperSettings, [*PLACES, "--train.device", "cpu", "--train.augment.zoom", "1,1"], "x")
    parts = (
        TrainSettings(volumes="v", out="o", train=told.train),
        EvaluateSettings(predictions="p", out="o", train=told.train),
    )
    assert [part.train for part in parts] == [told.train] * 2
    assert told.train.device == "cpu"


@pytest.mark.parametrize("settings", [PaperSettings, PhantomsSettings])
def test_both_smoke_jobs_read_the_same_file(settings: Any) -> None:
    places = PLACES if settings is PaperSettings else ["--out", "o"]
    told = read_settings(settings, [*places, "--config", str(JOBS / "paper-smoke.toml")], "x")
    assert told.volume.shape == told.network.volume_shape == (18, 56, 72)


@pytest.mark.parametrize("name", ["paper.toml", "paper-smoke.toml"])
def test_every_value_says_where_it_comes_from(name: str) -> None:
    lines = [line for line in (JOBS / name).read_text().splitlines() if re.match(r"\w+ *=", line)]
    assert len(lines) >= 8 or name == "paper-smoke.toml"
    for line in lines:
        comment = line.partition("#")[2]
        assert re.search(r"ours|paper|authors|ResNet18|that of the volumes", comment), line
