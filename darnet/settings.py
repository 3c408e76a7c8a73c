"""A job's settings: defaults, a TOML file, the environment and flags enter, in that order; one frozen tree leaves.

An unknown key is an error that names it.
"""

import argparse
import os
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    CliPositionalArg,
    CliSettingsSource,
    CliSuppress,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from darnet.config import (
    CamChoice,
    CohortConfig,
    ModelConfig,
    ScoreConfig,
    TrainConfig,
    VolumeConfig,
)
from darnet.errors import UsageError
from darnet.pseudonym import PSEUDONYM_VARIABLE

SettingsT = TypeVar("SettingsT", bound="Settings")

VARIABLE_PREFIX = "DARNET_"


def _refuse_address(value: Any) -> Any:
    if isinstance(value, str) and "://" in value:
        raise ValueError(f"{value}: give a local folder; this job writes nowhere else")
    return value


LocalFolder = Annotated[Path, BeforeValidator(_refuse_address)]


class Settings(BaseSettings):
    """What every job shares; a job adds the places it reads and writes."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=VARIABLE_PREFIX,
        env_nested_delimiter="__",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        nested_model_default_partial_update=True,
        use_attribute_docstrings=True,
    )
    config: Path | None = None
    """TOML file of settings; the environment and flags override it."""
    volume: VolumeConfig = VolumeConfig()
    cohorts: CohortConfig = CohortConfig()
    network: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    score: ScoreConfig = ScoreConfig()

    @classmethod
    def settings_customise_sources(  # type: ignore[override]
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, **others: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """A section that is given stays what it is: written out and read again, it would lose `train.device`."""
        assert isinstance(init_settings, InitSettingsSource), "pydantic-settings makes it"
        given = InitSettingsSource(settings_cls, init_settings.init_kwargs, nested_model_default_partial_update=False)
        return given, *others.values()


class CachingSettings(Settings):
    """What the jobs share that read volumes."""

    cache: Path = Path("~/.cache/darnet")
    """Where each node keeps its own copy of volumes that lie on S3 or in a folder that comes over the network."""


class PrepareSettings(CachingSettings):
    """Archive and cohort table -> standard volumes, folds; or, with --audit, a report on the cohort."""

    cohort: str
    """CSV or Parquet table with scan_id, patient_id, diagnosis and, if it has them, cohort (train or test) and fold."""
    archive: str = ""
    """Where the scans are: a folder or s3://bucket/prefix. An audit does without."""
    volumes: str = ""
    """Folder or s3://bucket/prefix for the standard volumes; an audit reads what is there, or does without."""
    audit: bool = False
    """Write audit.json, audit.html, division.csv and excluded.csv to `out` instead of preparing volumes."""
    out: str = ""
    """Folder or s3://bucket/prefix for the audit."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        needed = ("out",) if self.audit else ("archive", "volumes")
        missing = [f"--{name}" for name in needed if not getattr(self, name)]
        if missing:
            raise ValueError(f"{', '.join(missing)} is missing" + ("" if self.audit else "; only --audit does without"))
        return self


class TrainSettings(CachingSettings):
    """Standard volumes and folds -> model bundle."""

    volumes: str
    """Folder written by jobs.prepare: one that every node sees, or s3://bucket/prefix."""
    out: str
    """Folder or s3://bucket/prefix the model bundle is written to, or a bundle for each of `networks`; must hold none
    yet, and a folder must not exist."""
    networks: tuple[Literal["plain", "ca", "da", "da-ca"], ...] = ()
    """Which of the paper's Table 3 to train, such as plain,ca,da,da-ca. Default: the one that `network` describes."""
    seeds: tuple[int, ...] = ()
    """Train every network with each of these in place of train.seed, such as 0,1,2; several leave bundles in
    `seed<k>/<network>`. Default: train.seed alone."""
    workers: int = Field(1, ge=1)
    """DDP workers a fold; must divide train.batch_size."""
    runs: str = ""
    """Where checkpoints are kept, so that a killed training resumes: a folder that every node sees, or
    s3://bucket/prefix. Default: beside `out`, `<out>.runs`; there is none if `out` is a whole bucket."""
    mlflow: str | None = None
    """MLflow tracking URI, such as http://mlflow:5000 or a folder, to log the training to. Needs darnet[mlflow]."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.networks)) < len(self.networks):
            raise ValueError(f"networks {', '.join(self.networks)}: name each once")
        _check_seeds(self.seeds)
        if self.seeds and self.train.seed != TrainConfig().seed:
            raise ValueError("train.seed: give it or --seeds, which stand in its place")
        return self


class QuantizeSettings(CachingSettings):
    """Bundle and volumes -> the same bundle with INT8 graphs, and how far their probabilities are from float32."""

    model: str
    """Model bundle, a local folder or s3://bucket/prefix."""
    volumes: str
    """Folder or s3://bucket/prefix written by jobs.prepare, that the bundle was trained on; its test cohort is left
    alone."""
    out: str
    """Folder or s3://bucket/prefix for the bundle with INT8; must hold none yet, and a folder must not exist."""


