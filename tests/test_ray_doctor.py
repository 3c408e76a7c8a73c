"""What `jobs.doctor` says of a cluster and its machines; the whole of it is tried in checkup.test_machine."""

import pytest

from darnet import ray_doctor
from darnet.checkup.findings import CheckError, Finding, Verdict
from darnet.errors import ExitCode


def _look(monkeypatch: pytest.MonkeyPatch, address: str, mode: str, nodes: str = "token") -> str:
    monkeypatch.setattr(ray_doctor, "find_dashboard", lambda: address)
    monkeypatch.setattr(ray_doctor, "ask_nodes", lambda _: [("10.0.0.7", nodes == "token")])
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


def test_each_machine_of_a_cluster_is_told_of_and_what_they_have_alike_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = Finding("machine: GPU", Verdict.FINE, "1: T4")
    wrong = Finding("machine: free disk", Verdict.WRONG, "1.0 GiB in /tmp", "free some", ExitCode.FAILED)
    nodes = ("10.0.0.1", "10.0.0.2", "10.0.0.3")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr(ray_doctor, "list_nodes", lambda: [{"NodeManagerAddress": address} for address in nodes])
    monkeypatch.setattr(ray_doctor, "ask_nodes", lambda _: [(nodes[1], [fine, wrong]), (nodes[0], [fine])])
    told = [(finding.verdict, finding.check, finding.told) for finding in ray_doctor.examine_machines()]
    assert told == [
        (Verdict.FINE, "machine: GPU", "10.0.0.1, 10.0.0.2: 1: T4"),
        (Verdict.WRONG, "machine: free disk", "10.0.0.2: 1.0 GiB in /tmp"),
        (Verdict.WRONG, "machine: answers", "10.0.0.3: gave no answer"),
    ]
