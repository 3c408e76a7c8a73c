"""Peers and this project on the same scans in one run: `make bench`.

Prints a table, and writes `bench.json` and `bench.png` to `--out`; what was measured earlier stays in both. Roads are
measured in turn (A B A B), each time in a fresh process (`peer_roads`), so that no road's memory or loaded library is
another's; figures are medians, but for what a night spilled, the most of all. The peers' environment, `.venv-peers`,
is built on the first run.
"""

import argparse
import functools
import hashlib
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless

from darnet.bundle import load_network
from darnet.bundle_writing import TrainedFold, add_int8_graphs, make_bundle, publish_bundles
from darnet.checkup.machine import INSTRUCTIONS, list_instructions
from darnet.code_version import HOME, digest_sources
from darnet.config import ModelConfig, TrainConfig, VolumeConfig, digest_json
from darnet.errors import UsageError
from darnet.inference.openvino_backend import convert_network, describe_openvino, load_nncf, quantize_graph
from darnet.manifest import BundleSettings, Int8Record
from darnet.model import build_network
from darnet.phantom import make_phantom
from darnet.phantoms.files import DicomStyle, write_dicom, write_slice_images
from darnet.scan import Diagnosis
from darnet.storage import open_store
from darnet.terminal import print_table
from tests.bench import planning
from tests.bench.layers import print_layers, profile_network
from tests.bench.peer_roads import THREADS
from tests.bench.phases import list_phases, print_phases
from tests.bench.resampling import list_series
from tests.places import ROOT

PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
PEERS = ("torch==2.13.0", "monai", "itk", "torchio", "SimpleITK", "scikit-image", "Pillow", "safetensors")
# Scans of the road that all take, and of a second night of ours, for what a scan more costs; of each series as many. A
# quick network's is longer, three times: of fewer scans more the start-up's noise would hide the cost.
# Source: ours: with 7 to 13 s a scan eager, 4 to 8 in OpenVINO and 1 to 4 in INT8 on two cores, and 15 s to start and
# end, a round is MONAI 100 to 165 s, ours 75 to 160 (fp32) and 100 to 250 (INT8): three rounds are 20 to 35 minutes.
ROAD_SCANS, SHORTER, LONGER, MOST_SERIES = 12, 3, 3, 6
STEADY = 0.9  # of the bare network, that each scan more must reach
FLOOR, STAGES, ONE_MORE = "a scan's floor", "a scan beside the network", "one scan more"
PROFILE, BARE, BESIDE = "where a scan's time goes", "the bare network", "network beside reading"
LAYERS, PHASES = "where a forward pass goes", "where a night's start and end go"
PROFILE_STAGES = ("bytes", "decode", "lungs", "child", "network", "statistics")  # `bytes` are read within `decode`
# What a scan is called, how many slices it has, and its transfer syntax. Source: ours, like the real series at hand.
PHANTOMS = (("275 slices JPEG-LS", 275, JPEGLSLossless), ("98 slices JPEG 2000", 98, JPEG2000Lossless))
IMAGES = "300 slices PNG"
# The modules that decide what the phantoms are, and the bundle with its INT8 graph; both are kept from run to run.
PHANTOM_CODE = (
    *("config", "phantom", "phantoms.body", "phantoms.canvas", "phantoms.files", "phantoms.findings", "scan", "volume"),
)
BUNDLE_CODE = ("bundle", "bundle_writing", "config", "inference.graph", "inference.openvino_backend", "model", "scan")
# Backend, precision, and what they must reach: the network against eager torch, the road against MONAI's.
BACKENDS = (
    ("torch", "fp32", None, None),
    ("openvino", "fp32", 1.5, 2.0),
    ("openvino", "int8", 2.8, 3.0),
    ("openvino", "bf16", None, None),
)
SERIAL = "ours, on one thread"
ON_ONE = ", its one thread"
PRODUCTS = "fp32 matrix products of its size"  # in torch, how fast it is where nothing is waited for
WORST = ("spilled_mb",)  # of which the most of all readings is told
COMPILING = "ours, compiling one fold"  # what a machine pays once, and no road below does
UNITS = {"seconds": "s", "growth_mb": "MB"}
STAGE_NAMES = (
    *("fetch_s", "decode_s", "model_s", "headers_s", "decoding_s", "shrinking_s", "pixels_s", "lungs_s"),
    "statistics_s",
)
PLANS = ((10_000, 365), (100_000, 365), (1_000_000, 365), (100_000, 10), (100_000, 100))  # objects, nights


@dataclass(frozen=True)
class Way:
    """One road's measurement: what of the benchmark it belongs to, who takes it, and the command that repeats it.

    `goals`: how many times as fast as each peer this project must be. `limits`: what a figure may be at most.
    """

    section: str
    what: str
    road: str
    command: tuple[str, ...]
    goals: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)

    @property
    def repeat(self) -> str:
        """The command for a shell in the repository's root."""
        program, *rest = self.command
        inside = os.path.relpath(program, ROOT) if Path(program).is_relative_to(ROOT) else program
        return f"PYTHONPATH=. {shlex.join([inside, *rest])}"


