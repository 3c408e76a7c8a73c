"""Every setting that changes a number, in frozen sections, and the digests that name them.

Defaults are the paper's where it states one; `settings` reads them for the jobs.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    model_validator,
)

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
    mask_outside_lung: Literal["no", "outlines", "lungs"] = "no"
    """What becomes 0 in every scan, against scans that come masked; one without lungs is refused. `lungs`: all but the
    lungs, so that all scans are alike, at the cost of lesions at the pleura. `outlines`: those stay, as all within the
    lungs' hulls and a rim does; there scans that came masked still lack heart and wall (docs/training.md).
    Source: ours."""

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
    """Diagnoses: CP, NCP and Normal. Source: paper Table 1."""


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
    """Folds of the cross-validation, each a network of the ensemble. Source: paper sec. 4.1."""
    head_init_std: float = Field(0.01, gt=0)
    """Standard deviation of the head's first weights; with more, a short training leaves its plateau sooner.
    Source: authors' code."""
    seed: int = 0
    """Seeds weights, order and augmentation, each fold apart; `cohorts.seed` divides."""
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
    channels_last_3d: bool = True
    """Train in the memory layout that small 3D convolutions are fastest in. It changes last digits alone. Source:
    ours."""
    compile: bool = False
    """Train with torch.compile: minutes at the start, then faster steps. Source: ours."""
    sync_batchnorm: bool = False
    """Batch norm over all workers' scans in place of each worker's own; GPUs only. Source: ours."""
    device: Literal["auto", "cpu", "gpu"] = Field("auto", exclude=True)
    """`gpu`: a GPU a worker, which is waited for where an autoscaler may add it; `auto`: GPUs if a node has any at the
    start, else CPUs. Evaluation follows it too. In no digest: the same training may go on elsewhere. Source: ours."""

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
    seed: int = 0
    """Seeds what is dealt: test cohort and folds. Apart from `train.seed`, so that trainings of several seeds share
    them."""
    drop_discarded: bool | None = None
    """Leave out scans whose column discard is 1; else they are used as they are. Default: as `division`, on under
    `patient` and off under `paper`."""
    drop_shuffled: bool | None = None
    """Leave out scans whose order_defect is shuffled: no setting can put them in order. Default: on under `patient`,
    off under `paper`, which used them."""
    turn_reversed: bool = True
    """Turn scans whose order_defect is reversed; else they are used as they are stored, as the paper used them."""
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

    A row that they decided is final like any other: another limit does not score it again (docs/night.md).
    """

    min_slices: int = Field(10, ge=1)
    """Scans with fewer slices are `SKIP_FEW_SLICES`."""
    max_slices: int = Field(4000, ge=1)
    """More slices than this are `BAD_LIMIT`."""
    max_scan_bytes: int = Field(1 << 30, ge=1)
    """More decoded bytes a scan than this are `BAD_LIMIT`, judged from headers before any pixel is read."""
    timeout_s: float = Field(300.0, gt=0)
    """Wall-clock seconds of one call of the child: all headers of a source, or one of its scans. All threads together
    may take as many of processors, times `num_threads`, and 30 more."""
    memory_bytes: int = Field(4 << 30, ge=1 << 28)
    """Address space the decoding child may use."""
    num_threads: int = Field(1, ge=1, exclude=True)  # it changes no row, so it is in no digest
    """Threads that decode slices of one scan side by side. Ray counts a CPU for each, as far as every node has them
    beside a model actor. A night reads several scans at once anyway: more than 1 helps where scans are fewer than CPUs.
    """


class GateConfig(Section):
    """When a night is too unlike the nights before to be published without a person's word."""

    gate_min_scans: int = Field(500, ge=1)
    """Runs of fewer scans are not judged. Source: ours; of fewer, chance moves every share too far."""
    gate_min_nights: int = Field(7, ge=1)
    """With fewer earlier nights in the table a run is not judged. Source: ours; a week has each of its days once."""
    gate_nights: int = Field(28, ge=1)
    """Earlier nights that a run is held against. Source: ours; four weeks hold each day of the week equally often."""
    gate_err_share: float = Field(0.05, ge=0, le=1)
    """A larger share of ERR rows, without scans that ended in the same ERR before, holds the run. Source: ours; one in
    twenty is trouble of machines, not of scans."""
    gate_bad_rise: float = Field(0.05, ge=0, le=1)
    """A share of BAD rows this far above that of the earlier nights holds the run. Source: ours; at 500 scans and a
    share of 5%, five standard deviations."""
    gate_skip_rise: float = Field(0.25, ge=0, le=1)
    """A share of SKIP rows this far above that of the earlier nights holds the run. Source: ours; what an archive holds
    beside chests differs from day to day by more than BAD rows do, but lungs that are found no more leave nothing else,
    and chance moves the share by less than ten points at 500 scans."""
    gate_psi: float = Field(0.25, gt=0)
    """A population stability index above this, of a probability or an input, holds the run. Source: Siddiqi, Credit
    Risk Scorecards (2006): above 0.25 a population has shifted."""