class ScoreSettings(Settings):
    """Archive and bundle -> the next object of the results table."""

    model_config = SettingsConfigDict(
        cli_shortcuts={f"score.{name}": name for name in ("backend", "precision", "folds")}  # said night by night
    )
    archive: str = ""
    """Where the scans are: a folder or s3://bucket/prefix."""
    model: str = ""
    """Model bundle, a local folder or s3://bucket/prefix."""
    results: str
    """Where the results table is: a folder or s3://bucket/prefix."""
    night: str | None = None
    """Date (YYYY-MM-DD) of the rows. Default: today (UTC) by the driver's clock. A run finished first keeps its own."""
    prefix: tuple[str, ...] = ()
    """Score only sources whose key in the archive begins so; several, as a,b, are listed side by side. Default: all."""
    since: datetime | None = None
    """Score only sources whose newest object is from then or later: a date or time, UTC unless it says otherwise."""
    glob: str = "*"
    """Score only sources whose key matches this pattern of *, ? and [...], in which * also takes a slash."""
    settle_s: float = Field(0.0, ge=0)
    """A source whose newest object is younger than this many seconds is still arriving and waits for the next night."""
    scan_id: Literal["key", "hmac"] = "key"
    """How the table names sources and scans: by their keys in the archive, or by HMAC-SHA256 of those under the nodes'
    DARNET_PSEUDONYM_KEY. A table keeps to one."""
    archive_moved_from: str = ""
    """Where the table says that its archive is, if that archive is now at `archive`; until a night has published."""
    dry_run: bool = False
    """Say what would be scored and why, and write nothing anywhere."""
    cam_images: str = ""
    """Where pictures of CT and class map are kept, apart from archive and results: a folder or s3://bucket/prefix.
    Default: none are made, and the night's page shows none."""
    cam_choice: CamChoice = CamChoice()
    """Whose pictures are kept, besides those of scans that the night's page may come to list."""
    accept: str | None = None
    """In place of scoring: publish this run, which a quality gate held. Needs reason; archive and model do not."""
    discard: str | None = None
    """In place of scoring: drop this run, held or unfinished; the next night scores its scans anew."""
    reason: str = ""
    """Why a held run is accepted or discarded; kept beside it."""

    @field_validator("since", mode="before")
    @classmethod
    def _refuse_numbers(cls, since: Any) -> Any:
        if isinstance(since, int | float) or (isinstance(since, str) and re.fullmatch(r"[\d.]+", since.strip())):
            raise ValueError("write a date or time, such as 2026-01-31 or 2026-01-31T18:00, not a bare number")
        return since

    @field_validator("since")
    @classmethod
    def _assume_utc(cls, since: datetime | None) -> datetime | None:
        return since.replace(tzinfo=UTC) if since is not None and since.tzinfo is None else since

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.accept is not None) + (self.discard is not None) + self.dry_run > 1:
            raise ValueError("give only one of accept, discard and dry_run")
        if (self.accept is not None or self.discard is not None) and not self.reason.strip():
            raise ValueError("accept and discard need a reason: --reason 'why'")
        if self.accept is None and self.discard is None and not (self.archive and self.model):
            raise ValueError(f"{'model' if self.archive else 'archive'}: Field required to score an archive")
        return self


class CaretakerSettings(Settings):
    """What the jobs share that look after an installation: one file of settings serves them too, but --help leaves out
    what they do not read."""

    volume: CliSuppress[VolumeConfig] = VolumeConfig()
    cohorts: CliSuppress[CohortConfig] = CohortConfig()
    network: CliSuppress[ModelConfig] = ModelConfig()
    train: CliSuppress[TrainConfig] = TrainConfig()