Row = dict[str, Any]


def take(python: Path | str, *arguments: str) -> tuple[str, ...]:
    return (str(python), "-m", "tests.bench.peer_roads", *arguments)


def measure(way: Way) -> Row:
    """Take a way once, in a process of its own; `wall_s` is the whole process.

    Raises: UsageError with the end of what the process said, if it failed.
    """
    start_s = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(way.command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    if done.returncode:
        raise UsageError(f"{way.road}, {way.what}: failed; repeat by `{way.repeat}`\n{done.stderr[-2000:]}")
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found | {"wall_s": time.perf_counter() - start_s}


def measure_in_turn(ways: Sequence[Way], repeats: int) -> list[Row]:
    """Every way `repeats` times, A B A B; a row each with the medians of all figures, the most of `WORST`."""
    readings: list[list[Row]] = [[] for _ in ways]
    for repeat in range(repeats):
        for way, taken in zip(ways, readings, strict=True):
            taken.append(measure(way))
            seconds = taken[-1]["seconds"]
            print(f"{repeat + 1}/{repeats} {way.section}: {way.what}, {way.road}: {seconds:.2f} s", file=sys.stderr)
    rows = []
    for way, taken in zip(ways, readings, strict=True):
        figures = {name: (max if name in WORST else median)(each[name] for each in taken) for name in taken[0]}
        named = {"section": way.section, "what": way.what, "road": way.road, "goals": way.goals, "limits": way.limits}
        rows.append(named | figures | {"repeats": repeats, "repeat": way.repeat})
    return rows


def add_ratios(rows: Sequence[Row], figure: str = "seconds") -> list[Row]:
    """How many times as fast each of our rows is as every peer on the same thing; `times_first` of first readings.

    `times_cpu` by the processors' seconds: a peer may take more cores than it was asked to.
    Of a scan more also as the bare network, of which it is a share.
    """
    return [
        row
        | {"times": _divide(rows, row, figure)}
        | ({"times_first": _divide(rows, row, "first_s")} if "first_s" in row else {})
        | ({"times_cpu": _divide(rows, row, "processor_s")} if "decoding_s" in row else {})
        for row in rows
    ]


def _divide(rows: Sequence[Row], ours: Row, figure: str) -> dict[str, float]:
    if not ours["road"].startswith("ours"):
        return {}
    peers = [row for row in rows if row["what"] == ours["what"] and not row["road"].startswith("ours")]
    bare = {BARE: ours["bare_s"] / ours[figure]} if "bare_s" in ours else {}
    return {row["road"]: row[figure] / ours[figure] for row in peers} | bare


def build_peers() -> None:
    """Make `.venv-peers` if it is not there: what `peers.txt` says, by pip."""
    installed = PEERS_PYTHON.parents[1] / ".installed"
    if installed.exists():
        return
    print("Building the peers' environment in .venv-peers (some minutes, 3 GB)", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", str(PEERS_PYTHON.parents[1])], check=True)
    install = [str(PEERS_PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "-q"]
    constraints = str(Path(__file__).with_name("peers.txt"))
    for wanted in (PEERS[:1], PEERS):  # torch first, or another package chooses its build
        subprocess.run([*install, "-c", constraints, *wanted], check=True)
    installed.touch()


def name_makers(modules: Sequence[str], maker: Callable[..., Any], *settings: Any) -> str:
    """A digest of what makes something that is kept: modules of darnet, the function here, settings and versions."""
    return digest_json([digest_sources(HOME, modules), inspect.getsource(maker), settings])[:16]


def clear_others(folder: Path) -> None:
    """Delete what lies beside the folder under such a name: the same thing, made by other code."""
    for old in folder.parent.iterdir() if folder.parent.exists() else ():
        if old != folder and re.fullmatch("[0-9a-f]{16}", old.name):
            shutil.rmtree(old)


def locate_phantoms(out: Path) -> Path:
    """Where the phantoms that this code makes are kept."""
    return out / "phantoms" / name_makers(PHANTOM_CODE, write_phantoms, PHANTOMS, IMAGES)


def write_phantoms(folder: Path) -> None:
    """Full-size phantoms, one chest in all formats; they are kept for the next run of the same code."""
    names = [*(name for name, _, _ in PHANTOMS), IMAGES]
    if all((folder / name.replace(" ", "-") / "done").exists() for name in names):
        return
    print(f"Making full-size phantoms in {folder} (a minute or two)", file=sys.stderr)
    clear_others(folder)
    chest = make_phantom(Diagnosis.NCP, 1, shape=(300, 512, 512))
    write_slice_images(chest, folder / IMAGES.replace(" ", "-") / "scan")
    for name, num_slices, syntax in PHANTOMS:
        part = replace(chest, voxels_hu=chest.voxels_hu[:: 300 // num_slices][:num_slices])
        spaced = replace(part, spacing_mm=(chest.spacing_mm[0] * (300 // num_slices), *chest.spacing_mm[1:]))
        write_dicom(spaced, folder / name.replace(" ", "-") / "scan", style=DicomStyle(transfer_syntax=syntax))
    for name in names:
        (folder / name.replace(" ", "-") / "done").touch()


def list_scans(scans: Path | None, out: Path) -> dict[str, str]:
    """Folders of DICOM series by what they are called; phantoms if no folder is given.

    Raises: UsageError if there is none.
    """
    phantoms = locate_phantoms(out)
    write_phantoms(phantoms)
    if scans is None:
        return {name: str((phantoms / name.replace(" ", "-") / "scan").resolve()) for name, _, _ in PHANTOMS}
    found = {series.name: series for series in list_series(scans) if len(series.files) >= 10}
    if not found:
        raise UsageError(f"--scans {scans}: no DICOM series of 10 slices below it; give a folder that holds some")
    return {f"{Path(name).name}, {len(item.files)} slices": item.folder for name, item in found.items()}


def plan_reading(scans: dict[str, str]) -> Iterator[Way]:
    """Read and standardise. MONAI has no goal but for the long series, where it was measured.

    Goals are of two threads and of one, the default of a night, alike.
    """
    for what, folder in scans.items():
        goals = {"plain": 3.5, "torchio": 5.0, "monai": 6.0} if "275 slices" in what else {}
        goals = {"torchio": 2.5} if "98 slices" in what else goals
        for peer in ("plain", "torchio", "monai"):
            yield Way("reading", what, peer, take(PEERS_PYTHON, "read", peer, folder))
        limits = {"growth_mb": 150.0} if "275 slices" in what else {}
        yield Way("reading", what, "ours", take(sys.executable, "read", "ours", folder), goals, limits)
        serial = take(sys.executable, "read", "ours-serial", folder)
        yield Way("reading", what, SERIAL, serial, goals, limits)
        yield Way("reading", what, "ours, lungs and child", take(sys.executable, "read", "ours-child", folder))


def plan_images(out: Path) -> Iterator[Way]:
    """Slice images are always phantoms."""
    folder = str((locate_phantoms(out) / IMAGES.replace(" ", "-") / "scan").resolve())
    goals = {"pillow + scikit-image": 10.0}
    yield Way("images", IMAGES, "pillow + scikit-image", take(PEERS_PYTHON, "read", "pillow", folder))
    yield Way("images", IMAGES, "ours", take(sys.executable, "read", "ours", folder), goals)
    yield Way("images", IMAGES, SERIAL, take(sys.executable, "read", "ours-serial", folder), goals)


def list_backends() -> list[tuple[str, str, float | None, float | None]]:
    """Those that this processor has."""
    return [backend for backend in BACKENDS if backend[1] != "bf16" or "BF16" in describe_openvino()["processor"]]


def locate_bundle(out: Path) -> Path:
    """Where the bundle that this code makes is kept."""
    settings = [section().model_dump(mode="json") for section in (ModelConfig, VolumeConfig, TrainConfig)]
    versions = [torch.__version__, load_nncf().__version__, describe_openvino()]
    return out / "bundle" / name_makers(BUNDLE_CODE, write_one_fold, settings, versions) / "int8"


def write_one_fold(out: Path) -> Path:
    """A bundle of one untrained network of full size, whose weights the peers load too, and its INT8 graph."""
    folder = locate_bundle(out)
    if not (folder / "bundle.json").exists():
        print(f"Making a network of full size in {folder}", file=sys.stderr)
        clear_others(folder.parent)
        shutil.rmtree(folder.parent, ignore_errors=True)  # what a run that was ended left of it
        fp32, network = str(folder.with_name("fp32")), ModelConfig()
        facts = dict.fromkeys(("model_version", "code_version", "trained_on"), "untrained")
        bundle, files = make_bundle(
            settings=BundleSettings(volume=VolumeConfig(), network=network, train=TrainConfig()),
            folds=[TrainedFold(build_network(network, 0).state_dict(), 1, 0, {})],
            cohort_sha256="0" * 64,
            **facts,
        )
        publish_bundles(fp32, [("", files)])
        noise = np.random.default_rng(0).integers(0, 256, VolumeConfig().shape, np.uint8)
        graph = quantize_graph(convert_network(load_network(bundle, 0)), [noise])
        digests = {f"{name}_sha256": hashlib.sha256(data).hexdigest() for name, data in graph._asdict().items()}
        measured = {"calibration_scans": 1, "num_scans": 1, "max_difference": 0, "mean_difference": 0}
        record = Int8Record(**digests, **measured, changed_predictions=0, nncf="untrained", **describe_openvino())
        _, files = add_int8_graphs(bundle, open_store(fp32), [graph], [record])
        publish_bundles(str(folder), [("", files)])
    return folder


def plan_network(bundle: Path) -> Iterator[Way]:
    weights = str(bundle / "fold0.safetensors")
    yield Way("network", "a forward pass", "eager torch", take(PEERS_PYTHON, "network", "eager", weights))
    yield Way("network", "a forward pass", PRODUCTS, take(sys.executable, "network", "products"))
    for backend, precision, least, _ in list_backends():
        command = take(sys.executable, "network", "ours", str(bundle), backend, precision)
        goals = {"eager torch": least} if least else {}
        yield Way("network", "a forward pass", f"ours, {backend} {precision}", command, goals)


def choose_lengths(num_series: int) -> tuple[int, int, int]:
    """Scans of a shorter night, of the road that all take, and of a longer night; each of every series as often.

    At least `SHORTER`, `ROAD_SCANS` and `LONGER` times those. Else the scans that one night has more would be a lighter
    or a heavier mix than those that all roads take.
    """
    shorter = -(-SHORTER // num_series) * num_series
    whole = -(-ROAD_SCANS // shorter) * shorter
    return shorter, whole, LONGER * whole


def plan_road(scans: dict[str, str], bundle: Path, out: Path) -> Iterator[Way]:
    """The floors, the network alone first, which leaves it compiled: compiling, reading and the bytes alone.

    Also network and reading side by side, with as many threads for the network as there are cores and with one.

    Then twelve scans or a few more, the same ones again if there are fewer, through MONAI's loader and through a night
    of ours, by each backend with a goal or bf16; and a shorter night of ours in fp32, a longer one in the others.
    """
    scans = dict(list(scans.items())[:MOST_SERIES])
    shorter, whole, longer = choose_lengths(len(scans))
    archives = {count: lay_archive(scans, count, out) for count in (shorter, whole, longer)}
    place, weights = str(archives[whole]), str(bundle / "fold0.safetensors")
    backends = [backend for backend in list_backends() if backend[0] != "torch"]
    for backend, precision, *_ in backends:
        alone = take(sys.executable, "network", "ours", str(bundle), backend, precision)
        yield Way("road", FLOOR, f"ours, network alone, {backend} {precision}", alone)
    for backend, precision, *_ in backends:
        anew = take(sys.executable, "compile", "ours", str(bundle), backend, precision)
        yield Way("road", FLOOR, f"{COMPILING}, {backend} {precision}", anew)
    for kind in ("reading", "bytes"):
        yield Way("road", FLOOR, f"ours, {kind} alone", take(sys.executable, "floor", kind, place))
    for (backend, precision, *_), threads in product(backends, sorted({THREADS, 1}, reverse=True)):
        command = take(sys.executable, "beside", "ours", str(bundle), str(archives[shorter]), backend, precision)
        road = f"ours, {BESIDE}, {backend} {precision}" + (ON_ONE if threads < THREADS else "")
        yield Way("road", FLOOR, road, (*command, str(threads)))
    yield Way("road", STAGES, SERIAL, take(sys.executable, "stages", "ours", place))
    yield Way("road", name_road(whole), "monai", take(PEERS_PYTHON, "road", "monai", weights, place))
    for backend, precision, _, least in backends:
        for count in (whole, shorter if precision == "fp32" else longer):
            command = take(sys.executable, "road", "ours", str(bundle), str(archives[count]), backend, precision)
            goals = {"monai": least} if least and count == whole else {}
            yield Way("road", name_road(count), f"ours, {backend} {precision}", command, goals)


def name_road(num_scans: int) -> str:
    return f"{num_scans} scans, the whole road"


def lay_archive(scans: dict[str, str], num_scans: int, out: Path) -> Path:
    """A folder of so many links to the scans in turn."""
    archive, folders = out / f"archive-{num_scans}", list(scans.values())
    archive.mkdir(exist_ok=True)
    for old in archive.iterdir():
        old.unlink()
    for number in range(num_scans):
        (archive / f"scan{number:02d}").symlink_to(Path(folders[number % len(folders)]).resolve())
    return archive.resolve()


def count_whole_processes(rows: Sequence[Row]) -> list[Row]:
    """A road's seconds are those of its whole process, start-up and end among them."""
    return [row | {"seconds": row["wall_s"]} if "scans" in row else row for row in rows]


def find_one_more(rows: Sequence[Row]) -> list[Row]:
    """What a scan more costs: MONAI's by its own clock once it runs, ours by the difference of two lengths.

    Of ours `bare_s` is the network alone, of which each scan more must reach `STEADY`.
    """
    found = []
    for road in dict.fromkeys(row["road"] for row in rows if "scans" in row):
        lengths = sorted((row for row in rows if row["road"] == road and "scans" in row), key=lambda row: row["scans"])
        first, last = lengths[0], lengths[-1]
        row = {"section": "road", "what": ONE_MORE, "road": road, "goals": {}, "repeats": last["repeats"]}
        if alone := [other for other in rows if other["what"] == FLOOR and other["road"] == name_alone(road)]:
            row |= {"goals": {BARE: STEADY}, "bare_s": alone[0]["seconds"]}
        if "one_more_s" in last:
            row |= {"seconds": last["one_more_s"], "processor_s": last["processor_s"] / last["scans"]}
        elif last["scans"] > first["scans"]:
            more = last["scans"] - first["scans"]
            row |= {name: (last[name] - first[name]) / more for name in ("seconds", "processor_s")}
            row["start_up_s"] = first["seconds"] - first["scans"] * row["seconds"]
        if "seconds" in row:
            commands = dict.fromkeys(item["repeat"] for item in lengths)
            found.append(row | {"repeat": " && ".join(commands)})
    return found


def name_alone(road: str, alone: str = "network alone") -> str:
    """The row of the network alone, or beside reading, of a road of ours."""
    return road.replace("ours,", f"ours, {alone},")


def profile_road(rows: Sequence[Row], num_cores: int) -> list[Row]:
    """Of each road of ours, the seconds of one core that each stage takes of a scan, measured alone, and of the whole.

    `floor_s`: the seconds a scan takes on these cores if none is ever idle and nothing but the stages is done.
    `idle`: seconds of a core a scan in which the whole road left it without work. `best_share`: the share of the bare
    network that the floor allows; `beside_s` what a scan takes by network and one reader side by side, without Ray.
    `goal`: the road's beside the peer's, with its seconds, scans, and start and end, where it has one.
    """
    named = {(row["what"], row["road"]): row for row in rows}
    read, beside = named[FLOOR, "ours, reading alone"], named[STAGES, SERIAL]
    decode, lungs = beside["headers_s"] + beside["pixels_s"], beside["lungs_s"]
    shared = {
        "bytes": named[FLOOR, "ours, bytes alone"]["processor_s"],
        "decode": decode,
        "lungs": lungs,
        "child": max(read["processor_s"] - decode - lungs, 0.0),
        "statistics": beside["statistics_s"],
    }
    found = []
    for whole in rows:
        if whole["what"] != ONE_MORE or (FLOOR, name_alone(whole["road"])) not in named:
            continue
        alone = named[FLOOR, name_alone(whole["road"])]
        measured = shared | {"network": alone["processor_s"]}
        stages = {name: measured[name] for name in PROFILE_STAGES}
        sum_s = sum(seconds for name, seconds in stages.items() if name != "bytes")
        floor_s = max(sum_s / num_cores, alone["seconds"])
        figures = {
            "seconds": whole["seconds"],
            "stages": stages,
            "sum": sum_s,
            "whole": whole["processor_s"],
            "idle": whole["seconds"] * num_cores - whole["processor_s"],
            "num_cores": num_cores,
            "floor_s": floor_s,
            "bare_s": alone["seconds"],
            "best_share": alone["seconds"] / floor_s,
            "share": alone["seconds"] / whole["seconds"],
            "beside_s": named[FLOOR, name_alone(whole["road"], BESIDE)]["seconds"],
            "start_up_s": whole["start_up_s"],
            "goal": find_goal(rows, whole["road"]),
        }
        kept = {name: whole[name] for name in ("section", "road", "repeats", "repeat")}
        found.append(kept | {"what": PROFILE, "goals": {}, "times": {}} | figures)
    return found


def find_goal(rows: Sequence[Row], road: str) -> Row | None:
    """The goal of a road of ours, which is beside one peer: who and how many times, both seconds, and the scans."""
    for row in rows:
        if row["road"] == road and "scans" in row and row["goals"]:
            ((peer, least),) = row["goals"].items()
            (other,) = [each for each in rows if (each["what"], each["road"]) == (row["what"], peer)]
            seconds = {"peer_s": other["seconds"], "seconds": row["seconds"]}
            return seconds | {"peer": peer, "least": least, "scans": row["scans"]}
    return None


def explain_goal(row: Row) -> str:
    """What of the goal beside the peer the network alone would allow, then all stages, then with start and end."""
    goal = row["goal"]
    steps = {
        "the network alone": row["bare_s"] * goal["scans"],
        "all stages on cores never idle": row["floor_s"] * goal["scans"],
        "those with start and end": row["floor_s"] * goal["scans"] + row["start_up_s"],
    }
    times = goal["peer_s"] / goal["seconds"]
    is_reached = "reached" if times >= goal["least"] else "missed"
    allowed = ", ".join(f"{name} {goal['peer_s'] / seconds:.3g}" for name, seconds in steps.items())
    return (
        f"{row['road']}: {times:.3g} x {goal['peer']} in {goal['scans']:g} scans, at least {goal['least']:g}: "
        f"{is_reached}; would be, of {allowed}"
    )


def explain_reading(row: Row) -> str:
    """Of a reading on one thread that misses a goal, its ratio by processors' seconds, and what decoding alone is."""
    missed = {peer: least for peer, least in row["goals"].items() if row["times"].get(peer, least) < least}
    told = [
        f"{row['times'][peer]:.3g} x {peer} of {least:g}: missed, {row['times_cpu'][peer]:.3g} by processors' seconds; "
        f"decoding the slices that count alone would be {row['times'][peer] * row['seconds'] / row['decoding_s']:.3g}"
        for peer, least in missed.items()
        if "decoding_s" in row
    ]
    return "; ".join(told)


def explain_profile(row: Row) -> str:
    """Why a road of ours reaches its goal beside the bare network, or does not."""
    reached = f"{row['road']}: {row['share']:.2f} of {BARE}, at least {STEADY:g}"
    if row["share"] >= STEADY:
        return f"{reached}: reached"
    others_s, cores = row["sum"] - row["stages"]["network"], row["num_cores"]
    room_s = row["bare_s"] / STEADY * cores - row["stages"]["network"]
    costly = max((name for name in PROFILE_STAGES if name not in ("bytes", "network")), key=row["stages"].__getitem__)
    why = (
        f"missed: the other stages take {others_s:.2f} s of a core a scan, most of it {costly}, and beside the network "
        f"{cores} cores leave {max(room_s, 0):.2f} s; without any other loss {row['best_share']:.2f} could be reached"
    )
    if row["best_share"] >= STEADY:
        why = (
            f"missed, though the stages leave room for {row['best_share']:.2f}: network and reading side by side "
            f"without Ray take {row['beside_s']:.3g} s a scan, {row['bare_s'] / row['beside_s']:.2f} of {BARE}; beside "
            f"the stages the road took {row['whole'] - row['sum']:.2f} s of a core a scan, and left cores idle for "
            f"{row['idle']:.2f} s"
        )
    return f"{reached}: {why}"


def print_profile(rows: Sequence[Row]) -> None:
    """The stages of a scan, each measured alone, against the whole road; below it why a goal is missed."""
    columns = [*PROFILE_STAGES, "sum", "whole", "idle"]
    table = []
    for row in rows:
        figures = row["stages"] | {name: row[name] for name in ("sum", "whole", "idle")}
        seconds = [f"{figures[name]:.3g}" for name in columns]
        found = [*(f"{row[name]:.3g}" for name in ("floor_s", "beside_s", "seconds")), f"{row['share']:.2f}"]
        table.append([row["road"].removeprefix("ours, "), *seconds, *found])
    title = f"{PROFILE}: seconds of one core a scan; from floor on, of {rows[0]['num_cores']} cores"
    print_table(title, ["road", *columns, "floor", "beside", "more", "share"], table)
    print(
        "Stages each alone; bytes are read within decode. child: what reading in a limited process costs besides. sum: "
        "without bytes. whole: a scan more of the whole road. idle: cores without work meanwhile. floor: sum / cores, "
        "or the network alone where that takes longer. beside: network and one reader side by side without Ray. more: "
        f"seconds of a scan more; share: {BARE} in it.",
        file=sys.stderr,
    )
    for row in rows:
        print(f"{explain_profile(row)}; repeat by `{row['repeat']}`", file=sys.stderr)
        if row["goal"]:
            print(explain_goal(row), file=sys.stderr)


def plan_augmentation() -> Iterator[Way]:
    what = "64 x 224 x 224"
    authors = take(PEERS_PYTHON, "augment", "scikit-image")
    yield Way("augmentation", what, "scikit-image, three warps", authors)
    ours = take(sys.executable, "augment", "ours")
    yield Way("augmentation", what, "ours", ours, {"scikit-image, three warps": 15.0})


def measure_planning(repeats: int) -> list[Row]:
    """A night with nothing new, against objects and nights; what repeats a row takes a single reading."""
    rows = []
    for num_objects, num_nights in PLANS:
        found = planning.measure(num_objects, 1, num_nights, repeats)
        what = f"{num_objects:,} objects, {num_nights} nights"
        print(f"planning: {what}: {found['seconds']} s, {found['growth_mb']} MB", file=sys.stderr)
        limits = {name: float(limit) for name, limit in planning.GOAL.items()} if num_objects == 1_000_000 else {}
        named = {"section": "planning", "what": what, "road": "ours", "goals": {}, "limits": limits}
        rows.append(
            named | found | {"repeat": f"make bench-planning NUM_OBJECTS={num_objects} NUM_NIGHTS={num_nights}"}
        )
    return rows


def print_section(section: str, rows: Sequence[Row], load: tuple[float, float]) -> None:
    """A table of the rows, in brackets the first reading of a process; below it how to repeat each."""
    table, explained = [], [row for row in rows if row["what"] in EXPLAIN]
    rows = [row for row in rows if row["what"] not in EXPLAIN]
    for row in rows:
        first = {road: f" ({times:.3g})" for road, times in row.get("times_first", {}).items()}
        times = ", ".join(f"{times:.3g}{first.get(road, '')} x {road}" for road, times in row["times"].items())
        goals = [f"{least:g} x {road}" for road, least in row["goals"].items()]
        goals += [f"at most {most:g} {UNITS[name]}" for name, most in row.get("limits", {}).items()]
        memory = f"{row['growth_mb']:.0f}" if "growth_mb" in row else ""
        processor = f"{row['processor_s']:.3g}" if "processor_s" in row else ""
        seconds = f"{row['seconds']:.3g}" + (f" ({row['first_s']:.3g})" if "first_s" in row else "")
        table.append([row["what"], row["road"], seconds, processor, memory, times, ", ".join(goals)])
    title = f"{section}: medians of {rows[0]['repeats']}, load {load[0]:.1f} before, {load[1]:.1f} after"
    print_table(title, ["what", "road", "s", "CPU s", "MB", "as fast as", "goal"], table)
    print(describe_processor(), file=sys.stderr)
    for row in rows:
        print(f"{row['what']}, {row['road']}: repeat by `{row['repeat']}`", file=sys.stderr)
        for note in filter(None, (describe_road(row), explain_reading(row))):
            print(f"  {note}", file=sys.stderr)
    for what, explain in EXPLAIN.items():
        if chosen := [row for row in explained if row["what"] == what]:
            explain(chosen)
    if section == "planning":
        print(describe_growth(rows), file=sys.stderr)


# Rows that are no line of their section's table, and are told below it.
EXPLAIN: dict[str, Callable[[Sequence[Row]], None]] = {
    LAYERS: print_layers,
    PROFILE: print_profile,
    PHASES: print_phases,
}


def describe_growth(rows: Sequence[Row]) -> str:
    """How seconds and memory follow the objects of an archive, beside a table of as many nights."""
    longest = max(row["nights"] for row in rows)
    curve = sorted((row["objects"], row["seconds"], row["growth_mb"]) for row in rows if row["nights"] == longest)
    (fewest, first_s, _), (most, last_s, last_mb) = curve[0], curve[-1]
    if most == fewest:
        return "one size of archive alone says nothing of growth"
    before, _, before_mb = curve[-2]  # by when what is bounded, such as caches, is full
    bytes_more = (last_mb - before_mb) * 1e6 / (most - before)
    return (
        f"{most / fewest:g} times the objects take {last_s / first_s:.3g} times the seconds; of memory the last "
        f"{most / before:g} times took {bytes_more:.2g} bytes more for each, so that it is "
        f"{'flat' if bytes_more < 1 else 'not flat'}"
    )


def describe_processor() -> str:
    """On what the figures were taken: INT8 on a processor without VNNI says nothing of one that has it."""
    facts = describe_openvino()
    has = " ".join(list_instructions()) or "none of " + " ".join(INSTRUCTIONS)
    return f"on {facts['processor']}, {os.cpu_count()} CPUs with {has}; OpenVINO {facts['openvino']}"


def describe_road(row: Row) -> str:
    """What a row says beside its figures.

    Of a scan more, how it was found and what the road takes besides; of a night, of what is beside the network, and of
    reading on one thread, the stages.
    """
    if row["what"] == ONE_MORE:
        if not row["road"].startswith("ours"):
            return "by its own clock, from its second scan to its last; CPU s of the whole process, a scan"
        return f"of two lengths of the road; start-up and end {row['start_up_s']:.1f} s"
    if row["what"] == FLOOR and row["road"].startswith(COMPILING):
        return "with no cache, as on a new machine; the roads below find it compiled"
    stages = [name for name in row if name in STAGE_NAMES]
    told = ", ".join(f"{name.removesuffix('_s')} {row[name]:.3g}" for name in stages) + (" s a scan" if stages else "")
    return told + (f"; at most {row['spilled_mb']:.3g} MB spilled" if "spilled_mb" in row else "")


def draw_chart(rows: Sequence[Row]) -> Figure:
    """A panel for each thing measured, a bar for each road; planning as a curve."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["section"] != "planning" and row["what"] not in (FLOOR, STAGES, *EXPLAIN):
            groups.setdefault((row["section"], row["what"]), []).append(row)
    groups = {key: group for key, group in groups.items() if len(group) > 1}  # with nothing to compare, no panel
    planned = [row for row in rows if row["section"] == "planning"]
    heights = [len(group) for group in groups.values()] + ([5] if planned else [])
    figure = Figure(figsize=(7.5, 0.34 * sum(heights) + 0.85 * len(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axis, ((section, what), group) in zip(axes, groups.items(), strict=False):
        _draw_bars(axis, f"{section}: {what}", group)
    if planned:
        _draw_planning(axes[-1], planned)
    return figure


def _draw_bars(axis: Axes, title: str, rows: Sequence[Row]) -> None:
    seconds = [row["seconds"] for row in rows]
    colours = ["#1f6f8b" if row["road"].startswith("ours") else "#b5b5b5" for row in rows]
    axis.barh([row["road"] for row in rows], seconds, color=colours)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.3 * max(seconds))
    axis.set_title(title, loc="left", fontsize=10)
    for place, row in enumerate(rows):
        memory = f", {row['growth_mb']:.0f} MB" if "growth_mb" in row else ""
        axis.text(row["seconds"], place, f"  {row['seconds']:.3g} s{memory}", va="center", fontsize=8)
    _strip(axis)


def _draw_planning(axis: Axes, rows: Sequence[Row]) -> None:
    longest = max(row["nights"] for row in rows)
    curve = sorted((row["objects"], row["seconds"], row["growth_mb"]) for row in rows if row["nights"] == longest)
    objects, seconds, _ = zip(*curve, strict=True)
    axis.loglog(objects, seconds, "o-", color="#1f6f8b")
    for x, y, memory in curve:
        axis.annotate(f"{y:g} s, {memory:.0f} MB", (x, y), (6, -12), textcoords="offset points", fontsize=8)
    axis.set_xlim(right=objects[-1] * 4)
    axis.set_ylim(bottom=min(seconds) / 2)  # room for the first label
    axis.set_title(f"planning: a night with nothing new, {longest} nights in the table", loc="left", fontsize=10)
    axis.set_xlabel("objects in the archive", fontsize=8)
    axis.set_ylabel("s", fontsize=8)
    _strip(axis)


def _strip(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def measure_section(section: str, scans: dict[str, str], out: Path, repeats: int) -> list[Row]:
    """All rows of one section, with ratios."""
    plans: dict[str, Callable[[], Iterator[Way]]] = {
        "reading": lambda: plan_reading(scans),
        "images": lambda: plan_images(out),
        "network": lambda: plan_network(write_one_fold(out)),
        "road": lambda: plan_road(scans, write_one_fold(out), out),
        "augmentation": plan_augmentation,
    }
    if section == "planning":
        return add_ratios(measure_planning(repeats))
    rows = measure_in_turn(list(plans[section]()), repeats)
    if section == "road":
        rows = count_whole_processes(rows)
        rows += find_one_more(rows)
        return [*add_ratios(rows), *profile_road(rows, THREADS), *list_phases(rows, PHASES)]
    if section == "network":
        rows = add_ratios(rows)
        return [*rows, *profile_network(functools.partial(measure_layers, write_one_fold(out)), rows, LAYERS)]
    return add_ratios(rows)


def measure_layers(bundle: Path, precision: str) -> Row:
    """OpenVINO's own profile of a forward pass, and the command that repeats it."""
    way = Way("network", LAYERS, precision, (sys.executable, "-m", "tests.bench.layers", str(bundle), precision))
    return measure(way) | {"repeat": way.repeat}


def merge_rows(earlier: Sequence[Row], taken: Sequence[Row]) -> list[Row]:
    """Rows of earlier runs but for what was measured again, by section."""
    again = {(row["section"], row["what"]) for row in taken}
    kept = [row for row in earlier if (row["section"], row["what"]) not in again]
    return sorted([*kept, *taken], key=lambda row: SECTIONS.index(row["section"]))


SECTIONS = ("reading", "images", "augmentation", "network", "road", "planning")


def parse_settings(arguments: list[str]) -> argparse.Namespace:
    """What is asked for; `only` as a list of sections. Raises: UsageError for an unknown one."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.peers", description=__doc__)
    parser.add_argument("--scans", type=Path, help="folder of DICOM series; default: full-size phantoms")
    parser.add_argument("--repeats", type=int, default=3, help="times each way is taken (default 3)")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"sections, of {','.join(SECTIONS)}")
    parser.add_argument("--out", type=Path, default=Path(".bench"), help="for bench.json, bench.png, phantoms")
    given = parser.parse_args(arguments)
    given.only = given.only.split(",")
    if unknown := set(given.only) - set(SECTIONS):
        raise UsageError(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(SECTIONS)}")
    return given


def main(arguments: list[str]) -> int:
    """Measure the chosen sections, print and keep them."""
    given = parse_settings(arguments)
    chosen = given.only
    given.out.mkdir(parents=True, exist_ok=True)
    build_peers()
    scans = list_scans(given.scans, given.out) if {"reading", "images", "road"} & set(chosen) else {}
    kept = given.out / "bench.json"
    rows: list[Row] = json.loads(kept.read_text()) if kept.exists() else []
    for section in (name for name in SECTIONS if name in chosen):
        before = os.getloadavg()[0]
        taken = measure_section(section, scans, given.out, given.repeats)
        load = (before, os.getloadavg()[0])
        print_section(section, taken, load)
        found_at = {"load": load, "at": datetime.now(UTC).isoformat(timespec="seconds")}
        rows = merge_rows(rows, [row | found_at for row in taken])
        kept.write_text(json.dumps(rows, indent=1))
        draw_chart(rows).savefig(given.out / "bench.png", dpi=130)
    print(json.dumps({"bench": "peers", "sections": chosen, "out": str(given.out)}))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UsageError as error:
        sys.exit(f"peers: {error}")
