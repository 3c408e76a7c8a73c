"""A fold's state and the checkpoint it is kept in: one goes in, the other comes out, or the one before if it is torn.

Torch reads a file with a wrong byte as it is, so a checkpoint holds the state's digest beside the state.
"""

import hashlib
from pathlib import Path, PurePosixPath
from typing import Any, cast

import pyarrow.fs  # type: ignore[import-untyped]
import torch
from ray.train import Checkpoint

from darnet.arrow_place import find_arrow_place
from darnet.errors import RunError
from darnet.train import FoldState

STATE_FILE, DIGEST_FILE = "state.pt", "state.sha256"


def place_checkpoints(uri: str) -> dict[str, Any]:
    """What Ray's `RunConfig` is told so that checkpoints go where `open_store` of the same address goes.

    Raises: UsageError as `find_arrow_place`.
    """
    filesystem, path = find_arrow_place(uri)
    return {"storage_path": path} | ({} if filesystem is None else {"storage_filesystem": filesystem})


def write_state(state: FoldState, folder: Path) -> Checkpoint:
    """Keep a state in this folder, as a checkpoint."""
    torch.save(state, folder / STATE_FILE)
    (folder / DIGEST_FILE).write_text(_digest_file(folder / STATE_FILE))
    return Checkpoint.from_directory(folder)


def read_state(checkpoint: Checkpoint) -> FoldState:
    """The state that `write_state` kept.

    Raises: RunError if a byte of it is missing or another.
    """
    with checkpoint.as_directory() as folder:
        state, told = Path(folder) / STATE_FILE, Path(folder) / DIGEST_FILE
        if not (state.exists() and told.exists()) or _digest_file(state).encode() != told.read_bytes():
            raise RunError(
                f"{checkpoint.path}: the checkpoint is damaged; start the same training again, which goes on from the "
                "one before, or delete the folder that it lies in, and its fold is trained anew"
            )
        return cast(FoldState, torch.load(state, map_location="cpu", weights_only=True))


def read_newest_state(checkpoint: Checkpoint) -> FoldState:
    """The state of this checkpoint, or of the newest one before it that is whole: an epoch is then trained again.

    Raises: RunError as `read_state`, if none is.
    """
    folder = PurePosixPath(checkpoint.path).parent
    assert checkpoint.filesystem is not None, "Ray sets it"
    found = checkpoint.filesystem.get_file_info(pyarrow.fs.FileSelector(str(folder)))
    earlier = sorted((item.path for item in found if _is_earlier(item.path, checkpoint.path)), reverse=True)
    try:
        return read_state(checkpoint)
    except RunError:
        for path in earlier:
            try:
                return read_state(Checkpoint(path, checkpoint.filesystem))
            except RunError:
                continue
        raise


def _is_earlier(path: str, than: str) -> bool:
    """Ray names checkpoints by their time."""
    name, last = PurePosixPath(path).name, PurePosixPath(than).name
    return name.startswith("checkpoint_") and name < last


def _digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
