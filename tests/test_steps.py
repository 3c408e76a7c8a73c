"""A job in steps resumes and does not mix two studies; the paper's settings are the defaults, with their sources."""

import re
from typing import Any

import pytest

from darnet.config import CohortConfig
from darnet.errors import UsageError
from darnet.evaluation.comparisons import MIN_SEEDS
from darnet.settings import EvaluateSettings, PaperSettings, PhantomsSettings, TrainSettings, read_settings
from darnet.steps import SETTINGS_FILE, Step, claim_folder, run_steps
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
            return {"made": name}

        return Step(name, store, f"made/{name}", work)

    with pytest.raises(UsageError):
        run_steps([make("one"), make("two", fails=True), make("three")])
    assert made == ["one", "two"]
    done = run_steps([make("one"), make("two"), make("three")])
    assert done == {"two": {"made": "two"}, "three": {"made": "three"}}
    assert run_steps([make("one"), make("two"), make("three")]) == {}


FIRST = ("archive", "cohort_sha256", "score.decode", "train.num_folds")


def claim(store: Store, *arguments: str, table: bytes = b"a table") -> bytes:
    """The folder of a study in three steps, of which the second trains."""
    steps = [
        Step("volumes", store, "volumes.json", dict, FIRST),
        Step("training", store, "bundles/last", dict, ("train", "seeds"), first="bundles"),
        Step("evaluation", store, "report.html", dict, ("replicates",)),
    ]
    return claim_folder(store, read_settings(PaperSettings, [*PLACES, *arguments], "x"), {"cohort": table}, steps)


def test_what_nothing_rests_on_yet_can_be_given_anew(store: Store) -> None:
    """A scan that never decodes leaves the table or gets other limits; a rate that diverges is lowered."""
    claim(store, "--train.learning-rate", "1", table=b"two scans")
    claim(store, "--train.learning-rate", "1", "--score.decode.timeout-s", "999", table=b"one scan")
    store.write_bytes("volumes.json", b"{}")
    claim(store, "--score.decode.timeout-s", "999", "--seeds", "0,1,2", table=b"one scan")
    store.write_bytes("bundles/first", b"")
    claim(store, "--score.decode.timeout-s", "999", "--seeds", "0,1,2", "--replicates", "3000", table=b"one scan")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (
            ["--train.epochs", "3"],
            r"training began with other settings \(train\.epochs;.*use those, or delete .* begins with bundles$",
        ),
        (["--seeds", "1"], r"training began with other settings \(seeds;"),
        (["--train.num-folds", "3"], r"volumes began .* \(train\.num_folds;.* begins with volumes\.json, bundles$"),
        (["--archive", "elsewhere"], r"volumes began .* \(archive;"),
    ],
)
def test_what_something_rests_on_cannot(store: Store, changed: list[str], told: str) -> None:
    claim(store)
    noted = store.read_bytes(SETTINGS_FILE)
    for name in ("volumes.json", "bundles/first"):
        store.write_bytes(name, b"{}")
    with pytest.raises(UsageError, match=told):
        claim(store, *changed)
    assert store.read_bytes(SETTINGS_FILE) == noted


@pytest.mark.parametrize("left", ["bundles.runs/fold0/state.pt", "bundles/last", "report.html"])
def test_what_later_steps_left_is_not_taken_for_that_of_new_settings(store: Store, left: str) -> None:
    """Also where what lies between was deleted, and where a training has only begun."""
    claim(store)
    store.write_bytes(left, b"{}")
    with pytest.raises(UsageError, match=rf"\(train\.epochs;.* begins with {left.partition('/')[0].partition('.')[0]}"):
        claim(store, "--train.epochs", "3")
    with pytest.raises(UsageError, match=r"\(archive;"):
        claim(store, "--archive", "elsewhere")
    store.delete(left)
    claim(store, "--archive", "elsewhere", "--train.epochs", "3")


def test_a_job_whose_place_was_claimed_anew_stops_before_its_next_step(store: Store) -> None:
    first = claim(store)
    made: list[str] = []

    def intrude() -> dict[str, Any]:
        made.append("one")
        claim(store, "--train.epochs", "3")
        return {}

    steps = [Step("one", store, "one", intrude), Step("two", store, "two", lambda: made.append("two") or {})]
    with pytest.raises(UsageError, match="another job has begun here with other settings"):
        run_steps(steps, first)
    assert made == ["one"]


def test_another_table_under_the_same_name_is_refused(store: Store) -> None:
    claim(store)
    store.write_bytes("volumes.json", b"{}")
    with pytest.raises(UsageError, match=r"other settings \(cohort_sha256; _sha256: the content"):
        claim(store, table=b"a tabIe")


def test_what_changes_no_result_is_not_noted(store: Store) -> None:
    for name in ("volumes.json", "bundles/first"):
        store.write_bytes(name, b"{}")
    for more in (
        [],
        ["--mlflow", "http://mlflow", "--cache", "elsewhere", "--score.cache", "b", "--train.device", "cpu"],
    ):
        claim(store, *more)
    assert "cache" not in store.read_bytes(SETTINGS_FILE).decode()


def test_workers_that_do_not_divide_a_batch_are_refused_before_anything_is_made() -> None:
    with pytest.raises(UsageError, match="workers: 3 do not divide a batch of 4"):
        read_settings(PaperSettings, [*PLACES, "--workers", "3"], "x")


def test_the_papers_settings_are_the_defaults() -> None:
    told = read_settings(PaperSettings, [*PLACES, "--config", str(JOBS / "paper.toml")], "x")
    plain = read_settings(PaperSettings, PLACES, "x")
    assert told.model_dump(exclude={"config", "cohorts", "seeds"}) == plain.model_dump(
        exclude={"config", "cohorts", "seeds"}
    )
    assert len(told.seeds) >= MIN_SEEDS
    assert told.cohorts.resolved == CohortConfig(division="paper", drop_discarded=False, drop_shuffled=False)
    assert (told.train.device, plain.train.device) == ("gpu", "auto")


def test_the_papers_study_on_patient_level_leaves_out_the_scans_that_only_the_paper_used() -> None:
    arguments = [*PLACES, "--config", str(JOBS / "paper.toml"), "--cohorts.division", "patient"]
    assert read_settings(PaperSettings, arguments, "x").cohorts.resolved == CohortConfig().resolved


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
