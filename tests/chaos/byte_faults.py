"""One byte that is another than it was: in a part, a plan, a bundle, an object of the table."""

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq

from tests.chaos.night import ChaosError, Night, end_group, list_parts, wait_until
from tests.places import ROOT
from tests.results_fixtures import flip_bit


def wrong_part(night: Night) -> str:
    """In a staged part of a driver that was killed: refused by name, and scored again once it is deleted."""
    end_group(night.start_and_hold())
    night.site.proxy.release()
    part = night.folder / list_parts(night.results)[0]
    _flip(part, 0.3)
    error = night.run(4)["error"]
    _demand(part.name, error)
    part.unlink()
    return f"named; then {night.run(0)['resumed_sources']} sources resumed"


def wrong_plan(night: Night) -> str:
    """In the plan of a driver that was killed: refused by name; discarded, its sources are planned anew."""
    job = night.start()
    wait_until(lambda: bool(list(night.folder.glob("_runs/*/plan.parquet"))), job)
    end_group(job)
    (plan,) = night.folder.glob("_runs/*/plan.parquet")
    _flip(plan, 0.1)
    error = night.run(4)["error"]
    _demand("plan.parquet", error)
    _demand(f"--discard {plan.parent.name}", error)
    _run_job("score", "--results", night.uri, "--discard", plan.parent.name, "--reason", "a byte is wrong")
    night.run(0)
    return "named, then discarded"


def wrong_bundle(night: Night) -> str:
    """In one fold's weights: refused by name before anything is scored."""
    path = Path(night.model) / "fold3.safetensors"
    with _flipped(path, path.stat().st_size * 7 // 10):
        error = night.run(2)["error"]
    _demand("fold3.safetensors", error)
    if parts := list_parts(night.results):
        raise ChaosError(f"scored all the same: {parts}")
    night.run(0)
    return "named, then mended"


def wrong_result(night: Night) -> str:
    """In a probability of the table, which a reader without checksums takes as it is: `jobs.results check` names it."""
    night.run(0)
    night.is_table_damaged = True
    path = night.folder / "predictions" / "c00000001.parquet"
    value = struct.pack("<d", next(filter(None, pq.read_table(path)["probability_ncp"].to_pylist())))
    with _flipped(path, path.read_bytes().index(value) + 3):
        error = _run_job("results", "check", "--results", night.uri, code=1)
    _demand(path.name, error)
    _run_job("results", "check", "--results", night.uri)
    return "named by the check, which ends with 1"


@contextmanager
def _flipped(path: Path, place: int) -> Iterator[None]:
    """The file with one wrong byte, until the block ends."""
    sound = path.read_bytes()
    path.write_bytes(flip_bit(sound, place))
    try:
        yield
    finally:
        path.write_bytes(sound)


def _flip(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(flip_bit(data, int(len(data) * share)))


def _demand(name: str, error: str) -> None:
    if name not in error:
        raise ChaosError(f"{name} is not named: {error}")


def _run_job(job: str, *arguments: str, code: int = 0) -> str:
    """What a short job says is wrong, or nothing."""
    done = subprocess.run(
        [sys.executable, "-m", f"jobs.{job}", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode != code:
        raise ChaosError(f"jobs.{job} ended with {done.returncode}: {done.stdout[-300:]}")
    return str(json.loads(done.stdout.splitlines()[-1]).get("error", ""))
