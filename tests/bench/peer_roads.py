"""One road's part of `make bench`, measured in a process of its own; a JSON line comes out.

    python -m tests.bench.peer_roads read monai FOLDER        plain, torchio, pillow (images), ours, -serial, -child
    python -m tests.bench.peer_roads network eager WEIGHTS    products    ours BUNDLE BACKEND PRECISION
    python -m tests.bench.peer_roads road monai WEIGHTS ARCHIVE    ours BUNDLE ARCHIVE BACKEND PRECISION
    python -m tests.bench.peer_roads augment scikit-image     ours
    python -m tests.bench.peer_roads floor reading ARCHIVE    bytes
    python -m tests.bench.peer_roads beside ours BUNDLE ARCHIVE BACKEND PRECISION THREADS
    python -m tests.bench.peer_roads stages ours ARCHIVE

A peer is used as its documentation shows. Its roads run in `.venv-peers`, ours in the project's environment; so a
library is imported only by the road that needs it, and before the clock starts.
"""

import argparse
import functools
import json
import multiprocessing
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

WINDOW_HU = (-1350.0, 150.0)
SHAPE = (64, 224, 224)
MARGIN = 48  # pixels off each side of 512
THREADS = min(os.cpu_count() or 1, 2)
MATRIX_SIDE = 2048  # 16 MiB a matrix: large enough for any processor to reach its best
Task = Callable[[], Any]


def read_plain() -> Callable[[str], Any]:
    """SimpleITK's series reader and torch's resize."""
    import SimpleITK as sitk
    import torch

    def read(folder: str) -> Any:
        series = sitk.ImageSeriesReader()
        series.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(folder))
        unit = (sitk.GetArrayFromImage(series.Execute()).astype(np.float32) - WINDOW_HU[0]) / np.ptp(WINDOW_HU)
        inner = unit.clip(0, 1)[None, None, :, MARGIN:-MARGIN, MARGIN:-MARGIN]
        return torch.nn.functional.interpolate(torch.from_numpy(inner), SHAPE, mode="trilinear")

    return read


def make_monai_transform() -> Any:
    """MONAI's dictionary transforms, x, y, z as its reader gives them."""
    from monai import transforms as mt

    low, high = WINDOW_HU
    depth, height, width = SHAPE
    return mt.Compose(
        [
            mt.LoadImaged(keys="scan", reader="ITKReader"),
            mt.EnsureChannelFirstd(keys="scan"),
            mt.ScaleIntensityRanged(keys="scan", a_min=low, a_max=high, b_min=0.0, b_max=1.0, clip=True),
            mt.CenterSpatialCropd(keys="scan", roi_size=(512 - 2 * MARGIN, 512 - 2 * MARGIN, -1)),
            mt.Resized(keys="scan", spatial_size=(width, height, depth), mode="trilinear"),
        ]
    )


def read_monai() -> Callable[[str], Any]:
    transform = make_monai_transform()
    return lambda folder: transform({"scan": folder})["scan"]


def read_torchio() -> Callable[[str], Any]:
    """TorchIO's transforms; it has no crop here, which spares it work."""
    import torchio as tio

    depth, height, width = SHAPE
    steps = [tio.Clamp(*WINDOW_HU), tio.RescaleIntensity((0, 1)), tio.Resize((width, height, depth))]
    transform = tio.Compose(steps)
    return lambda folder: transform(tio.ScalarImage(folder)).data


def read_pillow() -> Callable[[str], Any]:
    """Slice images by Pillow, whole, then scikit-image's anti-aliased resize, as the paper's authors did."""
    from PIL import Image
    from skimage.transform import resize

    def read(folder: str) -> Any:
        paths = sorted(Path(folder).iterdir(), key=lambda path: int(path.stem))
        whole = np.stack([np.asarray(Image.open(path).convert("L")) for path in paths]) / 255
        return resize(whole[:, MARGIN:-MARGIN, MARGIN:-MARGIN], SHAPE, anti_aliasing=True)

    return read


def find_opener() -> Callable[[str], Any]:
    """What opens a scan's slices in their order, all headers read and checked; what it needs is loaded here."""
    from darnet.config import DecodeConfig
    from darnet.decode import open_images
    from darnet.reading.dicom import arrange_series
    from darnet.reading.road import DicomStack
    from darnet.reading.series import sort_files
    from darnet.scan import StagedFile

    def open_stack(folder: str) -> Any:
        staged = [StagedFile(path.name, path, path.name) for path in sorted(Path(folder).iterdir())]
        files, limits = sort_files(staged, DecodeConfig().min_slices), DecodeConfig()
        if not files.series:
            return open_images(files.images, limits, is_head_first=True)
        ((_, headers),) = files.series.items()
        return DicomStack(arrange_series(headers, limits))

    return open_stack


