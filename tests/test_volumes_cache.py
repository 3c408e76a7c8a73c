"""A node's copy of volumes: complete, checked, made once, and never an older one."""

import threading
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import pytest

from darnet import volumes_cache
from darnet.errors import StorageError
from darnet.storage import Store, open_store
from darnet.storage_local import LocalStore
from darnet.volumes_cache import copy_volumes, is_on_network, open_volumes
from darnet.volumes_folder import read_index
from tests.volumes_fixtures import DIVISION, EXCLUDED, make_volumes


@dataclass(frozen=True)
class CountingStore(LocalStore):
    """Notes every object that is read; from the `broken` one on none can be."""

    read: list[str] = field(default_factory=list)
    broken: str = ""

    def read_bytes(self, key: str) -> bytes:
        if key == self.broken:
            raise StorageError("the network is down")
        self.read.append(key)
        return super().read_bytes(key)


def count_arrays(store: CountingStore) -> int:
    return sum(key.startswith("arrays/") for key in store.read)


def fill(store: Store, tmp_path: Path) -> None:
    """Volumes, put there object by object."""
    made = make_volumes(tmp_path / "made", 6, 2, num_test=3)
    for item in open_store(str(made.folder)).list_objects():
        store.write_bytes(item.key, (made.folder / item.key).read_bytes())


def test_a_copy_is_what_was_prepared(store: Store, tmp_path: Path) -> None:
    fill(store, tmp_path)
    copied, made = read_index(copy_volumes(store, tmp_path / "cache")), read_index(tmp_path / "made")
    pd.testing.assert_frame_equal(copied.frame, made.frame)
    assert (copied.cohort_sha256, copied.division, copied.excluded) == (made.cohort_sha256, DIVISION, EXCLUDED)
    for name in made.frame["array"]:
        assert (copied.folder / name).read_bytes() == (made.folder / name).read_bytes()


@pytest.mark.s3
def test_an_address_in_a_bucket_opens_as_local_files(s3, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    uri = s3() + "/volumes"
    fill(open_store(uri), tmp_path)
    index = open_volumes(uri, tmp_path / "cache")
    assert index.folder.is_relative_to(tmp_path / "cache")
    assert open_volumes(uri, tmp_path / "cache").folder == index.folder


def test_a_local_folder_is_used_as_it_is(tmp_path: Path) -> None:
    made = make_volumes(tmp_path / "made", 6, 2)
    assert open_volumes(str(made.folder), tmp_path / "cache").folder == made.folder
    assert not (tmp_path / "cache").exists()


MOUNT_TABLE = """\
/dev/nvme0n1 / ext4 rw 0 0
nas:/export /mnt/nas nfs4 rw 0 0
nas:/export /mnt/two\\040words nfs rw 0 0
bucket /mnt/bucket fuse.s3fs rw 0 0
/dev/sdb1 /mnt/nas/disk xfs rw 0 0
"""


@pytest.mark.parametrize(
    ("folder", "is_far"),
    [
        ("/data/volumes", False),
        ("/mnt/nas", True),
        ("/mnt/nas/study/volumes", True),
        ("/mnt/nas2/volumes", False),
        ("/mnt/nas/disk/volumes", False),
        ("/mnt/two words/volumes", True),
        ("/mnt/bucket/volumes", True),
    ],
)
def test_a_folder_that_comes_over_the_network_is_told_by_its_mount(folder: str, is_far: bool) -> None:
    assert is_on_network(Path(folder), MOUNT_TABLE) is is_far


def test_a_folder_that_comes_over_the_network_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(open_store(str(tmp_path / "volumes")), tmp_path)
    (tmp_path / "mounts").write_text(f"/dev/sda / ext4 rw 0 0\nnas:/x {tmp_path / 'volumes'} nfs rw 0 0\n")
    monkeypatch.setattr(volumes_cache, "MOUNTS", tmp_path / "mounts")
    index = open_volumes(str(tmp_path / "volumes"), tmp_path / "cache")
    assert index.folder.parent == tmp_path / "cache"
    assert len(index.frame) > 0


def flip_last_bit(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_one_wrong_voxel_of_a_local_folder_is_noticed_also_after_it_was_once_found_sound(tmp_path: Path) -> None:
    made = make_volumes(tmp_path / "made", 6, 2)
    path = made.folder / made.frame["array"][3]
    sound = path.read_bytes()
    flip_last_bit(path)
    for _ in range(2):
        with pytest.raises(StorageError, match=rf"{path.name}: damaged"):
            open_volumes(str(made.folder), tmp_path / "cache")
    path.write_bytes(sound)
    open_volumes(str(made.folder), tmp_path / "cache")
    flip_last_bit(path)
    with pytest.raises(StorageError, match=rf"{path.name}: damaged"):
        open_volumes(str(made.folder), tmp_path / "cache")


@pytest.mark.s3
def test_a_copy_that_is_damaged_later_is_noticed_and_made_whole_when_deleted(s3, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    uri = s3() + "/volumes"
    fill(open_store(uri), tmp_path)
    index = open_volumes(uri, tmp_path / "cache")
    path = index.folder / index.frame["array"][3]
    flip_last_bit(path)
    with pytest.raises(StorageError, match=rf"{path.name}: damaged"):
        open_volumes(uri, tmp_path / "cache")
    path.unlink()
    assert open_volumes(uri, tmp_path / "cache").folder == index.folder


def test_all_workers_of_a_node_together_copy_once(tmp_path: Path) -> None:
    make_volumes(tmp_path / "made", 6, 2)
    store, folders = CountingStore(tmp_path / "made"), list[Path]()
    threads = [
        threading.Thread(target=lambda: folders.append(copy_volumes(store, tmp_path / "cache"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1
    assert count_arrays(store) == 6


def test_a_copy_that_broke_off_goes_on_and_was_never_taken_for_whole(tmp_path: Path) -> None:
    name = make_volumes(tmp_path / "made", 6, 2).frame["array"][3]
    with pytest.raises(StorageError, match="the network is down"):
        copy_volumes(CountingStore(tmp_path / "made", broken=name), tmp_path / "cache")
    assert list((tmp_path / "cache").glob("*/volumes.json")) == []
    num_present = len(list((tmp_path / "cache").glob("*/arrays/*.npy")))
    store = CountingStore(tmp_path / "made")
    read_index(copy_volumes(store, tmp_path / "cache"))
    assert count_arrays(store) == 6 - num_present


def test_a_damaged_array_is_named_and_not_kept(tmp_path: Path) -> None:
    made = make_volumes(tmp_path / "made", 6, 2)
    path = made.folder / made.frame["array"][3]
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(StorageError, match=rf"{path.name}: damaged"):
        copy_volumes(open_store(str(made.folder)), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob(f"*/arrays/{path.name}"))


def test_volumes_that_were_prepared_anew_get_a_copy_of_their_own(tmp_path: Path) -> None:
    make_volumes(tmp_path / "made", 6, 2)
    first = copy_volumes(open_store(str(tmp_path / "made")), tmp_path / "cache")
    make_volumes(tmp_path / "made", 9, 2)
    second = copy_volumes(open_store(str(tmp_path / "made")), tmp_path / "cache")
    assert first != second
    assert (len(read_index(first).frame), len(read_index(second).frame)) == (6, 9)
