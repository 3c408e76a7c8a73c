"""A disk that is soon full: a file system in memory, where this machine lets us mount one."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class MountRefused(Exception):  # noqa: N818
    """Only an administrator may mount."""


@contextmanager
def mount_small_disk(folder: Path, num_kib: int) -> Iterator[Path]:
    """An empty disk of so many KiB at `folder`, until the block ends.

    Raises: MountRefused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_kib}k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        raise MountRefused("mount -t tmpfs is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
