"""Evaluation in a task of the cluster says what it says here, and fails with the same words."""

from pathlib import Path
from typing import Any

import pytest

from darnet.config import TrainConfig
from darnet.errors import UsageError
from darnet.evaluation.evaluate import run_evaluation
from darnet.ray_evaluate import evaluate_in_task, place_evaluation
from darnet.settings import EvaluateSettings
from darnet.training_plan import ClusterRoom

TABLE = "scan_id,label,prob_cp,prob_ncp,prob_normal\na,CP,0.8,0.1,0.1\nb,NCP,0.1,0.8,0.1\nc,Normal,0.1,0.5,0.4\n"


@pytest.mark.parametrize(
    ("device", "nodes", "placed"),
    [
        ("auto", [{"CPU": 2}], "cpu"),
        ("auto", [{"CPU": 0}, {"CPU": 2, "GPU": 1}], "gpu"),
        ("cpu", [{"CPU": 2, "GPU": 1}], "cpu"),
        ("gpu", [{"CPU": 2, "GPU": 1}], "gpu"),
    ],
)
def test_evaluation_follows_the_device_of_training(device: Any, nodes: list[dict[str, float]], placed: str) -> None:
    settings = EvaluateSettings(predictions="t.csv", out="out", train=TrainConfig(device=device))
    assert place_evaluation(settings, ClusterRoom(nodes)).train.device == placed


def test_a_gpu_that_cannot_come_is_refused_and_not_waited_for() -> None:
    settings = EvaluateSettings(predictions="t.csv", out="out", train=TrainConfig(device="gpu"))
    with pytest.raises(UsageError, match="the cluster has 2 CPUs and 0 GPUs"):
        place_evaluation(settings, ClusterRoom([{"CPU": 2}]))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_task_leaves_what_the_driver_would(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(TABLE)
    told = []
    for name, evaluate in (("here", run_evaluation), ("there", lambda item: evaluate_in_task(item, num_gpus=0))):
        settings = EvaluateSettings(predictions=str(tmp_path / "t.csv"), out=str(tmp_path / name))
        told.append({key: value for key, value in evaluate(settings).items() if key != "out"})
    assert told[0] == told[1]
    for path in (tmp_path / "here").iterdir():
        assert path.read_bytes() == (tmp_path / "there" / path.name).read_bytes()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_tasks_failure_is_the_jobs(tmp_path: Path) -> None:
    settings = EvaluateSettings(predictions=str(tmp_path / "none.csv"), out=str(tmp_path / "out"))
    with pytest.raises(UsageError, match=r"none\.csv: no such file; name a predictions table$"):
        evaluate_in_task(settings, num_gpus=0)
