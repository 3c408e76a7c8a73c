"""Every dependency is pinned with its licence, which by its metadata asks for little more than its notice."""

import importlib.metadata
import re
from collections.abc import Iterator

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.licences import CONSTRAINTS, has_cuda, is_of_cuda, list_pins, name_licence

PINS = list_pins(CONSTRAINTS)
# SPDX: what asks for its notice to be kept, and the MPL, which asks for changes of its own files.
ALLOWED = set(
    "0BSD Apache-2.0 BSD BSD-2-Clause BSD-3-Clause BSL-1.0 CC0-1.0 CNRI-Python LLVM-exception MIT MIT-0 MIT-CMU "
    "MPL-2.0 PSF-2.0 Zlib".split()
)
OF_NVIDIA = {"LicenseRef-NVIDIA-Proprietary", "NOASSERTION"}
OF_CUDA = {name: pin for name, pin in PINS.items() if is_of_cuda(name)}
# What PyPI's torch 2.13.0 for Linux asks for beside what its build for CPUs does, and what that asks for, of each
# package without extras. Source: METADATA of those wheels, read on 2026-12-01
CUDA_TORCH = """
cuda-toolkit[cublas,cudart,cufft,cufile,cupti,curand,cusolver,cusparse,nvjitlink,nvrtc,nvtx]==13.0.3
cuda-bindings<14,>=13.0.3
cuda-pathfinder>=1.4.2
nvidia-cublas==13.1.1.3.*
nvidia-cuda-cupti==13.0.85.*
nvidia-cuda-nvrtc==13.0.88.*
nvidia-cuda-runtime==13.0.96.*
nvidia-cudnn-cu13==9.20.0.48
nvidia-cufft==12.0.0.61.*
nvidia-cufile==1.15.1.6.*
nvidia-curand==10.4.0.35.*
nvidia-cusolver==12.0.4.66.*
nvidia-cusparse==12.6.3.3.*
nvidia-cusparselt-cu13==0.8.1
nvidia-nccl-cu13==2.29.7
nvidia-nvjitlink<14,>=13.0.88
nvidia-nvshmem-cu13==3.4.5
nvidia-nvtx==13.0.85.*
triton==3.7.1
"""


@pytest.mark.parametrize("package", sorted(PINS if has_cuda() else PINS.keys() - OF_CUDA.keys()))
def test_a_pin_is_what_is_installed_and_names_its_licence(package: str) -> None:
    version, licence = PINS[package]
    assert version == importlib.metadata.version(package).partition("+")[0]
    assert licence == name_licence(package)
    allowed = ALLOWED | OF_NVIDIA if package in OF_CUDA else ALLOWED
    assert set(re.findall(r"[\w.-]+", licence)) - {"AND", "OR", "WITH"} <= allowed


def test_what_torch_brings_of_cuda_is_pinned_where_it_is_not_installed_too() -> None:
    """A machine with GPUs installs it; its licences are NVIDIA's own."""
    asked = {item.name: item.specifier for item in map(Requirement, CUDA_TORCH.split())}
    assert asked.keys() == OF_CUDA.keys()
    for name, (version, licence) in OF_CUDA.items():
        assert version in asked[name], name
        assert licence in ALLOWED | OF_NVIDIA


def list_needed(package: str, extras: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What a package asks for on this machine, with the extras it asks for."""
    for text in importlib.metadata.requires(package) or ():
        wanted = Requirement(text)
        if wanted.marker is None or any(wanted.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield canonicalize_name(wanted.name), tuple(sorted(wanted.extras))


def test_all_that_is_needed_is_pinned() -> None:
    """From this package and its extra `dev` to what those need, and so on."""
    waiting, needed = [("darnet", ("dev",))], set()
    while waiting:
        for item in list_needed(*waiting.pop()):
            if item not in needed:
                needed.add(item)
                waiting.append(item)
    missing = (
        {name for name, _ in needed} - {canonicalize_name(name) for name in PINS} - {"darnet", "pip", "setuptools"}
    )
    assert len(needed) > 100
    assert not missing
