"""What `jobs.doctor` says of a cluster and its machines; the whole of it is tried in checkup.test_machine."""

import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from darnet import ray_doctor
from darnet.checkup.findings import Check, CheckError, Finding, Verdict, examine
from darnet.checkup.machine import check_bundle_on_gpu
from darnet.checkup.places import Trial
from darnet.config import ScoreConfig
from darnet.errors import ExitCode, RunError, UsageError
from darnet.storage import Store, open_store
from tests.bundle_fixtures import write_random_bundle


def _look(monkeypatch: pytest.MonkeyPatch, address: str, mode: str, nodes: str = "token") -> str:
    monkeypatch.setattr(ray_doctor, "find_dashboard", lambda: address)
    monkeypatch.setattr(ray_doctor, "ask_every_node", lambda _: [("10.0.0.7", nodes == "token")])
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    ((*checks, _, _),) = ray_doctor.check_cluster()
    name, look = checks[-1]
    assert name == "cluster: dashboard"
    return look()


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "localhost:8265", "[::1]:8265", ""])
def test_a_dashboard_of_the_head_alone_is_fine(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    told = _look(monkeypatch, address, "disabled")
    assert told.startswith(address or "none")


@pytest.mark.parametrize("address", ["10.0.0.7:8265", "head.example.org:8265", "[fd00::7]:8265"])
def test_a_dashboard_that_others_reach_needs_the_token(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    with pytest.raises(CheckError, match="start programs") as caught:
        _look(monkeypatch, address, "disabled")
    assert caught.value.verdict is Verdict.WRONG
    assert "--dashboard-host=127.0.0.1" in caught.value.remedy
    assert "asks for the token" in _look(monkeypatch, address, "token")
    with pytest.raises(CheckError, match="start programs"):
        _look(monkeypatch, address, "token", nodes="disabled")


def test_a_cluster_that_nobody_named_was_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_doctor, "connect", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ((join, *_),) = ray_doctor.check_cluster()
    with pytest.raises(CheckError, match="none named by RAY_ADDRESS") as caught:
        join[1]()
    assert caught.value.verdict is Verdict.MIND
    assert "ray job submit" in caught.value.remedy


def _try_cluster(only: str) -> Finding:
    (checks,) = ray_doctor.check_cluster()
    (finding,) = examine([check for check in checks if check[0] == f"cluster: {only}"])
    return finding


@pytest.mark.parametrize("ray_address", ["", "10.0.0.7:6379"])
@pytest.mark.parametrize(
    ("mode", "nodes", "addresses", "verdict", "told"),
    [
        ("token", "token", {"10.0.0.7"}, Verdict.FINE, "RAY_AUTH_MODE=token, here and on every node"),
        ("disabled", "disabled", {"127.0.0.1"}, Verdict.FINE, "listens on loopback"),
        ("disabled", "disabled", {"::1"}, Verdict.FINE, "listens on loopback"),
        ("disabled", "disabled", {"10.0.0.7"}, Verdict.MIND, "10.0.0.7 asks nobody for a token"),
        ("token", "disabled", {"10.0.0.7"}, Verdict.MIND, "10.0.0.7 asks nobody for a token"),
        ("disabled", "disabled", {"127.0.0.1", "10.0.0.8"}, Verdict.MIND, "10.0.0.8 asks nobody for a token"),
    ],
)
def test_a_cluster_without_a_token_is_closed_on_loopback_alone(
    ray_address: str,
    mode: str,
    nodes: str,
    addresses: set[str],
    verdict: Verdict,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also one that a job starts for itself, of which it is not enough that nobody named it."""
    monkeypatch.setenv("RAY_ADDRESS", ray_address)
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.setattr(ray_doctor, "ask_every_node", lambda _: [("a node", nodes == "token")])
    monkeypatch.setattr(ray_doctor, "list_addresses", lambda: addresses)
    finding = _try_cluster("closed to strangers")
    assert (finding.verdict, finding.told.startswith(told)) == (verdict, True), finding
    assert ("RAY_AUTH_MODE=token" in finding.remedy) == (verdict is not Verdict.FINE)


@pytest.mark.parametrize(
    ("answer", "verdict", "code", "told"),
    [
        ("mark", Verdict.FINE, ExitCode.DONE, "the same on every node"),
        (None, Verdict.FINE, ExitCode.DONE, "none on any node: "),
        (UsageError("node 10.0.0.7 has none; set it"), Verdict.WRONG, ExitCode.WRONG_USE, "node 10.0.0.7 has none"),
        (RunError("node 10.0.0.7 does not answer; look"), Verdict.WRONG, ExitCode.FAILED, "node 10.0.0.7 does not"),
    ],
)
def test_nodes_have_one_secret_or_none(
    answer: str | RunError | None, verdict: Verdict, code: ExitCode, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def agree() -> str | None:
        if isinstance(answer, RunError):
            raise answer
        return answer

    monkeypatch.setattr(ray_doctor, "agree_on_secret", agree)
    finding = _try_cluster("key of pseudonyms")
    assert (finding.verdict, finding.exit_code, finding.told.startswith(told)) == (verdict, code, True), finding


@pytest.mark.parametrize(
    ("num_nodes", "room", "told"),
    [
        (1, {"CPU": 2.0}, "1 node, 2 CPUs, 0 GPUs"),
        (3, {"CPU": 24.0, "GPU": 2.0}, "3 nodes, 24 CPUs, 2 GPUs"),
    ],
)
def test_room_is_counted(num_nodes: int, room: dict[str, float], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little of it was refused on joining."""
    monkeypatch.setattr(ray_doctor, "list_nodes", lambda: [{}] * num_nodes)
    monkeypatch.setattr(ray_doctor, "count_resource", lambda name: room.get(name, 0.0))
    finding = _try_cluster("room")
    assert (finding.verdict, finding.told) == (Verdict.FINE, told)


def _pretend_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr("ray.is_initialized", lambda: True)


def test_what_was_heard_before_ray_failed_is_told_with_the_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(_: object) -> Iterator[tuple[str, list[Finding]]]:
        yield "10.0.0.1", [Finding("machine: GPU", Verdict.FINE, "1: T4")]
        raise ConnectionError("the head is gone")

    _pretend_joined(monkeypatch)
    monkeypatch.setattr(ray_doctor, "ask_nodes", ask)
    heard, failure = ray_doctor.examine_machines(None, None, None, ScoreConfig())
    assert (heard.verdict, heard.told) == (Verdict.FINE, "10.0.0.1: 1: T4")
    assert (failure.check, failure.verdict) == ("machine: answers", Verdict.WRONG)
    assert failure.told.startswith("unexpected ConnectionError at ")


def test_each_machine_of_a_cluster_is_told_of_and_what_they_have_alike_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = Finding("machine: GPU", Verdict.FINE, "1: T4")
    wrong = Finding("machine: free disk", Verdict.WRONG, "1.0 GiB in /tmp", "free some", ExitCode.FAILED)
    nodes = ("10.0.0.1", "10.0.0.2", "10.0.0.3")
    _pretend_joined(monkeypatch)
    monkeypatch.setattr(ray_doctor, "list_addresses", lambda: {*nodes})
    monkeypatch.setattr(ray_doctor, "ask_nodes", lambda _: [(nodes[1], [fine, wrong]), (nodes[0], [fine])])
    told = [
        (finding.verdict, finding.check, finding.told)
        for finding in ray_doctor.examine_machines(None, None, None, ScoreConfig())
    ]
    assert told == [
        (Verdict.FINE, "machine: GPU", "10.0.0.1, 10.0.0.2: 1: T4"),
        (Verdict.WRONG, "machine: free disk", "10.0.0.2: 1.0 GiB in /tmp"),
        (Verdict.WRONG, "machine: answers", "10.0.0.3: gave no answer"),
    ]


def test_every_machine_of_a_cluster_is_asked_for_places_and_networks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_random_bundle(tmp_path / "bundle")
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "a.nii").write_bytes(b"x")
    archive, model, results = (open_store(str(tmp_path / name)) for name in ("archive", "bundle", "results"))
    trial = Trial(results)
    trial.write_and_read()
    _pretend_joined(monkeypatch)
    monkeypatch.setattr(ray_doctor, "list_addresses", lambda: {"10.0.0.1"})
    monkeypatch.setattr(ray_doctor, "ask_nodes", lambda ask: [("10.0.0.1", pickle.loads(pickle.dumps(ask))())])
    monkeypatch.setattr(ray_doctor, "examine_machine", list)
    reach = ["listing the archive", "reading the archive", "reading the results", "clock"]
    for has_gpu, expected in ((False, reach), (True, [*reach, "digests", "a forward pass"])):
        monkeypatch.setattr(ray_doctor, "check_bundle_on_gpu", _pretend_gpu if has_gpu else check_bundle_on_gpu)
        findings = ray_doctor.examine_machines(archive, model, trial, ScoreConfig())
        assert sorted(finding.check for finding in findings) == sorted(f"machine: {name}" for name in expected)
        assert {finding.verdict for finding in findings} == {Verdict.FINE}
        assert all(finding.told.startswith("10.0.0.1: ") for finding in findings)


def _pretend_gpu(model: Store, config: ScoreConfig) -> list[Check]:
    """The check of a GPU on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        return check_bundle_on_gpu(model, config)
