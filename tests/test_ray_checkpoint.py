"""A torn checkpoint is never taken for a whole one."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ray.train import Checkpoint

from darnet.errors import RunError
from darnet.ray_checkpoint import place_checkpoints, read_newest_state, read_state, write_state
from darnet.storage import open_store
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


@pytest.mark.s3
def test_checkpoints_go_where_the_endpoint_of_a_profile_says(
    s3: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ray does it on another node: the place travels pickled, and neither of its credentials with it."""
    uri = f"{s3()}/runs"
    (tmp_path / "config").write_text(f"[profile own]\nendpoint_url = {os.environ['AWS_ENDPOINT_URL']}\n")
    for name, value in {"AWS_CONFIG_FILE": str(tmp_path / "config"), "AWS_PROFILE": "own"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "marked-secret")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    place = place_checkpoints(uri)
    travelled = pickle.dumps(place["storage_filesystem"])
    assert b"marked-secret" not in travelled
    with pickle.loads(travelled).open_output_stream(f"{place['storage_path']}/fold0/state.pt") as sink:
        sink.write(b"weights")
    assert open_store(uri).read_bytes("fold0/state.pt") == b"weights"


def test_checkpoints_without_an_endpoint_are_left_to_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    for uri in ("s3://bucket/runs", str(tmp_path)):
        assert place_checkpoints(uri) == {"storage_path": uri}
