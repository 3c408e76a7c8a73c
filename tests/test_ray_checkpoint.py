"""A torn checkpoint is never taken for a whole one."""

from pathlib import Path

import pytest
import torch
from ray.train import Checkpoint

from darnet.errors import RunError
from darnet.ray_checkpoint import read_newest_state, read_state, write_state
from darnet.train import FoldState
from tests.results_fixtures import flip_bit

pytestmark = pytest.mark.ray  # which only needs to be importable


def make_state(epoch: int) -> FoldState:
    weights = torch.arange(30.0) + epoch
    return FoldState(network={"w": weights}, optimizer={}, scheduler={}, best=None, history=[{"epoch": float(epoch)}])


@pytest.fixture
def run(tmp_path: Path) -> list[Path]:
    """The folders of two checkpoints of a fold, as Ray Train names them, the older first."""
    folders = [tmp_path / f"checkpoint_2026-01-01_00-00-0{epoch}.5" for epoch in range(2)]
    for epoch, folder in enumerate(folders):
        folder.mkdir()
        write_state(make_state(epoch), folder)
    (tmp_path / "checkpoint_2026-01-01_00-00-09.5").mkdir()  # begun, and never reported
    return folders


def test_a_whole_checkpoint_is_read_back(run: list[Path]) -> None:
    state = read_newest_state(Checkpoint(str(run[1])))
    assert state["history"] == [{"epoch": 1.0}]
    assert torch.equal(state["network"]["w"], make_state(1)["network"]["w"])


@pytest.mark.parametrize("name", ["state.pt", "state.sha256"])
def test_a_checkpoint_with_any_wrong_byte_is_refused_and_the_one_before_used(run: list[Path], name: str) -> None:
    sound = (run[1] / name).read_bytes()
    spoiled = [sound[: len(sound) // 2], b"", *(flip_bit(sound, place) for place in range(0, len(sound), 101))]
    for data in spoiled:
        (run[1] / name).write_bytes(data)
        with pytest.raises(RunError, match=r"checkpoint_2026-01-01_00-00-01\.5: the checkpoint is damaged"):
            read_state(Checkpoint(str(run[1])))
        assert read_newest_state(Checkpoint(str(run[1])))["history"] == [{"epoch": 0.0}]
    (run[1] / name).unlink()
    assert read_newest_state(Checkpoint(str(run[1])))["history"] == [{"epoch": 0.0}]


def test_without_a_whole_checkpoint_the_newest_is_named(run: list[Path]) -> None:
    for folder in run:
        (folder / "state.pt").write_bytes(b"")
    with pytest.raises(RunError, match=r"00-00-01\.5"):
        read_newest_state(Checkpoint(str(run[1])))