class ScoreConfig(GateConfig):
    """How an archive is scored."""

    batch_size: int = Field(4, ge=1)
    """Scans a model actor takes at a time; on a GPU in one forward pass, where a short batch is padded."""
    num_threads: int = Field(1, ge=1)
    """Threads of one model actor on a CPU; part of what makes numbers repeatable. Decoding has a node's other cores: of
    many, give the only actor about cores x network / (network + decoding), where by a night's rows the network takes
    num_threads x model_s of a scan and decoding decode_s."""
    num_actors: int = Field(1, ge=1)
    """Model actors, one GPU each where they run on GPUs."""
    part_scans: int = Field(64, ge=1)
    """Scans whose rows are staged together, and a few more, as a source is staged whole. A kill loses those of whole
    sources that are not yet staged, fewer than these; as many decoded ones that wait for a network, or two batches for
    each actor if that is more; and what the cluster is then decoding or scoring."""
    backend: Literal["torch", "openvino"] = "torch"
    """What runs the networks: `torch` on GPUs and CPUs, or `openvino`, faster on CPUs; needs darnet[cpu]."""
    device: Literal["auto", "cpu", "gpu"] = Field("auto", exclude=True)
    """What a night's networks run on: `gpu`, which is waited for where an autoscaler may add it and refused where there
    can be none; `auto`: GPUs if a node has any when the run begins, else CPUs. A run is finished on what it was begun
    on. In no digest of a model: its numbers agree to rounding. Evaluation follows `train.device`. Source: ours."""
    precision: Literal["fp32", "bf16", "int8"] = "fp32"
    """Numbers the networks are run in; another than fp32 is another model. `int8` needs backend openvino and a bundle
    of jobs.quantize; `bf16` is fast where the processor has it (amx_bf16, or avx512_bf16)."""
    compile: bool = False
    """Run the networks through torch.compile, for long nights on GPUs: minutes at each actor's start, for all folds at
    once."""
    folds: tuple[int, ...] = ()
    """Score with these folds alone, as 0,2, which is another model. Default: all of the bundle."""
    cache: Path = Path("~/.cache/darnet")
    """Where each node keeps the networks that openvino compiled for it."""
    decode: DecodeConfig = DecodeConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.precision == "int8" and self.backend != "openvino":
            raise ValueError("precision int8 needs backend openvino")
        if self.compile and self.backend != "torch":
            raise ValueError("compile needs backend torch: openvino compiles by itself")
        if self.device == "gpu" and self.backend != "torch":
            raise ValueError("device gpu needs backend torch: openvino runs on CPUs here")
        if len(set(self.folds)) < len(self.folds):
            raise ValueError(f"folds {self.folds}: name each once")
        return self


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
