"""Every setting, in one frozen tree read from defaults, a TOML file, the environment and flags, in that order.

Defaults are the paper's where it states one. An unknown key is an error that names it.
"""

import argparse
import hashlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    CliPositionalArg,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from darnet.errors import UsageError

SettingsT = TypeVar("SettingsT", bound="Settings")

AIR_AND_LUNG_HU = (-950.0, -400.0, -250.0)  # what tells gas, lung and dense lung from tissue. Source: ours (see lung)
TILT_DEGREES = 1.0  # of shear, at most; headers round to less. Source: ours
OBLIQUE_DEGREES = 20.0  # between the axes of a scan and the patient's, at most. Source: ours
PREPROCESSING_REVISION = 2  # raise when the code between bytes and network input changes what it yields


class Section(BaseModel):
    """A part of the settings tree: frozen, and strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class VolumeConfig(Section):
    """From a decoded scan to the standard volume; all of it is in `preprocessing_version`."""

    shape: tuple[int, int, int] = (64, 224, 224)
    """D, H, W of the network input. Source: paper sec. 4.2."""
    window_hu: tuple[float, float] = (-1350.0, 150.0)
    """Hounsfield units that become 0 and 255. Source: ours; the paper does not state its window."""
    crop: Literal["paper", "body"] = "paper"
    """`paper`: 48/512 of each side off; `body`: the bounding box of the body. Source: authors' code; `body` ours."""
    depth_resampling: Literal["linear", "area"] = "linear"
    """Along z: `linear` between the two nearest slices, or `area` over all. Source: paper sec. 4.2; `area` ours."""
    slice_order: Literal["head_first", "feet_first"] = "head_first"
    """Order of slice images, which carry no orientation of their own. Source: ours."""
    mask_outside_lung: bool = False
    """Voxels outside lungs, their hulls and a rim become 0, in every scan; one without lungs is refused. Source: ours,
    against scans that come masked: takes the border from them as a shortcut, not the rim (README)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if min(self.shape) < 8:
            raise ValueError(f"shape {self.shape}: every axis needs at least 8 voxels")
        if self.window_hu[0] >= self.window_hu[1]:
            raise ValueError(f"window_hu {self.window_hu}: the lower bound must be below the upper")
        if not self.window_hu[0] < AIR_AND_LUNG_HU[0] or not AIR_AND_LUNG_HU[-1] < self.window_hu[1]:
            raise ValueError(f"window_hu {self.window_hu}: it must hold {AIR_AND_LUNG_HU}, or no lung can be found")
        return self

    @property
    def preprocessing_version(self) -> str:
        """Revision of the code and fingerprint of these settings: changes whenever the network input may."""
        return f"{PREPROCESSING_REVISION}-{fingerprint(self)[:12]}"


class ModelConfig(Section):
    """The network; the defaults are the paper's DA+CA ResNet18 (35,237,163 parameters)."""

    channel_attention: bool = True
    """Channel-wise attention (CA). Source: paper ref. 11."""
    depth_attention: bool = True
    """Depth-wise attention (DA). Source: paper sec. 3.2."""
    volume_shape: tuple[int, int, int] = (64, 224, 224)
    """D, H, W the network is built for; DA ties its layers to D. Source: paper sec. 4.2."""
    base_channels: int = Field(64, ge=1)
    """Channels of the first stage; later stages have 2, 4, 8 times as many. Source: ResNet18, paper ref. 8."""
    num_classes: int = Field(3, ge=2)
    """Source: paper Table 1."""


class AugmentConfig(Section):
    """Online augmentation, in plane. Source: paper sec. 4.2 names the kinds, the authors' code the ranges."""

    flip_probability: float = Field(0.5, ge=0, le=1)
    """Chance of a left-right mirror image."""
    rotation_degrees: float = Field(5.0, ge=0)
    """Largest rotation either way."""
    translation_voxels: float = Field(5.0, ge=0)
    """Largest shift along each of y and x, in voxels of a 224-wide input; scales with the width."""
    zoom: tuple[float, float] = (0.9, 1.1)
    """Range of the magnification."""