def read_ours(num_threads: int = THREADS) -> Callable[[str], Any]:
    """What peers do too: headers with all their checks, pixels, the standard volume; in this process."""
    from darnet.config import VolumeConfig
    from darnet.threads import set_decoder_threads
    from darnet.volume import make_standard_volume

    set_decoder_threads()
    open_stack = find_opener()
    return lambda folder: make_standard_volume(open_stack(folder), VolumeConfig(), num_threads)


def measure_parts(folder: str) -> dict[str, float]:
    """Where our reading goes on one thread: headers, the decoding alone of the slices that count, and all else."""
    from darnet.config import VolumeConfig
    from darnet.volume import list_contributions, make_standard_volume

    config, open_stack = VolumeConfig(), find_opener()
    stack, headers = _keep(lambda: open_stack(folder))
    slices = {item.source for item in list_contributions(stack.shape[0], config.shape[0], config.depth_resampling)}

    def decode() -> None:
        for index in sorted(slices):
            stack.read_slice(index)

    decoding_s = _time(decode)["seconds"]
    pixels_s = _time(lambda: make_standard_volume(stack, config))["seconds"]
    return {"headers_s": headers["seconds"], "decoding_s": decoding_s, "shrinking_s": pixels_s - decoding_s}


def read_ours_in_child() -> Callable[[str], Any]:
    """All that a worker does with a scan: staged, read in the limited child, lungs segmented, sent back."""
    from darnet.archive import list_sources
    from darnet.config import DecodeConfig, VolumeConfig
    from darnet.ingest import Ingester
    from darnet.reading.road import Road
    from darnet.storage import open_store

    def read(folder: str) -> Any:
        store = open_store(folder)
        if folder not in ingesters:
            ingesters[folder] = Ingester(store, Road(VolumeConfig(), DecodeConfig()))
        return [ingesters[folder].ingest(source) for source in list_sources(store.list_objects())]

    ingesters: dict[str, Ingester] = {}
    return read


READERS = {
    "plain": read_plain, "monai": read_monai, "torchio": read_torchio, "pillow": read_pillow,
    "ours": read_ours, "ours-serial": functools.partial(read_ours, 1), "ours-child": read_ours_in_child,
}  # fmt: skip


def measure_reading(road: str, folder: str) -> dict[str, float]:
    """Read a scan twice: the first reading tells memory above the bare process, the second, all being loaded, time.

    `first_s` is the first one's time, in which a peer also loads what it imports late.
    """
    _set_torch_threads()
    read = READERS[road]()
    before_bytes = _reset_peak()
    first = _time(lambda: read(folder))
    growth_bytes = _read_memory("VmHWM") - before_bytes
    figures = _time(lambda: read(folder)) | {"first_s": first["seconds"], "growth_mb": growth_bytes / 1e6}
    if road == "ours-child":  # works in another process than the one whose memory is measured
        return {name: figures[name] for name in ("seconds", "first_s", "processor_s")}
    return figures | (measure_parts(folder) if road == "ours-serial" else {})


def measure_floor(kind: str, archive: str) -> dict[str, float]:
    """Reading alone, as a worker does it, or the bytes of all files from the page cache: the mean over the scans."""
    folders = [str(path.resolve()) for path in sorted(Path(archive).iterdir())]

    def measure(folder: str) -> dict[str, float]:
        if kind == "bytes":
            return _time(lambda: [path.read_bytes() for path in Path(folder).iterdir()])
        return measure_reading("ours-child", folder)

    once = {folder: measure(folder) for folder in dict.fromkeys(folders)}
    return {name: mean(once[folder][name] for folder in folders) for name in ("seconds", "processor_s")}