class DoctorSettings(CaretakerSettings):
    """Is this installation fit for a night? Machine and cluster are always tried, a place where it is named."""

    archive: str = ""
    """Where the scans are: a folder or s3://bucket/prefix. Only read."""
    model: str = ""
    """Model bundle, a local folder or s3://bucket/prefix. Only read."""
    results: str = ""
    """Where the results table is or will be: a folder or s3://bucket/prefix. Tried below _runs/, and cleaned up."""


class ResultsSettings(CaretakerSettings):
    """A results table -> is it whole (check), room (clean), one row a scan (latest), or its columns (schema)."""

    verb: CliPositionalArg[Literal["check", "clean", "latest", "schema"]]
    """check: numbers, files, keys, and the digest of each object. clean: remove the work of runs long published.
    latest: one row a scan, to out. schema: the columns as Markdown, to out or the screen."""
    results: str = ""
    """Where the results table is: a folder or s3://bucket/prefix. Needed by all but schema."""
    out: str | None = None
    """File to write, local or s3://: .parquet or .csv for latest, any for schema and for the digests of check."""
    keep_commits: int = Field(28, ge=1)
    """Runs among this many of the newest objects keep their work when cleaning. Source: ours; four weeks of nights."""
    score: CliSuppress[ScoreConfig] = ScoreConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.verb != "schema" and not self.results:
            raise ValueError(f"results: Field required to {self.verb}")
        if self.verb == "latest" and not (self.out or "").endswith((".parquet", ".csv")):
            raise ValueError("latest needs out, a file ending in .parquet or .csv")
        return self


class EvaluateSettings(CachingSettings):
    """A predictions table, or a bundle and a test cohort -> metrics with intervals, tables and a report."""

    out: str
    """Folder for metrics.json, tables.csv, tables.tex and report.html: local or s3://bucket/prefix."""
    predictions: str | None = None
    """CSV or Parquet table: scan_id, label, prob_cp, prob_ncp, prob_normal and, if known, patient_id, fold and seed."""
    model: str | None = None
    """In place of predictions: model bundle, a local folder or s3://bucket/prefix. Needs volumes."""
    volumes: str | None = None
    """Folder or s3://bucket/prefix written by jobs.prepare, whose test cohort the bundle is measured on."""
    truth: str | None = None
    """Folder or s3://bucket/prefix of lesion masks, as jobs.phantoms writes them, to measure activation maps by."""
    audit: str | None = None
    """Folder or s3://bucket/prefix that jobs.prepare --audit wrote of this cohort, to tell of it in the report."""
    compare: str | None = None
    """A second predictions table of the same scans to compare with."""
    replicates: int = Field(2000, ge=2000)
    """Bootstrap replicates of the 95% intervals. Source: ours; fewer give ragged percentiles."""
    seed: int = 0
    """Seeds the bootstrap."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.model is None) != (self.volumes is None):
            raise ValueError("model and volumes belong together; give both, or predictions")
        if self.truth is not None and self.model is None:
            raise ValueError("truth needs model: a predictions table has no activation maps")
        if self.truth is not None and self.compare is not None:
            raise ValueError("truth and compare: measure maps in one call, and compare tables in another")
        if (self.predictions is None) == (self.model is None):
            raise ValueError("give either predictions, or model and volumes")
        return self


class PhantomsSettings(Settings):
    """An archive of phantoms with cohort table and truth, to try the paper's evaluation on."""

    out: LocalFolder
    """Local folder for archive, cohort.csv and truth; must not hold them yet."""
    train_scans: int = Field(20, ge=1)
    """Scans of each diagnosis in the training cohort."""
    test_scans: int = Field(12, ge=1)
    """Scans of each diagnosis in the test cohort."""