class TrainConfig(Section):
    """How one fold is trained."""

    epochs: int = Field(80, ge=1)
    """Source: authors' code; the paper does not say."""
    learning_rate: float = Field(1e-3, gt=0)
    """Initial rate of Adam, cosine-annealed to 0. Source: paper sec. 4.2."""
    batch_size: int = Field(4, ge=1)
    """Scans a step over all workers together. Source: paper sec. 4.2."""
    num_folds: int = Field(5, ge=2)
    """Source: paper sec. 4.1."""
    head_init_std: float = Field(0.01, gt=0)
    """Standard deviation of the head's first weights; with more, a short training leaves its plateau sooner.
    Source: authors' code."""
    seed: int = 0
    """Seeds folds, weights, order and augmentation."""
    temperature_scaling: bool = False
    """Divide each fold's logits by the temperature that fits its validation scans best, in all later use of it.
    Source: Guo et al. 2017; the paper has none."""

    augment: AugmentConfig = AugmentConfig()
    class_weights: Literal["none", "balanced"] = "none"
    """`balanced`: a scan's loss is weighed by how rare its class is among the fold's training scans. Source: ours."""
    warmup_epochs: int = Field(0, ge=0)
    """Epochs in which the rate climbs to `learning_rate`; the cosine begins after them. Source: ours, for batches
    larger than the paper's."""
    amp: bool = False
    """Train in bfloat16 where torch thinks it safe; validation stays in float32, as scoring is. Source: ours."""
    gradient_checkpointing: bool = False
    """Compute each block again in the backward pass in place of keeping its maps: less memory, a third more time and
    the same numbers. Source: ours."""
    compile: bool = False
    """Train with torch.compile: minutes at the start, then faster steps. Source: ours."""
    sync_batchnorm: bool = False
    """Batch norm over all workers' scans in place of each worker's own; GPUs only. Source: ours."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} must be fewer than epochs ({self.epochs})")
        if self.compile and self.gradient_checkpointing:
            raise ValueError("compile and gradient_checkpointing exclude each other: torch cannot compile the latter")
        return self


class CohortConfig(Section):
    """Which scans of the cohort table are used, and how they are divided. Source: ours, from the defects of CC-CCII."""

    division: Literal["patient", "paper"] = "patient"
    """`patient`: test cohort and folds on patient level, unless the table has a column cohort of its own; `paper`: test
    cohort of the table's column paper_cohort, whose patients may be in both, and folds on patient level."""
    test_fraction: float = Field(0.2, gt=0, lt=1)
    """Share of the scans dealt to a test cohort made here."""
    drop_discarded: bool | None = None
    """Leave out scans whose column discard is 1; else they are used as they are. Default: as `division`, on under
    `patient` and off under `paper`."""
    drop_shuffled: bool | None = None
    """Leave out scans whose order_defect is shuffled: no setting can put them in order. Reversed ones are turned.
    Default: on under `patient`, off under `paper`, which used them."""
    drop_duplicates: bool = False
    """Leave out scans whose duplicate_or_noise_slices is 1: most of such a scan is sound, so they are kept."""

    @property
    def resolved(self) -> Self:
        """The same with its defaults spelled out."""
        drops = {"drop_discarded": self.is_discarded_dropped, "drop_shuffled": self.is_shuffled_dropped}
        return self.model_copy(update=drops)

    @property
    def is_discarded_dropped(self) -> bool:
        """Whether scans to be discarded are left out; the paper had them in both cohorts."""
        return self.division == "patient" if self.drop_discarded is None else self.drop_discarded

    @property
    def is_shuffled_dropped(self) -> bool:
        """Whether scans in no order are left out; the paper had them in both cohorts."""
        return self.division == "patient" if self.drop_shuffled is None else self.drop_shuffled


class DecodeConfig(Section):
    """Limits of one source's decoding, done in a child process. Source: ours, from the largest chest CT seen.

    A row that they decided is final like any other: another limit does not score it again (README, A night).
    """

    min_slices: int = Field(10, ge=1)
    """Scans with fewer slices are `SKIP_FEW_SLICES`."""
    max_slices: int = Field(4000, ge=1)
    """More slices than this are `BAD_LIMIT`."""
    max_scan_bytes: int = Field(1 << 30, ge=1)
    """More decoded bytes a scan than this are `BAD_LIMIT`, judged from headers before any pixel is read."""
    timeout_s: float = Field(300.0, gt=0)
    """Wall-clock seconds one source may take to decode."""
    memory_bytes: int = Field(4 << 30, ge=1 << 28)
    """Address space the decoding child may use."""


