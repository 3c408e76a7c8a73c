"""Tries this machine and a bundle: nothing but the environment enters, checks leave."""

import importlib.metadata
import os
import resource
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from darnet.archive import list_sources
from darnet.bundle import Bundle, read_bundle
from darnet.checkup.findings import Check, CheckError, Finding, Verdict, examine
from darnet.config import DecodeConfig, ScoreConfig, VolumeConfig
from darnet.errors import ScanError, Status, UsageError
from darnet.ingest import Ingester
from darnet.phantom import make_phantom
from darnet.phantoms.archive import STYLES
from darnet.phantoms.files import write_dicom
from darnet.pseudonym import MIN_KEY_BYTES, PSEUDONYM_VARIABLE, read_secret
from darnet.reading.road import Road
from darnet.reading.sandbox import Sandbox
from darnet.scan import Diagnosis
from darnet.score import Ensemble
from darnet.storage import Store, open_store

DISK_MIND_BYTES, DISK_WRONG_BYTES = 20 << 30, 2 << 30  # Source: ours; volumes of CC-CCII take 13 GB, a scan's files 1
SHARED_MEMORY_BYTES = 2 << 30  # Source: Ray's object store lies there, and falls back to disk below that
OPEN_FILES = 4_096  # Source: Ray warns below it
INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "amx_int8", "avx512_vnni", "avx_vnni")  # that make bf16 and INT8 fast
SMALL_SHAPE = (24, 96, 96)


def check_machine() -> list[list[Check]]:
    """Is this node fit to decode and score?"""
    return [
        [("machine: Python packages", _look_at_packages)],
        [("machine: processors and threads", _look_at_processors)],
        [("machine: GPU", _look_at_gpu)],
        [("machine: free disk", _look_at_disk)],
        [("machine: shared memory", _look_at_shared_memory)],
        [("machine: open files", _look_at_open_files)],
        [("machine: key of pseudonyms", _look_at_key)],
        [("machine: decoders", _decode_every_syntax), ("machine: limits on decoding", _exceed_limits)],
    ]


def examine_machine() -> list[Finding]:
    """All of it, tried on the machine that calls."""
    return [finding for group in check_machine() for finding in examine(group)]


def check_bundle(model: Store, config: ScoreConfig) -> list[Check]:
    """Is the bundle whole, and do its networks give probabilities on this machine, as they are set to be run?"""
    return [
        ("bundle: digests", lambda: _describe_bundle(read_bundle(model))),
        ("bundle: a forward pass", lambda: _score_nothing(read_bundle(model), config)),
    ]


def check_bundle_on_gpu(model: Store | None, config: ScoreConfig) -> list[Check]:
    """The same on a machine with a GPU, where networks run then; nothing elsewhere."""
    if model is None or not torch.cuda.is_available():
        return []
    return [(f"machine: {name.partition(': ')[2]}", look) for name, look in check_bundle(model, config)]


def _look_at_packages() -> str:
    """Against the pins that tests were run under, of all that this package asks for, itself or through others."""
    pins = read_pins()
    wrong, is_near = [], False
    for name, is_own in sorted(list_needed("darnet").items()):
        pin = pins.get(name)
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = "missing"
        if pin is not None and (found == "missing" or not pin.specifier.contains(found, prereleases=True)):
            wrong.append(f"{name} is {found}, not {str(pin.specifier).lstrip('=')}")
            is_near |= is_own
    if wrong:
        remedy = "install with pip install -c constraints.txt ."
        raise CheckError("; ".join(wrong), remedy, Verdict.WRONG if is_near else Verdict.MIND)
    return f"darnet {importlib.metadata.version('darnet')}, torch {torch.__version__}, all as pinned"


def read_pins() -> dict[str, Requirement]:
    """What `constraints.txt` pins, by canonical names."""
    lines = Path(__file__).with_name("constraints.txt").read_text().splitlines()
    pins = [Requirement(text) for line in lines if (text := line.partition("#")[0].strip())]
    return {canonicalize_name(pin.name): pin for pin in pins}


def list_needed(package: str) -> dict[str, bool]:
    """Packages that one needs, by canonical names: whether it asks for them itself. Of one that is missing, no more."""
    needed: dict[str, bool] = {}
    asking = [(package, "")]
    for name, extra in asking:  # grows
        with suppress(importlib.metadata.PackageNotFoundError):
            for item in map(Requirement, importlib.metadata.requires(name) or ()):
                if item.marker is None or item.marker.evaluate({"extra": extra}):
                    found = canonicalize_name(item.name)
                    needed[found] = needed.get(found, False) or name == package
                    asking += [pair for part in ("", *item.extras) if (pair := (found, part)) not in asking]
    return needed


