"""Threads: what the libraries themselves say that they use, and that nothing else in the house tells them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.places import ROOT

# How the libraries at hand are told how many threads to use.
SETTERS = re.compile(
    r"set_num_threads|set_num_interop_threads|setNumThreads|SetGlobalDefaultNumberOfThreads|"
    r"SetGlobalMaximumNumberOfThreads|SetNumberOfThreads|(?:INFERENCE|OMP|MKL|OPENBLAS)_NUM_THREADS|NUM_STREAMS|CPU_PINNING|"
    r"threadpool_limits|set_cpu_count|set_io_thread_count|numthreads=(?!SLICE_THREADS)"
)


def say(code: str) -> str:
    """What a fresh process prints: threads are a matter of a process, and this one has its own."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_libraries_that_decode_use_one_thread_for_a_slice() -> None:
    code = (
        "from darnet.threads import set_decoder_threads\nset_decoder_threads()\n"
        "import cv2, sys, SimpleITK as sitk\n"
        "print(cv2.getNumThreads(), sitk.ProcessObject.GetGlobalDefaultNumberOfThreads(), 'torch' in sys.modules)"
    )
    assert say(code) == "1 1 False"


@pytest.mark.parametrize("num_threads", [1, 3])
def test_libraries_that_compute_use_those_of_the_actor(num_threads: int) -> None:
    code = (
        f"from darnet.threads import set_model_threads\nset_model_threads({num_threads})\n"
        "import cv2, sys, torch\n"
        "print(cv2.getNumThreads(), torch.get_num_threads(), 'SimpleITK' in sys.modules)"
    )
    assert say(code) == f"{num_threads} {num_threads} False"


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_compiled_network_has_the_threads_it_was_made_for(num_threads: int) -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    from darnet.threads import describe_openvino_threads

    x = openvino.opset13.parameter([1, 4], openvino.Type.f32)
    model = openvino.Model([openvino.opset13.relu(x)], [x])
    compiled = openvino.Core().compile_model(model, "CPU", describe_openvino_threads(num_threads))
    asked = ("INFERENCE_NUM_THREADS", "NUM_STREAMS", "ENABLE_CPU_PINNING")
    assert [compiled.get_property(name) for name in asked] == [num_threads, 1, False]


def test_threads_are_set_in_one_place() -> None:
    told = {
        str(path.relative_to(ROOT)): SETTERS.findall(path.read_text())
        for folder in ("darnet", "jobs")
        for path in sorted((ROOT / folder).rglob("*.py"))
    }
    assert told.pop(str(Path("darnet") / "threads.py"))
    assert {name: found for name, found in told.items() if found} == {}