class GateConfig(Section):
    """When a night is too unlike the nights before to be published without a person's word."""

    gate_min_scans: int = Field(500, ge=1)
    """Runs of fewer scans are not judged. Source: ours; of fewer, chance moves every share too far."""
    gate_min_nights: int = Field(7, ge=1)
    """With fewer earlier nights in the table a run is not judged. Source: ours; a week has each of its days once."""
    gate_nights: int = Field(28, ge=1)
    """Earlier nights that a run is held against. Source: ours; four weeks hold each day of the week equally often."""
    gate_err_share: float = Field(0.05, ge=0, le=1)
    """A larger share of ERR rows holds the run. Source: ours; one in twenty is trouble of machines, not of scans."""
    gate_bad_rise: float = Field(0.05, ge=0, le=1)
    """A share of BAD rows this far above that of the earlier nights holds the run. Source: ours; at 500 scans and a
    share of 5%, five standard deviations."""
    gate_psi: float = Field(0.25, gt=0)
    """A population stability index above this, of a probability or an input, holds the run. Source: Siddiqi, Credit
    Risk Scorecards (2006): above 0.25 a population has shifted."""


class ScoreConfig(GateConfig):
    """How an archive is scored."""

    batch_size: int = Field(4, ge=1)
    """Scans a model actor takes at a time; on a GPU in one forward pass, where a short batch is padded."""
    num_threads: int = Field(1, ge=1)
    """Threads of one model actor on a CPU; part of what makes numbers repeatable."""
    num_actors: int = Field(1, ge=1)
    """Model actors, one GPU each where the cluster has GPUs."""
    part_scans: int = Field(64, ge=1)
    """Sources whose rows are staged together: at most this much work is lost by a kill."""
    decode: DecodeConfig = DecodeConfig()


class CamChoice(Section):
    """Of which scored scans a picture of CT and class map is kept. Source: ours."""

    predictions: tuple[Literal["CP", "NCP", "Normal"], ...] = ("NCP",)
    """Classes they are predicted to have, such as CP,NCP."""
    probability: tuple[float, float] = (0.0, 1.0)
    """The least and the highest probability of the predicted class."""
    share: float = Field(1.0, ge=0, le=1)
    """Share of these scans, drawn by scan_id: the same ones every night, and more of them the larger it is."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not 0 <= self.probability[0] <= self.probability[1] <= 1:
            raise ValueError(f"probability {self.probability}: give two numbers from 0 to 1, the lower first")
        return self


def fingerprint(section: BaseModel) -> str:
    """SHA-256 of the settings' canonical JSON."""
    return digest_json(section.model_dump(mode="json"))


def digest_json(value: Any) -> str:
    """SHA-256 of the canonical JSON of what JSON can hold."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class Settings(BaseSettings):
    """What every job shares; a job adds the places it reads and writes."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix="DARNET_",
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


class CachingSettings(Settings):
    """What the jobs share that read volumes."""

    cache: Path = Path("~/.cache/darnet")
    """Where each node keeps its own copy of volumes that lie on S3."""


