"""Every dependency is pinned with its licence, which by its metadata asks for little more than its notice."""

import importlib.metadata
import re
from collections.abc import Iterator

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.licences import CONSTRAINTS, list_pins, name_licence

PINS = list_pins(CONSTRAINTS)
# SPDX: what asks for its notice to be kept, and the MPL, which asks for changes of its own files.
ALLOWED = set(
    "0BSD Apache-2.0 BSD BSD-2-Clause BSD-3-Clause BSL-1.0 CC0-1.0 CNRI-Python LLVM-exception MIT MIT-0 MIT-CMU "
    "MPL-2.0 PSF-2.0 Zlib".split()
)


@pytest.mark.parametrize("package", PINS)
def test_a_pin_is_what_is_installed_and_names_its_licence(package: str) -> None:
    version, licence = PINS[package]
    assert version == importlib.metadata.version(package).partition("+")[0]
    assert licence == name_licence(package)
    assert set(re.findall(r"[\w.-]+", licence)) - {"AND", "OR", "WITH"} <= ALLOWED


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