def measure_stages(archive: str) -> dict[str, float]:
    """What a scan costs beside the network, stage by stage, in seconds of the processor: the mean over the scans.

    `seconds` is all of it. In one process and on one thread; what travels between processes is not in it.
    """
    from darnet.config import VolumeConfig
    from darnet.errors import Status
    from darnet.lung import has_lung, segment_lung
    from darnet.scan import IngestedScan, StandardVolume
    from darnet.score import ScanScore, measure_score
    from darnet.threads import set_decoder_threads, set_model_threads
    from darnet.volume import make_standard_volume

    set_model_threads(1)  # threads that wait for work would count as work
    set_decoder_threads()
    config, open_stack = VolumeConfig(), find_opener()
    maps = np.random.default_rng(0).random((1, 3, 4, 14, 14), np.float32)

    def find_lung(volume: StandardVolume) -> Any:
        lung = segment_lung(volume, config.window_hu)
        assert has_lung(lung, volume)
        return lung

    def measure(folder: Path) -> dict[str, float]:
        stack, headers = _keep(lambda: open_stack(str(folder)))
        volume, pixels = _keep(lambda: make_standard_volume(stack, config))
        lung, lungs = _keep(lambda: find_lung(volume))
        scan = IngestedScan("a", Status.OK, volume=volume, lung=lung)
        score = ScanScore(np.full((1, 3), 1 / 3), maps, None, 0.0)
        _, statistics = _keep(lambda: measure_score(scan, score))
        stages = {"headers_s": headers, "pixels_s": pixels, "lungs_s": lungs, "statistics_s": statistics}
        return {name: figures["processor_s"] for name, figures in stages.items()}

    folders = [path.resolve() for path in sorted(Path(archive).iterdir())]
    measure(folders[0])  # loads what is imported late
    once = {folder: measure(folder) for folder in dict.fromkeys(folders)}
    stages = {name: mean(once[folder][name] for folder in folders) for name in once[folders[0]]}
    return {"seconds": sum(stages.values()), "processor_s": sum(stages.values()), **stages}


def load_eager(weights: str) -> Any:
    """The project's network as torch runs it by itself, with the bundle's weights."""
    import torch
    from safetensors.torch import load_file

    from darnet.config import ModelConfig
    from darnet.model import DARNet

    torch.set_num_threads(THREADS)
    model = DARNet(ModelConfig())
    model.load_state_dict(load_file(weights))
    return model.eval()


def classify(model: Any, volume: Any) -> Any:
    """Probabilities and the class map of one scan, (1, 1, D, H, W)."""
    import torch

    with torch.inference_mode():
        features = model.features(volume)
        class_maps = torch.einsum("kc,bcdhw->bkdhw", model.head.weight, features)
        logits = features.mean((2, 3, 4)) @ model.head.weight.T + model.head.bias
        return logits.softmax(1), class_maps


def measure_eager(weights: str) -> dict[str, float]:
    import torch

    model, volume = load_eager(weights), torch.from_numpy(_draw_volume()[None, None] / np.float32(255))
    classify(model, volume)
    return _time(lambda: classify(model, volume))


def measure_products() -> dict[str, float]:
    """As many multiplications and additions as a forward pass has, in products of large matrices of float32.

    torch's own products, which another library may do faster: `layers` has OpenVINO's. A network that takes longer
    than its library's products waits for memory or for a better order of its loops.
    """
    import torch

    torch.set_num_threads(THREADS)
    matrix = torch.rand((MATRIX_SIDE, MATRIX_SIDE))
    num_products = 20
    matrix @ matrix
    figures = _time(lambda: [matrix @ matrix for _ in range(num_products)])
    share = count_operations() / (num_products * 2 * MATRIX_SIDE**3)
    return {name: value * share for name, value in figures.items()}


