"""The house keeps its floors: rows import lower rows only, ray stays on the top floor, and importing does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.places import ROOT

ROWS = (
    "errors config pseudonym scan threads",
    "archive auditing.shortcuts augment cam cam_statistics code_version cpus decoded_scan evaluation.paper history "
    "lung metrics model page phantoms.canvas publishing.outermost publishing.rows range_reader ray_backpressure "
    "ray_token reading.excerpt reading.pixel_length reading.plain_header reading.sandbox reading.stored_pixels "
    "reading.volume_file report s3_answers settings storage_local store tables terminal volume",
    "evaluation.intervals storage_s3",
    "calibration charts checkup.findings cohort evaluation.comparisons evaluation.predictions inference.graph job "
    "phantoms.body phantoms.files phantoms.findings publishing.origin publishing.tally ray_metrics reading.dicom "
    "reading.slice_order reading.zipped storage",
    "manifest",
    "arrow_place bundle cam_images decode evaluation.measures evaluation.truth inference.torch_backend phantom "
    "phantoms.decoys publishing.gates publishing.objects reading.series steps volumes_folder",
    "auditing.features bundle_writing dataset evaluation.cam_truth evaluation.seeds evaluation.tabulate "
    "inference.openvino_backend phantoms.archive publishing.nightly_report publishing.scored_keys publishing.staged "
    "reading.road results staging tracking training_plan volumes_cache",
    "auditing.audit evaluation.report evaluation.study inference.quantization ingest phantoms.study publishing.commit "
    "publishing.runs score train",
    "auditing.report checkup.machine demo evaluation.maps_report evaluation.model_card evaluation.networks "
    "evaluation.study_maps gang prepared publishing.hold publishing.planning ray_actor ray_checkpoint ray_cluster",
    "auditing.record checkup.places evaluation.study_report publishing.check ray_prepare ray_rank ray_score",
    "evaluation.evaluate ray_doctor ray_folds",
    "ray_evaluate ray_train",
)
ROW_OF = {name: row for row, names in enumerate(ROWS) for name in names.split()}
FOREIGN = {
    "boto3": "storage_s3",
    "botocore": "s3_answers storage_s3",
    "SimpleITK": "decode threads",
    "openvino": "inference.openvino_backend",
    "nncf": "inference.openvino_backend",
}
FILES = {
    ".".join(path.relative_to(ROOT / "darnet").with_suffix("").parts): path
    for path in sorted((ROOT / "darnet").rglob("*.py"))
    if path.stem != "__init__"
}
MODULES = list(FILES)


def list_imports(path: Path) -> list[str]:
    """Every module a file imports, also inside functions."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def test_every_module_has_a_row() -> None:
    assert sorted(ROW_OF) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_lower_rows_only(module: str) -> None:
    inside = {name.removeprefix("darnet.") for name in list_imports(FILES[module])} & set(MODULES)
    assert [name for name in inside if ROW_OF[name] >= ROW_OF[module] > 0] == []


@pytest.mark.parametrize("module", MODULES)
def test_a_foreign_library_lives_in_few_modules(module: str) -> None:
    roots = {name.split(".")[0] for name in list_imports(FILES[module])}
    assert [name for name, home in FOREIGN.items() if name in roots and module not in home.split()] == []
    assert "ray" not in roots or module.startswith("ray_")


def test_importing_does_nothing_and_needs_no_ray_below_its_row(tmp_path: Path) -> None:
    """No file, no output, no thread, no environment variable, no log handler. One process, as imports take long."""
    below = [f"darnet.{name}" for name in MODULES if not name.startswith("ray_")]
    above = [f"darnet.{name}" for name in MODULES if name.startswith("ray_")]
    above += [f"jobs.{path.stem}" for path in (ROOT / "jobs").glob("*.py")]
    code = (
        "import importlib, logging, os, sys, threading\n"
        "def look():\n"
        "    return dict(os.environ), logging.root.handlers[:], threading.active_count(), torch.get_num_threads()\n"
        "def load(names):\n"
        "    before = look()\n"
        "    for name in names: importlib.import_module(name)\n"
        "    assert before == look(), (before, look())\n"
        "import torch, SimpleITK, boto3, matplotlib.figure, pandas, cv2\n"
        f"load({below})\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'ray']\n"
        "import ray, ray.data, ray.train.torch\n"
        f"load({above})\n"
    )
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        # What a worker that decodes is sent names functions of these; a node has such a process a CPU.
        ("darnet.ray_cluster darnet.ray_prepare darnet.publishing.runs", "torch safetensors openvino scipy.spatial"),
        # The driver of a night, which has nothing to score as often as not.
        ("jobs.score", "torch safetensors openvino scipy.spatial scipy.stats"),
        # Before its first batch: with torch come the networks, and nothing that decodes or draws.
        ("darnet.ray_actor darnet.score", "SimpleITK pydicom matplotlib"),
    ],
)
def test_what_takes_seconds_to_load_is_loaded_where_it_is_used(modules: str, heavy: str) -> None:
    code = (
        f"import importlib, sys\nfor name in {modules.split()}: importlib.import_module(name)\n"
        f"found = set({heavy.split()}) & set(sys.modules)\nassert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_no_job_is_longer_than_a_page() -> None:
    assert {
        path.name: lines for path in (ROOT / "jobs").glob("*.py") if (lines := path.read_text().count("\n")) > 80
    } == {}
