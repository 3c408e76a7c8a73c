"""What `jobs.doctor` says of a cluster's dashboard; the rest of its cluster is tried in test_jobs."""

import pytest

from darnet import ray_doctor
from darnet.checkup.findings import CheckError, Verdict


def _look(monkeypatch: pytest.MonkeyPatch, address: str, mode: str) -> str:
    monkeypatch.setattr(ray_doctor, "find_dashboard", lambda: address)
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
