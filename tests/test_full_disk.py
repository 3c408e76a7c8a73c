"""A worker without room for its copies loses no source: each is a row that says why, and is tried again."""

import tempfile
from pathlib import Path

import pytest

from darnet.archive import list_sources
from darnet.config import DecodeConfig, VolumeConfig
from darnet.errors import Status
from darnet.ingest import Ingester
from darnet.reading.road import Road
from darnet.scan import StoredObject
from darnet.storage_local import LocalStore
from tests.ct_fixtures import write_chest
from tests.small_disk import MountRefused, mount_small_disk

ROAD = Road(VolumeConfig(shape=(16, 32, 32)), DecodeConfig())


class CopiedStore(LocalStore):
    """Files that are fetched, as from a bucket."""

    def local_path(self, key: str) -> None:  # type: ignore[override]  # noqa: ARG002
        return None

    def fetch(self, item: StoredObject, path: Path) -> None:
        LocalStore(self.root).fetch(item, path)


def test_a_full_disk_is_a_row_and_the_next_scan_with_room_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_chest(tmp_path / "archive" / "a")
    store = CopiedStore(tmp_path / "archive")
    (source,) = list_sources(store.list_objects())
    ingester = Ingester(store, ROAD)
    try:
        with mount_small_disk(tmp_path / "disk", 64) as disk:
            for place in (disk, disk / "gone"):
                monkeypatch.setattr(tempfile, "tempdir", str(place))
                (scan,) = ingester.ingest(source)
                assert scan.status is Status.ERR_STORAGE
            assert list(disk.iterdir()) == []
    except MountRefused as refused:
        pytest.skip(str(refused))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert [scan.status for scan in ingester.ingest(source)] == [Status.OK]
    ingester.close()