def count_operations() -> int:
    """Multiplications and additions of a forward pass of the network at its full size."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from darnet.config import ModelConfig
    from darnet.model import build_network

    network = build_network(ModelConfig(), 0).to("meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros((1, 1, *network.config.volume_shape), device="meta"))
    return counter.get_total_flops()


def configure_score(backend: str, precision: str) -> Any:
    """How the project scores here: all cores for the network, two scans a batch, as its forward pass takes them."""
    from darnet.config import ScoreConfig

    return ScoreConfig(batch_size=2, num_threads=THREADS, backend=backend, precision=precision)


def measure_network(bundle: str, backend: str, precision: str) -> dict[str, float]:
    """The scoring ensemble by itself, seconds a scan; its forward pass takes two."""
    from darnet.bundle import read_bundle
    from darnet.score import Ensemble
    from darnet.storage import open_store

    ensemble = Ensemble.from_bundle(read_bundle(open_store(bundle)), configure_score(backend, precision))
    batch = np.stack([_draw_volume()] * 2)
    ensemble.score(batch[:1])
    return {name: value / 2 for name, value in _time(lambda: ensemble.score(batch)).items()}


def measure_beside(bundle: str, archive: str, backend: str, precision: str, num_threads: str) -> dict[str, float]:
    """The network while one other process reads as many scans, without Ray: seconds a scan until both are done.

    The other works as a worker does, on one thread, and begins with the network; both are warm.
    """
    from darnet.bundle import read_bundle
    from darnet.score import Ensemble
    from darnet.storage import open_store

    config = configure_score(backend, precision).model_copy(update={"num_threads": int(num_threads)})
    ensemble = Ensemble.from_bundle(read_bundle(open_store(bundle)), config)
    volume, folders = _draw_volume(), [str(path.resolve()) for path in sorted(Path(archive).iterdir())]
    ensemble.score([volume])
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    reader = context.Process(target=_read_when_told, args=(there, folders))
    reader.start()
    there.close()  # or its death would not be noticed
    here.recv()

    def run() -> None:
        here.send("now")
        for _ in folders:
            ensemble.score([volume])
        here.recv()

    figures = _time(run)
    reader.join()
    return {name: value / len(folders) for name, value in figures.items()}


def _read_when_told(line: Any, folders: list[str]) -> None:
    """Say when all is loaded, read on a word, say when all is read."""
    read = read_ours_in_child()
    for folder in dict.fromkeys(folders):
        read(folder)
    line.send("ready")
    line.recv()
    for folder in folders:
        read(folder)
    line.send("done")


def measure_compiling(bundle: str, backend: str, precision: str) -> dict[str, float]:
    """Reading a bundle of one fold and compiling it where no cache has it, as a new machine must."""
    from darnet.bundle import read_bundle
    from darnet.score import Ensemble
    from darnet.storage import open_store

    with tempfile.TemporaryDirectory() as folder:
        config = configure_score(backend, precision).model_copy(update={"cache": Path(folder) / "cache"})
        return _time(lambda: Ensemble.from_bundle(read_bundle(open_store(bundle)), config))


def measure_monai_road(weights: str, archive: str) -> dict[str, float]:
    """Every scan of an archive through MONAI's loader, which reads the next scan in a worker, and the same network."""
    import torch
    from monai.data import DataLoader, Dataset

    start_s = time.perf_counter()
    model = load_eager(weights)
    scans = [{"scan": str(path)} for path in sorted(Path(archive).iterdir())]
    loader = DataLoader(Dataset(scans, make_monai_transform()), batch_size=1, num_workers=1)
    ends_s = []
    for batch in loader:
        volume = batch["scan"].as_tensor().permute(0, 1, 4, 3, 2).to(torch.float32).contiguous()
        classify(model, volume)
        ends_s.append(time.perf_counter() - start_s)
    del loader  # ends its worker
    figures = {"processor_s": read_processors(), "scans": len(scans)}
    return {"seconds": ends_s[-1], "one_more_s": find_pace(ends_s), **figures}


def find_pace(ends_s: list[float]) -> float:
    """Seconds from scan to scan once the road runs: after the second, by when its loader works ahead."""
    later = ends_s[1:] if len(ends_s) > 2 else ends_s
    return (later[-1] - later[0]) / (len(later) - 1)


def measure_our_road(bundle: str, archive: str, backend: str, precision: str) -> dict[str, Any]:
    """A night of `jobs.score`'s own code, on a cluster that counts this machine's CPUs.

    What a scan more costs is told by nights of two lengths: rows come in batches, and decoding runs ahead of them.
    """
    marks = {"begun": time.time()}
    import ray

    from darnet.ray_score import NightRequest, score_archive
    from darnet.results import read_predictions
    from darnet.storage import open_store
    from tests.bench.phases import find_phases

    marks["imported"] = time.time()
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # as of a job's own cluster
    os.environ.pop("RAY_AUTH_MODE", None)
    start_s = time.perf_counter()
    ray.init("local", num_cpus=max(THREADS, 2), include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    marks["ray_up"] = time.time()
    with tempfile.TemporaryDirectory() as folder:
        results = open_store(folder, create=True)
        config = configure_score(backend, precision)
        score_archive(NightRequest(open_store(archive), open_store(bundle), results, config))
        seconds, processor_s = time.perf_counter() - start_s, read_processors()
        spilled_mb = read_spilled_bytes() / 1e6
        ray.shutdown()
        marks["ended"] = time.time()
        rows = read_predictions(folder)
        phases = find_phases(Path(folder), rows, marks, config.batch_size)
    assert (rows["status"] == "OK").all(), rows[["source", "status", "status_detail"]]
    stages = {name: float(rows[name].mean()) for name in ("fetch_s", "decode_s", "model_s")}
    figures = {"seconds": seconds, "processor_s": processor_s, "scans": len(rows), "spilled_mb": spilled_mb}
    return figures | stages | phases


def read_spilled_bytes() -> int:
    """What Ray's object store on this machine has written to disk for want of memory, since its start."""
    import ray
    from ray._private.internal_api import node_stats

    (node,) = ray.nodes()
    found = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False)
    return int(found.store_stats.spilled_bytes_total)