class PaperSettings(CachingSettings):
    """The paper's whole evaluation: archive and cohort table -> four networks of five folds each -> one report.

    What is complete in `out` is not made again: the same command resumes.
    """

    archive: str
    """Where the scans are: a folder or s3://bucket/prefix."""
    cohort: str
    """CSV or Parquet table with scan_id, patient_id, diagnosis and, if it has one, cohort (train or test)."""
    out: str
    """Place for volumes, audit, bundles and report: a folder that every node of the cluster sees, or
    s3://bucket/prefix."""
    truth: str | None = None
    """Folder that every node sees, or s3://bucket/prefix, of lesion masks, as jobs.phantoms writes them, if any are
    known."""
    seeds: tuple[int, ...] = (0,)
    """Train every network with each of these, such as 0,1,2, on the same folds; several leave bundles in
    `bundles/seed<k>`. A difference of networks can be shown of three or more. They stand in place of train.seed."""
    workers: int = Field(1, ge=1)
    """DDP workers a fold; must divide train.batch_size."""
    mlflow: str | None = None
    """MLflow tracking URI to log the trainings to, as jobs.train does."""
    replicates: int = Field(2000, ge=2000)
    """Bootstrap replicates of the 95% intervals."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.seeds:
            raise ValueError("seeds: name at least one")
        _check_seeds(self.seeds)
        if self.train.seed != TrainConfig().seed:
            raise ValueError("train.seed: give --seeds here, which stand in its place")
        if self.train.batch_size % self.workers:
            raise ValueError(f"workers: {self.workers} do not divide a batch of {self.train.batch_size}")
        return self


class DemoSettings(Settings):
    """The whole road on phantoms, on one machine without any service."""

    out: LocalFolder = Path(".demo")
    """Local folder for everything the demo makes: a new or an empty one, or an earlier demo's, which is emptied."""
    volume: VolumeConfig = VolumeConfig(shape=(18, 88, 120), crop="body", window_hu=(-1000.0, -200.0))
    """Small, and in a window of lung and ground glass alone: a few minutes of training see nothing fainter."""
    network: ModelConfig = ModelConfig(base_channels=8)
    train: TrainConfig = TrainConfig(epochs=8, learning_rate=2e-3, head_init_std=0.1)
    score: ScoreConfig = ScoreConfig()


def _check_seeds(seeds: tuple[int, ...]) -> None:
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds {', '.join(map(str, seeds))}: name each once")


def read_settings(settings_class: type[SettingsT], arguments: list[str], prog: str) -> SettingsT:
    """Read a job's settings: defaults, then the TOML file of `--config`, the environment (`DARNET_...`), flags.

    Raises: UsageError naming every wrong or unknown key; SystemExit(0) after `--help`.
    """
    _refuse_unknown_variables(os.environ)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--config", type=Path, default=None)
    try:
        config: Path | None = early.parse_known_args(arguments)[0].config
    except argparse.ArgumentError as error:
        raise UsageError(f"settings are wrong:\n  {error}") from error
    if config is None and os.environ.get("DARNET_CONFIG"):
        config = Path(os.environ["DARNET_CONFIG"])
    if config is not None and not config.is_file():
        raise UsageError(f"--config {config}: no such file")

    class Sourced(settings_class):  # type: ignore[valid-type,misc]
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], env_settings: PydanticBaseSettingsSource, **_: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            flags = CliSettingsSource[Any](
                settings_cls, cli_prog_name=prog, cli_parse_args=arguments, cli_exit_on_error=False
            )
            return flags, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=config)

    Sourced.__doc__ = settings_class.__doc__
    try:
        return Sourced()
    except (ValidationError, SettingsError, ValueError) as error:
        raise UsageError(f"settings are wrong:\n{_describe(error)}") from error


def _refuse_unknown_variables(environment: Iterable[str]) -> None:
    """Refuse a variable that no job has a setting for: a misspelt one would be left out in silence.

    Raises: UsageError naming it.
    """
    known, jobs = {PSEUDONYM_VARIABLE}, [Settings]
    for job in jobs:  # grows while it is read
        jobs += job.__subclasses__()
        known |= {f"{VARIABLE_PREFIX}{field}".upper() for field in job.model_fields}
    variables = [name for name in environment if name.upper().startswith(VARIABLE_PREFIX)]
    if unknown := [name for name in variables if name.upper().partition("__")[0] not in known]:
        raise UsageError(f"settings are wrong: no job has a setting for the variable {', '.join(sorted(unknown))}")


def _describe(error: Exception) -> str:
    """Name each wrong key and say what was wrong with it."""
    if not isinstance(error, ValidationError):
        return f"  {error}"
    lines = []
    for item in error.errors(include_url=False, include_input=False):
        lines.append(f"  {'.'.join(str(part) for part in item['loc']) or 'settings'}: {item['msg']}")
    return "\n".join(lines)
