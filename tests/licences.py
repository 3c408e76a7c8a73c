"""The licence of every pinned package, as its metadata tell it: `make licences` writes them into constraints.txt."""

import importlib.metadata
import re
import sys
from pathlib import Path

from tests.places import ROOT

CONSTRAINTS = ROOT / "constraints.txt"
# What metadata spell in many ways, by the SPDX identifier; a family where the metadata say no more.
FAMILIES = {
    "Apache-2.0": r"apache",
    "MIT": r"\bmit\b",
    "MPL-2.0": r"mozilla|\bmpl\b",
    "PSF-2.0": r"python software foundation|\bpsf",
    "BSD": r"\bbsd\b",
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
    if not found:
        raise ValueError(f"{package}: its metadata name no licence that is known here: {told!r}")
    return " OR ".join(found)


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
    """Write every line anew, its licence behind it."""
    pins = list_pins(CONSTRAINTS)
    width = max(len(f"{name}=={version}") for name, (version, _) in pins.items())
    lines = [f"{f'{name}=={version}':<{width}}  # {name_licence(name)}" for name, (version, _) in pins.items()]
    CONSTRAINTS.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
