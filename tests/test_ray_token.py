"""Who reaches a cluster of several machines is asked for a token by each of them, also by one that joins later."""

from pathlib import Path
from typing import Any

import pytest

from darnet import ray_token
from darnet.errors import ExitCode, RunError, UsageError
from darnet.ray_evaluate import evaluate_in_task
from darnet.ray_rank import train_ray_rank
from darnet.ray_token import refuse_open_cluster
from darnet.ray_train import _measure_network
from darnet.settings import EvaluateSettings

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("default")]

REFUSAL = r"node 10\.0\.0\.2 needs no token, in a cluster of 2 machines; set RAY_AUTH_MODE=token"


@pytest.mark.parametrize(
    ("closed", "mode", "refused"),
    [
        ({"10.0.0.1": False}, "", ""),
        ({"10.0.0.1": True, "10.0.0.2": True}, "", "2 machines and asks nobody for a"),
        ({"10.0.0.1": True, "10.0.0.2": True}, "disabled", "2 machines and asks nobody for a"),
        ({"10.0.0.1": True, "10.0.0.2": False}, "token", "2 machines, of which 10.0.0.2 need no"),
        ({"10.0.0.1": True, "10.0.0.2": True}, "token", ""),
    ],
)
def test_several_machines_need_a_token_each(
    closed: dict[str, bool], mode: str, refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    if not refused:
        refuse_open_cluster(closed.keys(), closed.items)
        return
    with pytest.raises(UsageError, match=f"{refused} token; set RAY_AUTH_MODE=token"):
        refuse_open_cluster(closed.keys(), closed.items)


@pytest.fixture
def open_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is a worker of a second machine without a token; tasks run in it."""
    monkeypatch.setenv("RAY_AUTH_MODE", "")
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.0.0.2")
    monkeypatch.setattr(ray_token, "list_addresses", lambda: {"10.0.0.1", "10.0.0.2"})
    monkeypatch.setattr("ray.remote", lambda **_: _Here)
    monkeypatch.setattr("ray.get", lambda answer: answer)


class _Here:
    """A remote function that is called where it is asked for."""

    def __init__(self, function: Any) -> None:
        self.remote = function


@pytest.mark.usefixtures("open_node")
def test_no_rank_trains_on_a_machine_without_a_token() -> None:
    """Before it has looked at its task; that a rank's error ends the job with its exit code, test_ray_train tells."""
    with pytest.raises(UsageError, match=REFUSAL):
        train_ray_rank({})


@pytest.mark.usefixtures("open_node")
def test_no_network_is_measured_on_a_machine_without_a_token() -> None:
    nothing: Any = None
    with pytest.raises(UsageError, match=REFUSAL):
        _measure_network(nothing, nothing, nothing, nothing, "cpu")


@pytest.mark.usefixtures("open_node")
def test_no_evaluation_runs_on_a_machine_without_a_token(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("scan_id,label,prob_cp,prob_ncp,prob_normal\na,CP,0.8,0.1,0.1\n")
    settings = EvaluateSettings(predictions=str(tmp_path / "t.csv"), out=str(tmp_path / "out"))
    with pytest.raises(RunError, match=REFUSAL) as caught:
        evaluate_in_task(settings, num_gpus=1)
    assert caught.value.exit_code is ExitCode.WRONG_USE
    assert not (tmp_path / "out").exists()