class PrepareSettings(CachingSettings):
    """Archive and cohort table -> standard volumes, folds; or, with --audit, a report on the cohort."""

    cohort: str
    """CSV or Parquet table with scan_id, patient_id, diagnosis and, if it has them, cohort (train or test) and fold."""
    archive: str = ""
    """Where the scans are: a folder or s3://bucket/prefix. An audit does without."""
    volumes: str = ""
    """Folder or s3://bucket/prefix for the standard volumes; an audit reads what is there, or does without."""
    audit: bool = False
    """Write audit.json, audit.html and division.csv to `out` instead of preparing volumes."""
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
    workers: int = Field(1, ge=1)
    """DDP workers a fold; must divide train.batch_size."""
    runs: str = ""
    """Where checkpoints are kept, so that a killed training resumes: a folder that every node sees, or
    s3://bucket/prefix. Default: beside `out`, `<out>.runs`."""
    mlflow: str | None = None
    """MLflow tracking URI, such as http://mlflow:5000 or a folder, to log the training to. Needs darnet[mlflow]."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.networks)) < len(self.networks):
            raise ValueError(f"networks {', '.join(self.networks)}: name each once")
        return self


class ScoreSettings(Settings):
    """Archive and bundle -> the next object of the results table."""

    archive: str = ""
    """Where the scans are: a folder or s3://bucket/prefix."""
    model: str = ""
    """Model bundle, a local folder or s3://bucket/prefix."""
    results: str
    """Where the results table is: a folder or s3://bucket/prefix."""
    night: str | None = None
    """Date (YYYY-MM-DD) the rows carry. Default: today, UTC. A run finished first keeps its own."""
    prefix: tuple[str, ...] = ()
    """Score only sources whose key in the archive begins so; several, as a,b, are listed side by side. Default: all."""
    since: datetime | None = None
    """Score only sources whose newest object is from then or later: a date or time, UTC unless it says otherwise."""
    glob: str = "*"
    """Score only sources whose key matches this pattern of *, ? and [...], in which * also takes a slash."""
    settle_s: float = Field(0.0, ge=0)
    """A source whose newest object is younger than this many seconds is still arriving and waits for the next night."""
    dry_run: bool = False
    """Say what would be scored and why, and write nothing anywhere."""
    cam_images: str = ""
    """Where pictures of CT and class map are kept, apart from the results: a folder or s3://bucket/prefix. Default:
    none are made."""
    cam_choice: CamChoice = CamChoice()
    accept: str | None = None
    """In place of scoring: publish this run, which a quality gate held. Needs reason; archive and model do not."""
    discard: str | None = None
    """In place of scoring: drop this run, held or unfinished; the next night scores its scans anew."""
    reason: str = ""
    """Why a held run is accepted or discarded; kept beside it."""

    @field_validator("since")
    @classmethod
    def _place(cls, since: datetime | None) -> datetime | None:
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


class DoctorSettings(Settings):
    """Is this installation fit for a night? Machine and cluster are always tried, a place where it is named."""

    archive: str = ""
    """Where the scans are: a folder or s3://bucket/prefix. Only read."""
    model: str = ""
    """Model bundle, a local folder or s3://bucket/prefix. Only read."""
    results: str = ""
    """Where the results table is or will be: a folder or s3://bucket/prefix. Tried below _runs/, and cleaned up."""


class ResultsSettings(Settings):
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
        if (self.predictions is None) == (self.model is None):
            raise ValueError("give either predictions, or model and volumes")
        return self


class PhantomsSettings(Settings):
    """An archive of phantoms with cohort table and truth, to try the paper's evaluation on."""

    out: Path
    """Folder for archive, cohort.csv and truth; must not hold them yet."""
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
    """Folder or s3://bucket/prefix of lesion masks, as jobs.phantoms writes them, if any are known."""
    workers: int = Field(1, ge=1)
    """DDP workers a fold; must divide train.batch_size."""
    mlflow: str | None = None
    """MLflow tracking URI to log the trainings to, as jobs.train does."""
    replicates: int = Field(2000, ge=2000)
    """Bootstrap replicates of the 95% intervals."""


class DemoSettings(Settings):
    """The whole road on phantoms, on one machine without any service."""

    out: Path = Path(".demo")
    """Folder for everything the demo makes; emptied first."""
    volume: VolumeConfig = VolumeConfig(shape=(18, 88, 120), crop="body", window_hu=(-1000.0, -200.0))
    """Small, and in a window of lung and ground glass alone: a few minutes of training see nothing fainter."""
    network: ModelConfig = ModelConfig(base_channels=8)
    train: TrainConfig = TrainConfig(epochs=8, learning_rate=2e-3, head_init_std=0.1)
    score: ScoreConfig = ScoreConfig()


def read_settings(settings_class: type[SettingsT], arguments: list[str], prog: str) -> SettingsT:
    """Read a job's settings: defaults, then the TOML file of `--config`, the environment (`DARNET_...`), flags.

    Raises: UsageError naming every wrong or unknown key; SystemExit(0) after `--help`.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path, default=None)
    config: Path | None = early.parse_known_args(arguments)[0].config
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


def _describe(error: Exception) -> str:
    """Name each wrong key and say what was wrong with it."""
    if not isinstance(error, ValidationError):
        return f"  {error}"
    lines = []
    for item in error.errors(include_url=False, include_input=False):
        lines.append(f"  {'.'.join(str(part) for part in item['loc']) or 'settings'}: {item['msg']}")
    return "\n".join(lines)
