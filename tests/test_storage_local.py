"""What a disk can hold that a bucket cannot: links, pipes, odd names, and ways out of the folder."""

import os
import tempfile
from pathlib import Path

import pytest

from darnet.errors import ScanError, Status, StorageError, UsageError
from darnet.scan import StoredObject
from darnet.storage_local import LocalStore, check_unchanged


def list_keys(store: LocalStore) -> list[str]:
    return [item.key for item in store.list_objects()]


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/passwd", "..", ".", "", "a//b", "a/./b", "a\0b"])
def test_no_key_leaves_the_folder(tmp_path: Path, key: str) -> None:
    (tmp_path / "x").write_bytes(b"secret")
    store = LocalStore(tmp_path / "root")
    with pytest.raises(UsageError):
        store.read_bytes(key)
    with pytest.raises(UsageError):
        store.write_bytes(key, b"")
    with pytest.raises(UsageError):
        store.fetch(StoredObject(key, 6, ""), tmp_path / "copy")


def test_names_that_are_not_utf8_are_listed_and_read(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/caf\xe9.dcm", "wb") as sink:  # noqa: PTH123
        sink.write(b"1")
    store = LocalStore(tmp_path)
    assert [os.fsencode(key) for key in list_keys(store)] == [b"caf\xe9.dcm"]
    assert store.read_bytes(list_keys(store)[0]) == b"1"


def test_links_are_followed_but_never_round_in_circles(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1").write_bytes(b"1")
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "a" / "up").symlink_to(root)
    (root / "folder").symlink_to(tmp_path / "elsewhere")
    (root / "file").symlink_to(tmp_path / "elsewhere" / "1")
    store = LocalStore(root)
    assert list_keys(store) == ["file", "folder/1"]
    assert store.read_bytes("folder/1") == store.read_bytes("file") == b"1"


@pytest.mark.parametrize("target", ["absent", "link"])
def test_a_dangling_link_is_listed_and_gone_when_fetched(tmp_path: Path, target: str) -> None:
    (tmp_path / "link").symlink_to(target)
    store = LocalStore(tmp_path)
    (item,) = store.list_objects()
    with pytest.raises(ScanError) as caught:
        store.fetch(item, tmp_path / "copy")
    assert caught.value.status in {Status.ERR_GONE, Status.ERR_STORAGE}


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    store = LocalStore(tmp_path)
    (item,) = store.list_objects()
    with pytest.raises(ScanError, match="not a regular file"):
        store.fetch(item, tmp_path / "copy")


NOBODY = 65534


def test_a_file_that_may_not_be_read_is_told_before_a_decoder_calls_it_damaged() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # pytest's own folders are closed to others
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "a").write_bytes(b"1")
        (folder / "a").chmod(0)
        (item,) = LocalStore(folder).list_objects()
        before = os.geteuid()
        try:
            if before == 0:  # root may read everything
                os.seteuid(NOBODY)
            with pytest.raises(ScanError, match="give this job the right") as caught:
                check_unchanged(folder / "a", item)
        finally:
            os.seteuid(before)
    assert caught.value.status is Status.ERR_DENIED


def test_a_file_touched_within_the_same_length_is_a_change(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"1")
    store = LocalStore(tmp_path)
    (item,) = store.list_objects()
    os.utime(path, ns=(int(item.version), int(item.version) + 1))
    with pytest.raises(ScanError) as caught:
        store.fetch(item, tmp_path / "copy")
    assert caught.value.status is Status.ERR_INPUT_CHANGED


def test_written_files_follow_the_umask_and_leave_nothing_behind(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    before = os.umask(0o022)
    try:
        store.write_bytes("a", b"")
        store.put_if_absent("b", b"")
        store.put_if_absent("b", b"")
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in "ab"] == [0o644, 0o644]
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]  # noqa: PTH208


def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot write the file"):
        LocalStore(tmp_path).write_bytes("file/below", b"")
