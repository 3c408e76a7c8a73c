"""What preparing has already done: a source's scans are recorded under all they depend on, and found again.

A record is one small object a source in `<volumes>/prepared/`. Nobody but a restarted jobs.prepare reads them.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from pydantic import TypeAdapter

from darnet.code_version import name_preparing_code
from darnet.config import fingerprint
from darnet.errors import Status
from darnet.reading.road import Road
from darnet.scan import ScanFacts, Source
from darnet.storage import Store
from darnet.volumes_folder import ARRAYS_FOLDER

RECORDS_FOLDER = "prepared"
READERS = 16  # Source: ours; as many connections as a store keeps open


@dataclass(frozen=True)
class PreparedScan:
    """What became of one scan of a source: its status, and where its standard volume lies if that is OK."""

    source_key: str
    scan_id: str
    status: str
    detail: str
    array: str
    sha256: str
    facts: ScanFacts = field(default_factory=ScanFacts)


SCANS = TypeAdapter(list[PreparedScan])


def name_record(source: Source, road: Road) -> str:
    """A name that changes with the source's bytes, with every setting between them and the standard volume, and behind
    a hyphen with the code between them."""
    facts = (
        source.key,
        source.input_sha256,
        road.volume.preprocessing_version,
        fingerprint(road.decode),
        str(source.key in road.reversed_sources),
    )
    digest = hashlib.sha256("\0".join(facts).encode()).hexdigest()
    return f"{RECORDS_FOLDER}/{digest[:32]}-{name_preparing_code().rpartition('+')[2]}.json"


def write_record(store: Store, name: str, scans: Sequence[PreparedScan]) -> None:
    """Record a source's scans, unless one may end otherwise next time. Keys of patients and series stay out."""
    if all(Status(scan.status).is_final for scan in scans):
        keyless = [replace(scan, facts=replace(scan.facts, patient_key=None, series_key=None)) for scan in scans]
        store.write_bytes(name, SCANS.dump_json(keyless))


def read_records(store: Store, names: Mapping[str, str]) -> tuple[dict[str, list[PreparedScan]], list[str]]:
    """The recorded scans by source key, of those sources whose every array is still there, and the keys of the sources
    that only other code has recorded; `names` by source key."""
    recorded = {item.key for item in store.list_objects(f"{RECORDS_FOLDER}/")}
    arrays = {item.key for item in store.list_objects(f"{ARRAYS_FOLDER}/")}
    found = {key: name for key, name in names.items() if name in recorded}
    by_any_code = {name.rpartition("-")[0] for name in recorded}
    outdated = [key for key, name in names.items() if key not in found and name.rpartition("-")[0] in by_any_code]
    with ThreadPoolExecutor(READERS) as pool:
        scans = list(pool.map(lambda name: SCANS.validate_json(store.read_bytes(name)), found.values()))
    return {key: items for key, items in zip(found, scans, strict=True) if _is_stored(items, arrays)}, outdated


def _is_stored(scans: Iterable[PreparedScan], arrays: set[str]) -> bool:
    return all(scan.array in arrays for scan in scans if scan.status == Status.OK)
