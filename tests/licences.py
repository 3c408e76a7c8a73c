"""The licence of every pinned package, as its metadata tell it: `make licences` writes them into constraints.txt."""

import importlib.metadata
import re
import sys
from pathlib import Path

from packaging.requirements import Requirement

from tests.places import ROOT

CONSTRAINTS = ROOT / "constraints.txt"
# What metadata spell in many ways, by the SPDX identifier; a family where the metadata say no more.
FAMILIES = {
    "Apache-2.0": r"apache",
    "MIT": r"\bmit\b",
    "MPL-2.0": r"mozilla|\bmpl\b",
    "PSF-2.0": r"python software foundation|\bpsf",
    "BSD": r"\bbsd\b",
    "LicenseRef-NVIDIA-Proprietary": r"nvidia.proprietary",
}


def name_licence(package: str) -> str:
    """By its SPDX expression where it has one, else by classifiers and the field before them.

    Raises: ValueError if the metadata name none that is known here.
    """
    metadata = importlib.metadata.metadata(package)
    expression = metadata.get("License-Expression")
    if expression:
        return str(expression)
    classifiers = [text for text in metadata.get_all("Classifier") or () if text.startswith("License ::")]
    told = " ".join([*classifiers, (metadata.get("License") or "")[:100]])
    found = [name for name, pattern in FAMILIES.items() if re.search(pattern, told, re.IGNORECASE)]
    if not found and "matplotlib" in told:  # its own, after Python's
        return "PSF-2.0"
    if package == "cuda-toolkit":  # it names none, and holds nothing but the names of NVIDIA's packages
        return "NOASSERTION"
    if not found:
        raise ValueError(f"{package}: its metadata name no licence that is known here: {told!r}")
    return " OR ".join(found)


def is_of_cuda(package: str) -> bool:
    """Whether it comes with PyPI's torch on Linux alone, and not with its build for CPUs."""
    return package == "triton" or package.startswith(("cuda-", "nvidia-"))


def has_cuda() -> bool:
    """Whether the torch that is installed here is a build which brings CUDA with it."""
    return any(is_of_cuda(Requirement(text).name) for text in importlib.metadata.requires("torch") or ())


def list_pins(path: Path) -> dict[str, tuple[str, str]]:
    """Version and noted licence of each package; both empty where the line has none."""
    pins = {}
    for line in path.read_text().splitlines():
        pin, _, licence = line.partition("#")
        name, _, version = pin.strip().partition("==")
        if name:
            pins[name] = (version, licence.strip())
    return pins


def main() -> int:
    """Write every line anew, its licence behind it; CUDA's keep what they have where torch is the build for CPUs."""
    pins = list_pins(CONSTRAINTS)
    width = max(len(f"{name}=={version}") for name, (version, _) in pins.items())
    lines = []
    for name, (version, noted) in pins.items():
        licence = noted if is_of_cuda(name) and not has_cuda() else name_licence(name)
        lines.append(f"{f'{name}=={version}':<{width}}  # {licence}")
    CONSTRAINTS.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
