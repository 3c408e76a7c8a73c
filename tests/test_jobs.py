"""What a scheduler sees of a job: exit codes, the summary line, and errors that say what to do."""

import io
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from darnet.archive import EVERYTHING, Selection
from darnet.config import fingerprint
from darnet.errors import CredentialsError, RunError, StorageError, UsageError
from darnet.job import run_job
from darnet.settings import (
    DemoSettings,
    DoctorSettings,
    PhantomsSettings,
    PrepareSettings,
    ResultsSettings,
    ScoreSettings,
    Settings,
    read_settings,
)

PLACES = ["--archive", "a", "--model", "m", "--results", "r"]


def _run(capsys: pytest.CaptureFixture[str], arguments: list[str], work: Any = dict) -> tuple[int, Any, str]:
    code = run_job("score", ScoreSettings, work, arguments)
    printed = capsys.readouterr()
    return code, json.loads(printed.out.splitlines()[-1]), printed.err


def _fail(error: Exception) -> Any:
    def work(settings: Settings) -> dict[str, Any]:  # noqa: ARG001
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code"),
    [(UsageError("x"), 2), (StorageError("x"), 4), (CredentialsError("x"), 5), (RunError("x"), 1)],
)
def test_each_kind_of_failure_has_its_exit_code(error: RunError, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    returned, summary, told = _run(capsys, PLACES, _fail(error))
    assert (returned, summary["exit_code"], summary["error"]) == (code, code, "x")
    assert "jobs.score: x" in told


def test_a_job_that_is_done_returns_zero_and_its_summary(capsys: pytest.CaptureFixture[str]) -> None:
    code, summary, _ = _run(capsys, PLACES, lambda settings: {"archive": settings.archive})
    assert (code, summary["job"], summary["archive"], summary["exit_code"]) == (0, "score", "a", 0)


def test_a_defect_is_not_dressed_up_as_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    """Nor told in its own words, or those of what led to it, which may be a patient's."""

    def work(_: Settings) -> dict[str, Any]:
        try:
            return {"spacing": float("Doe^Jane")}
        except ValueError as error:
            raise KeyError("Roe^Rick") from error

    code, summary, told = _run(capsys, PLACES, work)
    assert (code, summary["exit_code"], summary["error"]) == (1, 1, "unexpected KeyError")
    lines = told.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert [line for line in lines if line and not line.startswith(("  ", "Traceback"))] == ["ValueError", "KeyError"]
    assert sum(line.startswith('  File "') and "test_jobs.py" in line for line in lines) == 2
    assert "could not convert" not in told  # names are in these lines of code, and in no one's own


@pytest.mark.parametrize("error", [RunError("x"), ZeroDivisionError("x")])
def test_the_summary_is_last_where_both_streams_are_one(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `ray job submit`."""
    merged = io.StringIO()
    monkeypatch.setattr(sys, "stdout", merged)
    monkeypatch.setattr(sys, "stderr", merged)
    assert run_job("score", ScoreSettings, _fail(error), PLACES) == 1
    assert json.loads(merged.getvalue().splitlines()[-1])["exit_code"] == 1


def test_missing_and_unknown_flags_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "model: Field required" in _run(capsys, ["--archive", "a", "--results", "r"])[2]
    code, _, told = _run(capsys, [*PLACES, "--score.batchsize", "3"])
    assert code == 2
    assert "--score.batchsize" in told


def test_unknown_keys_of_a_file_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.toml").write_text("nonsense = 1\n[score]\nbatchsize = 3\n")
    code, _, told = _run(capsys, [*PLACES, "--config", str(tmp_path / "c.toml")])
    assert code == 2
    assert "score.batchsize" in told
    assert "nonsense" in told
    assert "no such file" in _run(capsys, [*PLACES, "--config", str(tmp_path / "absent.toml")])[2]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("DARNET_NONSENSE", "DARNET_NONSENSE"),
        ("DARNET_SCORES__BATCH_SIZE", "DARNET_SCORES__BATCH_SIZE"),
        ("DARNET_SCORE__BATCHSIZE", "score.batchsize"),
    ],
)
def test_a_variable_that_sets_nothing_is_named(name: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARNET_PSEUDONYM_KEY", "k" * 32)
    monkeypatch.setenv("DARNET_REPLICATES", "3000")  # another job's
    assert read_settings(ScoreSettings, PLACES, "x").archive == "a"
    monkeypatch.setenv(name, "8")
    with pytest.raises(UsageError, match=told):
        read_settings(ScoreSettings, PLACES, "x")


@pytest.mark.parametrize("job", [PhantomsSettings, DemoSettings])
def test_a_job_that_writes_only_here_refuses_a_bucket(job: type[Settings]) -> None:
    """As a path it would be a folder called s3:."""
    with pytest.raises(UsageError, match=r"out: .*s3://b/x: give a local folder"):
        read_settings(job, ["--out", "s3://b/x"], "x")


def test_a_flag_without_its_value_ends_with_the_summary(capsys: pytest.CaptureFixture[str]) -> None:
    code, summary, told = _run(capsys, [*PLACES, "--config"])
    assert (code, summary["exit_code"]) == (2, 2)
    assert "--config: expected one argument" in told


def test_flags_override_the_environment_and_that_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c.toml").write_text("[score]\nbatch_size = 2\nnum_actors = 2\npart_scans = 2\n")
    monkeypatch.setenv("DARNET_SCORE__NUM_ACTORS", "3")
    monkeypatch.setenv("DARNET_SCORE__PART_SCANS", "3")
    arguments = [*PLACES, "--config", str(tmp_path / "c.toml"), "--score.part-scans", "4"]
    score = read_settings(ScoreSettings, arguments, "x").score
    assert (score.batch_size, score.num_actors, score.part_scans, score.num_threads) == (2, 3, 4, 1)


def test_a_night_can_be_narrowed_by_flags() -> None:
    flags = ["--prefix", "ct/1,ct/2", "--since", "2026-01-01", "--glob", "*/x", "--settle-s", "1800", "--dry-run"]
    settings = read_settings(ScoreSettings, [*PLACES, *flags], "x")
    assert (settings.prefix, settings.glob, settings.settle_s, settings.dry_run) == (
        ("ct/1", "ct/2"),
        "*/x",
        1800,
        True,
    )
    assert settings.since == datetime(2026, 1, 1, tzinfo=UTC)
    zoned = read_settings(ScoreSettings, [*PLACES, "--since", "2026-01-01T01:00:00+01:00"], "x")
    assert zoned.since == settings.since
    plain = read_settings(ScoreSettings, PLACES, "x")
    assert Selection(plain.prefix, plain.since, plain.glob, plain.settle_s) == EVERYTHING
    with pytest.raises(UsageError, match="since"):
        read_settings(ScoreSettings, [*PLACES, "--since", "yesterday"], "x")
    for number in ("20260101", "2026", "1767225600.5"):  # seconds since 1970, for a library
        with pytest.raises(UsageError, match="not a bare number"):
            read_settings(ScoreSettings, [*PLACES, "--since", number], "x")


def test_only_an_audit_does_without_archive_and_volumes() -> None:
    for arguments, complaint in ((["--archive", "a"], "--volumes is missing"), (["--audit"], "--out is missing")):
        with pytest.raises(UsageError, match=complaint):
            read_settings(PrepareSettings, ["--cohort", "t.csv", *arguments], "x")
    assert read_settings(PrepareSettings, ["--cohort", "t.csv", "--audit", "--out", "o"], "x").audit


def test_help_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read_settings(ScoreSettings, ["--help"], "python -m jobs.score")
    assert caught.value.code == 0
    told = " ".join(capsys.readouterr().out.split())

    def check(section: Any, prefix: str) -> None:
        for name, field in section.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                check(field.annotation, f"{prefix}{name}.")
            elif not prefix.startswith("--network") or name != "num_classes":
                assert f"{prefix}{name}".replace("_", "-") in told
                assert field.description, f"{prefix}{name} has no description"

    check(ScoreSettings, "--")


@pytest.mark.parametrize(
    ("job", "given", "read", "unread"),
    [
        (ResultsSettings, ["schema"], {"--keep-commits"}, {"--score", "--volume", "--cohorts", "--network", "--train"}),
        (DoctorSettings, [], {"--score.device"}, {"--volume", "--cohorts", "--network", "--train"}),
    ],
)
def test_help_leaves_out_what_a_job_does_not_read_and_its_file_may_have_it(
    job: type[Settings], given: list[str], read: set[str], unread: set[str], tmp_path: Path, capsys: Any
) -> None:
    with pytest.raises(SystemExit):
        read_settings(job, ["--help"], "x")
    told = capsys.readouterr().out
    assert all(name in told for name in read)
    assert not [name for name in unread if name in told]
    file = tmp_path / "all.toml"
    file.write_text('[volume]\ncrop = "body"\n[train]\nepochs = 7\n[score]\nbatch_size = 3\n')
    settings = read_settings(job, [*given, "--config", str(file)], "x")
    assert (settings.volume.crop, settings.train.epochs, settings.score.batch_size) == ("body", 7, 3)


def test_defaults_are_the_papers() -> None:
    settings = read_settings(ScoreSettings, PLACES, "x")
    assert settings.volume.shape == settings.network.volume_shape == (64, 224, 224)
    assert (settings.train.learning_rate, settings.train.batch_size, settings.train.num_folds) == (1e-3, 4, 5)
    assert settings.train.epochs == 80


def test_every_training_setting_changes_the_fingerprint() -> None:
    base = read_settings(ScoreSettings, PLACES, "x").train
    values = {
        "class_weights": "balanced",
        "warmup_epochs": 2,
        "temperature_scaling": True,
        "amp": True,
        "gradient_checkpointing": True,
        "channels_last_3d": False,
        "compile": True,
        "sync_batchnorm": True,
        "head_init_std": 0.1,
    }
    used = [base.model_copy(update={name: value}) for name, value in values.items()]
    assert len({fingerprint(base), *map(fingerprint, used)}) == 1 + len(values)


def test_preprocessing_version_changes_with_each_setting_between_bytes_and_input() -> None:
    base = read_settings(ScoreSettings, PLACES, "x").volume
    changes: list[dict[str, Any]] = [
        {"shape": (32, 224, 224)},
        {"window_hu": (-1000.0, 150.0)},
        {"crop": "body"},
        {"depth_resampling": "area"},
        {"slice_order": "feet_first"},
        {"mask_outside_lung": "outlines"},
        {"mask_outside_lung": "lungs"},
    ]
    assert {name for change in changes for name in change} == set(type(base).model_fields)
    versions = {base.model_copy(update=change).preprocessing_version for change in changes}
    assert len(versions | {base.preprocessing_version}) == 8
    assert fingerprint(base) == fingerprint(base.model_copy())
