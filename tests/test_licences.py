"""Every dependency is pinned with its licence, and none asks for more than its notice to be kept."""

import importlib.metadata
from collections.abc import Iterator

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.licences import CONSTRAINTS, list_pins, name_licence

PINS = list_pins(CONSTRAINTS)
COPYLEFT = ("GPL", "EUPL", "CC-BY-SA", "SSPL", "BUSL")


@pytest.mark.parametrize("package", PINS)
def test_a_pin_is_what_is_installed_and_names_its_licence(package: str) -> None:
    version, licence = PINS[package]
    assert version == importlib.metadata.version(package).partition("+")[0]
    assert licence == name_licence(package)
    assert not [name for name in COPYLEFT if name in licence]


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
