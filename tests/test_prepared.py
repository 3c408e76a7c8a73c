"""Records of what was prepared: found again under the same bytes and settings, and under no other."""

from dataclasses import replace

import pytest

from darnet.config import DecodeConfig, VolumeConfig
from darnet.errors import Status
from darnet.prepared import PreparedScan, name_record, read_records, write_record
from darnet.reading.road import Road
from darnet.scan import Intensity, Manufacturer, ScanFacts, Source, StoredObject
from darnet.storage import Store
from tests.volumes_fixtures import SMALL_VOLUME, make_voxels

SOURCE = Source("CP/p1/1", (StoredObject("CP/p1/1/1.png", 10, "v1", 0.0),))
ROAD = Road(SMALL_VOLUME, DecodeConfig())


def make_scan(status: Status = Status.OK, array: str = "") -> PreparedScan:
    facts = ScanFacts(12, intensity=Intensity.HU, manufacturer=Manufacturer.SIEMENS, patient_key="k", series_key="k")
    return PreparedScan(SOURCE.key, SOURCE.key, str(status), "why", array, "0" * 64, facts)


def test_a_record_is_read_back_without_the_keys_of_persons(store: Store) -> None:
    store.write_bytes("arrays/a.npy", make_voxels("CP", 1).tobytes())
    scans = [make_scan(array="arrays/a.npy"), make_scan(Status.BAD_TILT)]
    write_record(store, "prepared/r-1.json", scans)
    facts = replace(scans[0].facts, patient_key=None, series_key=None)
    expected = [replace(scan, facts=facts) for scan in scans]
    assert read_records(store, {SOURCE.key: "prepared/r-1.json", "other": "prepared/s-1.json"}) == (
        {SOURCE.key: expected},
        [],
    )


def test_a_source_whose_array_is_gone_is_prepared_again(local: Store) -> None:
    local.write_bytes("arrays/b.npy", b"another")
    write_record(local, "prepared/r-1.json", [make_scan(array="arrays/a.npy")])
    assert read_records(local, {SOURCE.key: "prepared/r-1.json"})[0] == {}


def test_what_may_end_otherwise_next_time_is_not_recorded(local: Store) -> None:
    local.write_bytes("arrays/a.npy", b"")
    write_record(local, "prepared/r-1.json", [make_scan(array="arrays/a.npy"), make_scan(Status.ERR_TIMEOUT)])
    assert read_records(local, {SOURCE.key: "prepared/r-1.json"})[0] == {}


def test_what_other_code_has_prepared_is_told_apart_and_not_taken_over(local: Store) -> None:
    local.write_bytes("arrays/a.npy", b"")
    stem, _, code = name_record(SOURCE, ROAD).rpartition("-")
    write_record(local, f"{stem}-{code[:-6]}.json", [make_scan(array="arrays/a.npy")])
    names = {SOURCE.key: f"{stem}-{code}", "other": "prepared/s-1.json"}
    assert read_records(local, names) == ({}, [SOURCE.key])
    write_record(local, f"{stem}-{code}", [make_scan(array="arrays/a.npy")])
    found, outdated = read_records(local, names)
    assert (list(found), outdated) == ([SOURCE.key], [])


@pytest.mark.parametrize(
    ("source", "road"),
    [
        (replace(SOURCE, key="CP/p1/2"), ROAD),
        (replace(SOURCE, objects=(StoredObject("CP/p1/1/1.png", 10, "v2", 0.0),)), ROAD),
        (SOURCE, replace(ROAD, volume=VolumeConfig(shape=(8, 32, 32), crop="body"))),
        (SOURCE, replace(ROAD, decode=DecodeConfig(min_slices=3))),
        (SOURCE, replace(ROAD, reversed_sources=frozenset({SOURCE.key}))),
    ],
)
def test_other_bytes_or_settings_have_another_record(source: Source, road: Road) -> None:
    assert name_record(source, road) != name_record(SOURCE, ROAD)
    assert name_record(SOURCE, replace(ROAD, reversed_sources=frozenset({"other"}))) == name_record(SOURCE, ROAD)
