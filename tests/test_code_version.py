"""A code's digest changes with every module that decides a result, and with nothing else."""

import re
from pathlib import Path

import pytest

from darnet import __version__
from darnet.code_version import (
    PREPARING,
    SCORING,
    TRAINING,
    digest_sources,
    name_preparing_code,
    name_scoring_code,
    name_training_code,
)
from tests.test_layers import FILES, list_imports

# What training, preparing or scoring imports that changes no weight, no voxel and no final row, and why.
NEUTRAL = {
    "arrow_place": "where checkpoints lie",
    "cohort": "divides; the division is in the cohort's digest",
    "config": "settings are digested by value",
    "cpus": "what Ray counts",
    "errors": "names of what can go wrong",
    "history": "metrics for people",
    "manifest": "names networks, whose training asks for no more of it",
    "pseudonym": "keys that no record keeps",
    "range_reader": "bytes of objects of the results table alone",
    "publishing.rows": "names of columns",
    "ray_backpressure": "how many scans wait",
    "ray_checkpoint": "a resumed training ends in the bits of an undisturbed one",
    "ray_token": "who may reach the cluster",
    "reading.sandbox": "limits; what they end is ERR_*, and recorded nowhere",
    "s3_answers": "names of what can go wrong",
    "settings": "settings are digested by value",
    "storage": "bytes are checked by digest",
    "store": "names what a store can do",
    "storage_local": "bytes are checked by digest",
    "storage_s3": "bytes are checked by digest",
    "tables": "reads cohort tables, which are digested",
    "training_plan": "what runs where, and under which name",
    "volumes_cache": "arrays are checked by digest",
}

SOURCE = '''"""A module."""

RATE = 2


def double(value: int) -> int:
    """Twice the value."""
    return RATE * value
'''


def digest(home: Path, text: str) -> str:
    (home / "module.py").write_text(text)
    return digest_sources(home, ["module"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("RATE = 2\n", "RATE = 2  # why\n# and more\n"),
        ('"""Twice the value."""', '"""The value, twice."""'),
        ('    """Twice the value."""\n', ""),
        ('"""A module."""\n', ""),
        ("RATE = 2\n", 'RATE = 2\n"""What is multiplied by."""\n'),
        ("(value: int) -> int:", "(\n    value: int,\n) -> int:"),
    ],
)
def test_comments_documentation_and_layout_change_no_digest(old: str, new: str, tmp_path: Path) -> None:
    assert old in SOURCE
    assert digest(tmp_path, SOURCE.replace(old, new)) == digest(tmp_path, SOURCE)


@pytest.mark.parametrize(("old", "new"), [("RATE = 2", "RATE = 3"), ("RATE * value", "value * RATE")])
def test_code_changes_the_digest(old: str, new: str, tmp_path: Path) -> None:
    assert digest(tmp_path, SOURCE.replace(old, new)) != digest(tmp_path, SOURCE)


@pytest.mark.parametrize(
    ("starts", "decisive"), [(["ray_rank"], TRAINING), (["ingest"], PREPARING), (["ingest", "score"], SCORING)]
)
def test_whatever_a_result_rests_on_is_in_its_digest_or_known_to_change_nothing(
    starts: list[str], decisive: tuple[str, ...]
) -> None:
    """A module that is imported from now on must be put in one of the lists."""
    found, todo = set(), [*starts]
    while todo:
        module = todo.pop()
        if module not in found:
            found.add(module)
            todo += [
                name for name in (name.removeprefix("darnet.") for name in list_imports(FILES[module])) if name in FILES
            ]
    assert set(decisive) <= found
    assert found - set(decisive) - set(NEUTRAL) == set()


def test_the_three_codes_are_named_by_version_and_digest() -> None:
    names = name_training_code(), name_preparing_code(), name_scoring_code()
    assert all(re.fullmatch(re.escape(__version__) + r"\+[0-9a-f]{12}", name) for name in names)
    assert len(set(names)) == 3
