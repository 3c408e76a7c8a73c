"""The README keeps its promises: its SQL is what read_predictions does, and what it names is there."""

import re
from datetime import UTC, date, datetime
from pathlib import Path

import duckdb
import pandas as pd

from darnet.bundle import Bundle
from darnet.errors import Status
from darnet.results import read_predictions
from darnet.results_publish import publish
from darnet.results_rows import make_table
from darnet.scan import IngestedScan, ScanFacts
from darnet.score import RunFacts, make_row
from darnet.storage import open_store
from tests.bundle_fixtures import write_random_bundle

README = (Path(__file__).parents[1] / "README.md").read_text()


def _publish(results: Path, bundle: Bundle, night: int, statuses: dict[str, Status], digest: str = "0") -> None:
    run = RunFacts(f"night-{night}", date(2026, 1, night), bundle.manifest, "0")
    when = datetime(2026, 1, night, tzinfo=UTC)
    scans = {key: IngestedScan(key, status, "why", ScanFacts(1, 1)) for key, status in statuses.items()}
    rows = [make_row(run, key.partition("#")[0], digest * 64, scan, None, when) for key, scan in scans.items()]
    assert publish(open_store(str(results), create=True), run.run_id, make_table(rows)) == night


def test_the_sql_gives_what_read_predictions_gives(tmp_path: Path) -> None:
    bundle = write_random_bundle(tmp_path / "bundle")
    _publish(tmp_path / "r", bundle, 1, {"a": Status.ERR_STORAGE, "b#1": Status.BAD_TILT, "b#2": Status.ERR_TIMEOUT})
    _publish(tmp_path / "r", bundle, 2, {"a#1": Status.SKIP_NO_LUNG, "b#2": Status.BAD_HEADER})
    _publish(tmp_path / "r", bundle, 3, {"b#1": Status.BAD_ZIP}, digest="1")
    (sql,) = re.findall(r"```sql\n(.*?)```", README, re.DOTALL)
    found = duckdb.sql(sql.replace("RESULTS", str(tmp_path / "r"))).to_arrow_table().to_pandas()
    expected = read_predictions(str(tmp_path / "r"), latest=True)
    columns = ["source", "scan_id", "status", "commit", "input_sha256"]
    pd.testing.assert_frame_equal(found[columns], expected[columns].reset_index(drop=True), check_dtype=False)
    assert list(found["scan_id"]) == ["a#1", "b#1"]
    assert list(found["status"]) == ["SKIP_NO_LUNG", "BAD_ZIP"]


def test_every_file_and_job_the_readme_names_exists() -> None:
    root = Path(__file__).parents[1]
    for name in re.findall(r"`((?:jobs|darnet|tests)/[\w/]+\.py)", README):
        assert (root / name).is_file(), name
    for job in set(re.findall(r"jobs\.(\w+)", README)) - {"X"}:
        assert (root / "jobs" / f"{job}.py").is_file(), job
