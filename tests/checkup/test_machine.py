"""The machine and the bundle are tried for true, and a secret is never told."""

import importlib.metadata
import json
import os
import resource
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from darnet.checkup import machine
from darnet.checkup.findings import Finding, Verdict, examine
from darnet.checkup.machine import check_bundle, check_machine
from darnet.config import ScoreConfig
from darnet.pseudonym import PSEUDONYM_VARIABLE
from darnet.storage import open_store
from tests.bundle_fixtures import write_random_bundle
from tests.places import ROOT


def _try_machine(only: str) -> Finding:
    (group,) = [group for group in check_machine() if any(name == f"machine: {only}" for name, _ in group)]
    return {finding.check: finding for finding in examine(group)}[f"machine: {only}"]


@pytest.mark.slow
def test_every_compression_is_decoded_in_the_child_and_its_limits_hold() -> None:
    decoders, limits = examine(check_machine()[-1])
    assert (decoders.verdict, decoders.told) == (Verdict.FINE, "5 transfer syntaxes read")
    assert limits.verdict is Verdict.FINE


@pytest.mark.parametrize(
    ("key", "verdict"), [(None, Verdict.MIND), ("short-secret", Verdict.WRONG), ("long-secret" * 3, Verdict.FINE)]
)
def test_the_key_is_judged_by_its_length_and_not_told(
    key: str | None, verdict: Verdict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(PSEUDONYM_VARIABLE, raising=False)
    if key is not None:
        monkeypatch.setenv(PSEUDONYM_VARIABLE, key)
    finding = _try_machine("key of pseudonyms")
    assert finding.verdict is verdict
    assert "secret" not in f"{finding}"


def test_packages_are_as_pinned() -> None:
    finding = _try_machine("Python packages")
    assert (finding.verdict, finding.told.endswith("all as pinned")) == (Verdict.FINE, True), finding


@pytest.mark.parametrize(
    ("free_gib", "verdict", "told"),
    [(1.9, Verdict.WRONG, "1.9 GiB in "), (19.5, Verdict.MIND, "19.5 GiB in "), (20, Verdict.FINE, "20 GiB in ")],
)
def test_free_disk_is_judged(free_gib: float, verdict: Verdict, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free_gib * 2**30))
    finding = _try_machine("free disk")
    assert (finding.verdict, finding.told.startswith(told)) == (verdict, True), finding
    assert ("TMPDIR" in finding.remedy) == (verdict is not Verdict.FINE)


@pytest.mark.parametrize(
    ("total_gib", "verdict", "told"), [(1.9, Verdict.MIND, "1.9 GiB in /dev/shm"), (2, Verdict.FINE, "2 GiB")]
)
def test_shared_memory_is_judged(
    total_gib: float, verdict: Verdict, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=total_gib * 2**30))
    finding = _try_machine("shared memory")
    assert (finding.verdict, finding.told) == (verdict, told)
    assert ("--shm-size" in finding.remedy) == (verdict is not Verdict.FINE)


@pytest.mark.parametrize(("num_cpus", "verdict"), [(1, Verdict.WRONG), (2, Verdict.FINE)])
def test_processors_are_counted_as_far_as_this_process_may_use_them(
    num_cpus: int, verdict: Verdict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(num_cpus)))
    finding = _try_machine("processors and threads")
    assert (finding.verdict, finding.told.split(",")[0]) == (verdict, "one CPU" if num_cpus == 1 else "2 CPUs")


@pytest.mark.parametrize(
    ("names", "verdict", "told"),
    [([], Verdict.MIND, "none: "), (["T4"], Verdict.FINE, "1: T4"), (["T4", "L4", "T4"], Verdict.FINE, "3: L4, T4")],
)
def test_gpus_are_named(names: list[str], verdict: Verdict, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(names))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: names[index])
    finding = _try_machine("GPU")
    assert (finding.verdict, finding.told.startswith(told)) == (verdict, True), finding


@pytest.mark.parametrize(("limit", "verdict"), [(1_024, Verdict.MIND), (4_096, Verdict.FINE)])
def test_open_files_are_judged(limit: int, verdict: Verdict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, 1_048_576))
    finding = _try_machine("open files")
    assert (finding.verdict, finding.told) == (verdict, f"at most {limit}")
    assert ("ulimit -n" in finding.remedy) == (verdict is not Verdict.FINE)


def test_the_pins_that_are_installed_are_those_of_the_repository() -> None:
    lines = [line.split()[0] for line in (ROOT / "constraints.txt").read_text().splitlines()]
    assert sorted(map(str, machine.read_pins().values())) == sorted(lines)
    needed = machine.list_needed("darnet")
    own = {name for name, is_own in needed.items() if is_own}
    assert {"numpy", "pydicom", "ray"} <= own <= set(machine.read_pins())
    assert needed["botocore"] is False  # which boto3 asks for


@pytest.mark.parametrize(
    ("package", "found", "verdict", "words"),
    [
        ("pydicom", "2.4.4", Verdict.WRONG, "pydicom is 2.4.4, not "),
        ("ray", "missing", Verdict.WRONG, "ray is missing, not "),
        ("botocore", "1.0", Verdict.MIND, "botocore is 1.0, not "),
        ("torch", "2.13.0+cu130", Verdict.FINE, "all as pinned"),
    ],
)
def test_another_version_than_the_pinned_one_is_told(
    package: str, found: str, verdict: Verdict, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of what others ask for, with a reservation; a local build of the pinned version is that version."""
    real = importlib.metadata.version

    def read_version(name: str) -> str:
        if name == package and found == "missing":
            raise importlib.metadata.PackageNotFoundError(name)
        return found if name == package else real(name)

    monkeypatch.setattr(importlib.metadata, "version", read_version)
    finding = _try_machine("Python packages")
    assert (finding.verdict, words in finding.told) == (verdict, True), finding


def test_a_bundle_is_read_and_scores(tmp_path: Path) -> None:
    write_random_bundle(tmp_path / "bundle")
    findings = examine(check_bundle(open_store(str(tmp_path / "bundle")), ScoreConfig()))
    assert [finding.verdict for finding in findings] == [Verdict.FINE, Verdict.FINE]


def test_one_changed_byte_of_a_bundle_is_wrong(tmp_path: Path) -> None:
    write_random_bundle(tmp_path / "bundle")
    weights = tmp_path / "bundle" / "fold3.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(data)
    findings = examine(check_bundle(open_store(str(tmp_path / "bundle")), ScoreConfig()))
    assert [finding.verdict for finding in findings] == [Verdict.WRONG, Verdict.UNTRIED]
    assert "fold3.safetensors" in findings[0].told


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("address", "num_checks"), [("", 29), ("127.0.0.1:6379", 33)])
def test_the_job_tries_everything_that_is_named(
    address: str, num_checks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Alone, and on the machines of a cluster, which read both places."""
    from jobs import doctor

    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    write_random_bundle(tmp_path / "bundle")
    (tmp_path / "archive" / "ct").mkdir(parents=True)
    (tmp_path / "archive" / "ct" / "1.dcm").write_bytes(b"x" * 100)
    places = ["--archive", str(tmp_path / "archive"), "--model", str(tmp_path / "bundle")]
    monkeypatch.setattr(sys, "argv", ["doctor", *places, "--results", str(tmp_path / "results")])
    assert doctor.main() == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["checks"] == len(summary["findings"]) == num_checks
    assert set(summary["verdicts"]) <= {"fine", "mind", "untried"}  # the last, as the table is empty
