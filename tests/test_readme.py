"""The README keeps its promises: its SQL is the one that is tested, and what it names is there."""

import re
from pathlib import Path

from darnet.results import LATEST_SQL

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_sql_is_the_tested_one_to_the_letter() -> None:
    """`tests/test_results.py` holds it against `read_predictions`."""
    assert re.findall(r"```sql\n(.*?)```", README, re.DOTALL) == [LATEST_SQL]


def test_every_file_and_job_the_readme_names_exists() -> None:
    root = Path(__file__).parents[1]
    for name in re.findall(r"`((?:jobs|darnet|tests)/[\w/]+\.py)", README):
        assert (root / name).is_file(), name
    for job in set(re.findall(r"jobs\.(\w+)", README)) - {"X"}:
        assert (root / "jobs" / f"{job}.py").is_file(), job


def test_the_house_table_names_every_module() -> None:
    root = Path(__file__).parents[1]
    house = README.partition("## The house")[2].partition("|---|---|")[2]
    named = re.findall(r"`(\w+)`", house)
    modules = sorted(path.stem for path in (root / "darnet").glob("*.py") if path.stem != "__init__")
    assert sorted(named) == modules