def read_processors() -> float:
    """Processor seconds of this process and of all that it started, of what has ended too."""
    return time.process_time() + read_children()


def read_children() -> float:
    """Processor seconds, in hundredths, of all that this process started.

    Source: proc(5), `stat`: the parent's number; time in user and kernel mode, its own and of children waited for.
    """
    told: dict[int, tuple[int, list[int]]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        told[int(path.parent.name)] = int(fields[1]), [int(field) for field in fields[11:15]]
    here = os.getpid()
    family = {here}
    while more := {number for number, (parent, _) in told.items() if parent in family} - family:
        family |= more
    ticks = sum(told[here][1][2:]) + sum(sum(told[number][1]) for number in family - {here})
    return ticks / os.sysconf("SC_CLK_TCK")


def augment_like_authors() -> Task:
    """Three scikit-image warps of each slice, one after another: rotation, translation, zoom."""
    from skimage.transform import AffineTransform, rotate, warp

    volume = _draw_volume() / 255.0
    moved, zoomed = AffineTransform(translation=(3, -2)), AffineTransform(scale=(0.95, 0.95))

    def run() -> Any:
        return np.stack([warp(warp(rotate(plane, 4.0), moved), zoomed) for plane in volume])

    return run


def augment_ours() -> Task:
    """On one thread, as training does it and as scikit-image does."""
    from darnet.augment import augment_volume
    from darnet.config import AugmentConfig
    from darnet.threads import set_model_threads

    set_model_threads(1)
    volume = _draw_volume()
    return lambda: augment_volume(volume, AugmentConfig(), np.random.default_rng(0))


def measure_augmentation(road: str) -> dict[str, float]:
    run = {"scikit-image": augment_like_authors, "ours": augment_ours}[road]()
    run()
    taken = [_time(run) for _ in range(3)]
    return {name: median(figures[name] for figures in taken) for name in taken[0]}


def _draw_volume() -> Any:
    return np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)


def _set_torch_threads() -> None:
    import torch

    torch.set_num_threads(THREADS)


def _time(run: Task) -> dict[str, float]:
    """By the clock, and of the processors, which other programs on the machine disturb less."""
    return _keep(run)[1]


def _keep(run: Task) -> tuple[Any, dict[str, float]]:
    """What it gives, and its seconds."""
    children_start_s, own_start_s, start_s = read_children(), time.process_time(), time.perf_counter()
    found = run()
    seconds, own_s = time.perf_counter() - start_s, time.process_time() - own_start_s
    return found, {"seconds": seconds, "processor_s": own_s + read_children() - children_start_s}


def _reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _read_memory("VmRSS")


def _read_memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def main(arguments: list[str]) -> int:
    """Measure what is asked for and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("read", "network", "compile", "road", "augment", "floor", "beside", "stages"))
    parser.add_argument("road")
    parser.add_argument("rest", nargs="*")
    given = parser.parse_args(arguments)
    tasks: dict[tuple[str, bool], Callable[..., dict[str, Any]]] = {
        ("network", True): measure_network, ("network", False): measure_eager,
        ("road", True): measure_our_road, ("road", False): measure_monai_road,
        ("compile", True): measure_compiling, ("beside", True): measure_beside,
    }  # fmt: skip
    if (given.task, given.road) == ("network", "products"):
        found = measure_products()
    elif given.task in ("read", "augment"):
        found = {"read": measure_reading, "augment": measure_augmentation}[given.task](given.road, *given.rest)
    elif given.task == "floor":
        found = measure_floor(given.road, *given.rest)
    elif given.task == "stages":
        found = measure_stages(*given.rest)
    else:
        found = tasks[given.task, given.road == "ours"](*given.rest)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