def _look_at_processors() -> str:
    num_cpus = len(os.sched_getaffinity(0))
    if num_cpus < 2:
        raise CheckError("one CPU", "decoding and the network need one each")
    return f"{num_cpus} CPUs, {' '.join(list_instructions()) or 'no bf16 or int8 instructions'}"


def list_instructions() -> list[str]:
    """Which of `INSTRUCTIONS` this machine's processors have."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return [flag for flag in INSTRUCTIONS if flag in flags]


def _look_at_gpu() -> str:
    if not torch.cuda.is_available():
        told = "none: the paper's network takes some ten seconds a scan and CPU"
        raise CheckError(told, "fine for a few hundred scans a night; else run jobs on a node with a GPU", Verdict.MIND)
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{len(names)}: {', '.join(sorted(set(names)))}"


def _look_at_disk() -> str:
    place = tempfile.gettempdir()
    free = shutil.disk_usage(place).free
    if free < DISK_MIND_BYTES:
        verdict = Verdict.WRONG if free < DISK_WRONG_BYTES else Verdict.MIND
        raise CheckError(f"{free / 2**30:.1f} GiB in {place}", "free some, or set TMPDIR to a larger disk", verdict)
    return f"{free / 2**30:.0f} GiB in {place}"


def _look_at_shared_memory() -> str:
    place = Path("/dev/shm")
    size = shutil.disk_usage(place).total if place.is_dir() else 0
    if size < SHARED_MEMORY_BYTES:
        remedy = "start the container with --shm-size=8g: Ray keeps its objects there and is slow without"
        raise CheckError(f"{size / 2**30:.1f} GiB in {place}", remedy, Verdict.MIND)
    return f"{size / 2**30:.0f} GiB"


def _look_at_open_files() -> str:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit < OPEN_FILES:
        raise CheckError(f"at most {limit}", f"set ulimit -n to {OPEN_FILES} or more", Verdict.MIND)
    return f"at most {limit}"


def _look_at_key() -> str:
    try:
        secret = read_secret()
    except UsageError as error:
        raise CheckError("set, and too short", str(error)) from error
    if secret is None:
        remedy = f"set {PSEUDONYM_VARIABLE} on every node, or leave patient_key and series_key null"
        raise CheckError("not set", remedy, Verdict.MIND)
    return f"set, {MIN_KEY_BYTES} bytes or more"


def _decode_every_syntax() -> str:
    """A small chest in every compression a demo is stored in, through the child process that nights use."""
    volume = VolumeConfig(shape=SMALL_SHAPE)
    phantom = make_phantom(Diagnosis.NORMAL, 1, shape=SMALL_SHAPE)
    with tempfile.TemporaryDirectory() as folder:
        for name, style in STYLES.items():
            write_dicom(phantom, Path(folder) / name, style=style, patient_id=name)
        store = open_store(folder)
        ingester = Ingester(store, Road(volume, DecodeConfig()))
        scans = [scan for source in list_sources(store.list_objects()) for scan in ingester.ingest(source)]
        ingester.close()
    if bad := [f"{scan.scan_id.partition('#')[0]} {scan.status}" for scan in scans if scan.status is not Status.OK]:
        raise CheckError(f"not read: {', '.join(bad)}", "install with pip install -c constraints.txt .")
    return f"{len(scans)} transfer syntaxes read"


def _exceed_limits() -> str:
    """A hang and a hunger for memory must end in the child, and another child must follow."""
    wrong = []
    for target, argument, expected in (
        ("time:sleep", 60.0, Status.ERR_TIMEOUT),
        ("builtins:bytearray", 1 << 40, Status.ERR_MEMORY),
    ):
        child = Sandbox(target, memory_bytes=4 << 30, timeout_s=5.0)
        try:
            child.call(argument)
            wrong.append(f"{expected} did not come")
        except ScanError as error:
            if error.status is not expected:
                wrong.append(f"{error.status} in place of {expected}")
        finally:
            child.close()
    if wrong:
        raise CheckError("; ".join(wrong), "limits on processes do not hold here: run nights on another kernel")
    return "a hang and a hunger for memory end in the child"


def _describe_bundle(bundle: Bundle) -> str:
    manifest = bundle.manifest
    return f"{manifest.model_name}, {len(manifest.folds)} folds, digests as written"


def _score_nothing(bundle: Bundle, config: ScoreConfig) -> str:
    shape = bundle.manifest.settings.volume.shape
    ensemble = Ensemble.from_bundle(bundle, config, "cuda" if torch.cuda.is_available() else "cpu")
    (score,) = ensemble.score([np.zeros(shape, np.uint8)])
    if not np.isfinite(score.probability).all() or abs(float(score.probability.sum()) - 1) > 1e-5:
        raise CheckError(f"probabilities of an empty volume: {score.probability}", "train or fetch the bundle again")
    way = f"{config.backend} {config.precision}"
    return f"probabilities of an empty {' x '.join(map(str, shape))} volume add up to 1 ({way})"
