"""What a disk can hold that a bucket cannot: links, pipes, odd names, and ways out of the folder."""

import errno
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from darnet import storage_local
from darnet.archive import list_sources
from darnet.config import VolumeConfig
from darnet.errors import ScanError, Status, StorageError, UsageError
from darnet.scan import StoredObject
from darnet.staging import Staging
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


@contextmanager
def close_to_us(folder: Path, modes: Mapping[str, int]) -> Iterator[None]:
    """Files and folders below this one get these modes, and we no more rights than anybody: root may read all."""
    before = os.geteuid()
    for name, mode in modes.items():
        (folder / name).chmod(mode)
    if before == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(before)
        for name in modes:
            (folder / name).chmod(0o755)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """An empty folder that anybody may enter; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_a_file_that_may_not_be_read_is_told_before_a_decoder_calls_it_damaged(open_folder: Path) -> None:
    (open_folder / "a").write_bytes(b"1")
    with close_to_us(open_folder, {"a": 0}):
        (item,) = LocalStore(open_folder).list_objects()
        with pytest.raises(ScanError, match="give this job the right") as caught:
            check_unchanged(open_folder / "a", item)
    assert caught.value.status is Status.ERR_DENIED


CLOSED = {"closed": 0o111, "dark": 0o444, "shut": 0, "x.nii": 0}  # not to be listed, not to be entered, and neither


def test_of_an_archive_what_may_not_be_listed_is_a_source_that_may_not_be_read(open_folder: Path) -> None:
    for name in ("a", *CLOSED, "dark/below", "z"):
        (open_folder / name).mkdir()
        (open_folder / name / "1.dcm").write_bytes(b"1")
    store = LocalStore(open_folder, is_archive=True)
    statuses = {}
    with close_to_us(open_folder, CLOSED):
        sources = list(list_sources(store.list_objects()))
        again = list(list_sources(store.list_objects()))
        for source in sources:
            with tempfile.TemporaryDirectory() as staging:
                try:
                    Staging(store, source, Path(staging)).fetch(VolumeConfig())
                    statuses[source.key] = "OK"
                except ScanError as error:
                    statuses[source.key] = error.status
        assert [item.key.partition("/")[0] for item in store.list_objects("shut")] == ["shut"]
    denied = dict.fromkeys(["closed", "dark", "dark/below", "shut", "x.nii/"], Status.ERR_DENIED)
    assert statuses == {"a": "OK", "z": "OK"} | denied
    assert [source.input_sha256 for source in again] == [source.input_sha256 for source in sources]
    opened = {source.key: source.input_sha256 for source in list_sources(store.list_objects())}
    assert opened.keys() == statuses.keys()
    assert {source.key for source in sources if opened[source.key] == source.input_sha256} == {"a", "z"}


def test_any_other_place_that_may_not_be_listed_is_an_error(open_folder: Path) -> None:
    """Results that cannot be seen must not look like none; nor an archive, or a part of it that was asked for."""
    (open_folder / "closed" / "below").mkdir(parents=True)
    store, archive = LocalStore(open_folder), LocalStore(open_folder, is_archive=True)
    with close_to_us(open_folder, {"closed": 0o111}):
        for listing in (
            store.list_objects(),
            store.list_objects("closed"),
            archive.list_objects("closed/below"),
            LocalStore(open_folder / "closed", is_archive=True).list_objects(),
        ):
            with pytest.raises(StorageError, match=r"closed: cannot list the folder \(Permission denied\)"):
                list(listing)
    with close_to_us(open_folder, {"closed": 0o444}), pytest.raises(StorageError, match="cannot"):
        list(store.list_objects())


def test_of_a_folder_in_an_archive_that_cannot_be_listed_the_name_is_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a patient's; what a person asked for by name is told."""
    (tmp_path / "ct" / "a-patient").mkdir(parents=True)
    read_folder = storage_local._read_folder

    def break_off(folder: Path) -> list[tuple[str, "os.DirEntry[str]"]]:
        if folder.name == "a-patient":
            raise OSError(errno.EIO, "Input/output error")
        return read_folder(folder)

    monkeypatch.setattr(storage_local, "_read_folder", break_off)
    archive = LocalStore(tmp_path, is_archive=True)
    with pytest.raises(StorageError, match=r", 2 folders down: cannot list the folder \(Input/output") as caught:
        list(archive.list_objects())
    assert "a-patient" not in str(caught.value)
    for listing in (archive.list_objects("ct/a-patient/"), LocalStore(tmp_path).list_objects()):
        with pytest.raises(StorageError, match="ct/a-patient: cannot list the folder"):
            list(listing)


def test_a_file_in_a_folder_that_may_not_be_entered_is_listed_and_not_read(open_folder: Path) -> None:
    (open_folder / "dark").mkdir()
    (open_folder / "dark" / "1").write_bytes(b"1")
    store = LocalStore(open_folder)
    with close_to_us(open_folder, {"dark": 0o444}):
        (item,) = store.list_objects()
        with pytest.raises(StorageError, match="cannot read the file"):
            store.read_bytes(item.key)


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
