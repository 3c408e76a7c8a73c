"""An archive and a cohort table in; the volumes folder out, with the scans that could not be used listed beside it."""

import functools
import pickle
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from darnet.archive import list_sources, name_format
from darnet.cohort import (
    Division,
    LeftOut,
    count_cohort,
    divide_cohort,
    find_leaking_patients,
    find_left_out,
    find_reversed,
    match_cohort,
    record_division,
)
from darnet.decoded_scan import unpack_scan
from darnet.errors import RunError, Status, UsageError
from darnet.prepared import PreparedScan, name_record, read_records, write_record
from darnet.ray_cluster import connect, decode_sources, iterate_blocks
from darnet.ray_token import list_nodes
from darnet.reading.road import Road
from darnet.scan import Source
from darnet.settings import PrepareSettings
from darnet.storage import Store
from darnet.terminal import print_heading, show_progress
from darnet.training_plan import count_decode_cpus, read_room
from darnet.volumes_folder import VOLUMES_FILE, write_array, write_facts, write_index

EXCLUDED_FILE = "excluded.csv"
NOT_IN_ARCHIVE = "NOT_IN_ARCHIVE"
AMBIGUOUS = "AMBIGUOUS"


def prepare_volumes(archive: Store, cohort: pd.DataFrame, volumes: Store, settings: PrepareSettings) -> dict[str, Any]:
    """Write the standard volume of every usable scan of the cohort, divide them, and list the others with reasons.

    What the same code has stored under the same settings, of sources that have not changed, is not decoded again.
    Scans that the table and the settings leave out are not decoded; those the table knows to be reversed are turned,
    unless the settings say otherwise.
    Raises: UsageError if no scan of the cohort is usable; RunError while some may be next time: no study is to be made
            of what a bad hour left. The folder declares no volumes then, also where it did before.
    """
    left_out = find_left_out(cohort, settings.cohorts)
    used = cohort[left_out == ""]
    _divide(used, settings)  # what no scan can mend is told before all are decoded
    sources = match_cohort(used, list_sources(archive.list_objects()))
    to_turn = find_reversed(cohort) if settings.cohorts.turn_reversed else []
    reversed_sources = frozenset(sources[scan_id].key for scan_id in to_turn if scan_id in sources)
    road = Road(settings.volume, settings.score.decode, reversed_sources=reversed_sources)
    prepared, num_reused = _prepare_sources(list(dict.fromkeys(sources.values())), archive, road, volumes)
    chosen = [
        _leave_out(scan_id, LeftOut(reason)) if reason else _choose(scan_id, sources.get(scan_id), prepared)
        for scan_id, reason in zip(cohort["scan_id"], left_out, strict=True)
    ]
    columns = {name: [getattr(scan, name) for scan in chosen] for name in ("status", "detail", "array", "sha256")}
    frame = cohort.assign(**columns)
    is_usable = frame["status"] == Status.OK
    excluded = frame[~is_usable]
    listed = _render_excluded(excluded)
    try:
        _refuse_unfinished(excluded["status"], f"{volumes.uri}/{EXCLUDED_FILE}")
        divided, division = _divide_usable(frame[is_usable], settings, f"{volumes.uri}/{EXCLUDED_FILE}")
    except RunError:
        # Another table may have declared volumes. Deleted first: no kill must leave them beside this one's list.
        volumes.delete(VOLUMES_FILE)
        volumes.write_bytes(EXCLUDED_FILE, listed)
        raise
    volumes.write_bytes(EXCLUDED_FILE, listed)
    counts = dict(Counter(map(str, excluded["status"])))
    write_facts(volumes, _tabulate_facts(cohort["scan_id"], chosen, sources))
    return {
        "volumes": volumes.uri,
        "scans": len(divided),
        "excluded": counts,
        "sources_reused": num_reused,
        "turned": len(reversed_sources),
        "counts": count_cohort(divided),
        "patients_in_both_cohorts": len(find_leaking_patients(divided)),
        "cohort_sha256": write_index(volumes, divided, settings.volume, division, counts),
    }


def _divide(cohort: pd.DataFrame, settings: PrepareSettings) -> pd.DataFrame:
    """The scans with cohort and fold. Raises: UsageError as `divide_cohort`."""
    return divide_cohort(
        cohort,
        num_folds=settings.train.num_folds,
        seed=settings.cohorts.seed,
        division=settings.cohorts.division,
        test_fraction=settings.cohorts.test_fraction,
    )


def _divide_usable(usable: pd.DataFrame, settings: PrepareSettings, place: str) -> tuple[pd.DataFrame, Division]:
    """The usable scans with cohort and fold, and how they were divided.

    Raises: UsageError if there are none, naming the place that says why; as `divide_cohort` and `record_division`.
    """
    if usable.empty:
        raise UsageError(f"no scan of the cohort is usable; {place} says why for each")
    divided = _divide(usable, settings)
    return divided, record_division(usable, settings.cohorts, num_folds=settings.train.num_folds)


def _refuse_unfinished(excluded: "pd.Series[str]", place: str) -> None:
    """Raises: RunError if one of these statuses is not final."""
    counts = Counter(str(status) for status in excluded if status in set(Status) and not Status(status).is_final)
    if counts:
        told = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
        raise RunError(
            f"{counts.total()} scans may yet be usable ({told}; {place} names each): the same command tries these "
            "again and no other. One that ends so every time must leave the cohort table, or gets other limits "
            "(score.decode)"
        )


def _render_excluded(excluded: pd.DataFrame) -> bytes:
    text: str = excluded[["scan_id", "patient_id", "diagnosis", "status", "detail"]].to_csv(index=False)
    return text.encode()


def _prepare_sources(
    sources: Sequence[Source], archive: Store, road: Road, volumes: Store
) -> tuple[dict[str, list[PreparedScan]], int]:
    """Scans by source, decoded only where the same code has not stored them; and of how many sources it had."""
    records = {source.key: name_record(source, road) for source in sources}
    prepared, outdated = read_records(volumes, records)
    if outdated:
        print_heading(f"{len(outdated)} sources were prepared by other code than this, and are decoded again")
    num_reused = len(prepared)
    todo = [source for source in sources if source.key not in prepared]
    if todo:
        connect()
        prepared |= _store_sources(todo, archive, road, volumes, records)
    return prepared, num_reused


def _store_sources(
    sources: Sequence[Source], archive: Store, road: Road, volumes: Store, records: Mapping[str, str]
) -> dict[str, list[PreparedScan]]:
    """Decode sources on the cluster, each scan's volume written where it was decoded; scans by source.

    A source is recorded when its last scan is there, so that a restart goes on from it.
    """
    store = functools.partial(_store_array, volumes=volumes)
    num_cpus = count_decode_cpus(read_room(list_nodes()), road.decode.num_threads)
    dataset = decode_sources(sources, archive, road, num_cpus).map(store, num_cpus=num_cpus)
    prepared: dict[str, list[PreparedScan]] = defaultdict(list)
    with show_progress("preparing", len(sources)) as meter:
        for batch in iterate_blocks(dataset):
            for scan, num_scans, failure in map(pickle.loads, batch["scan"]):
                if failure is not None:
                    raise failure
                prepared[scan.source_key].append(scan)
                is_complete = len(prepared[scan.source_key]) == num_scans
                if is_complete:
                    write_record(volumes, records[scan.source_key], prepared[scan.source_key])
                meter.advance(int(is_complete), {scan.status: 1})
    return prepared


def _store_array(row: Mapping[str, Any], volumes: Store) -> dict[str, Any]:
    """Write one decoded scan where it was decoded; only its name travels on."""
    decoded = unpack_scan(row["record"], row["voxels"], row["lung"])
    scan = decoded.scan
    array, sha256 = ("", "")
    if scan.volume is not None:
        array, sha256 = write_array(volumes, scan.scan_id, scan.volume.voxels)
    prepared = PreparedScan(
        decoded.source_key, scan.scan_id, str(scan.status), scan.status_detail, array, sha256, scan.facts
    )
    return {"scan": pickle.dumps((prepared, decoded.num_scans, decoded.failure))}


def _leave_out(scan_id: str, why: LeftOut) -> PreparedScan:
    """A scan that the table and the settings leave out, unread."""
    return PreparedScan("", scan_id, str(why), why.detail, "", "")


def _tabulate_facts(
    scan_ids: Iterable[str], chosen: Iterable[PreparedScan], sources: Mapping[str, Source]
) -> pd.DataFrame:
    """What an audit may look at besides pixels: how each usable scan is stored and what its headers say."""
    facts = [
        {
            "scan_id": scan_id,
            "source": scan.source_key,
            "input_sha256": sources[scan_id].input_sha256,
            "file_format": name_format(sources[scan_id]),
            **asdict(scan.facts),
        }
        for scan_id, scan in zip(scan_ids, chosen, strict=True)
        if scan.status == Status.OK
    ]
    return pd.DataFrame(facts).drop(columns=["patient_key", "series_key"])


def _choose(scan_id: str, source: Source | None, prepared: Mapping[str, Sequence[PreparedScan]]) -> PreparedScan:
    """The scan a row of the cohort means: the one it names, or the only usable one of its source."""
    if source is None:
        return PreparedScan("", scan_id, NOT_IN_ARCHIVE, "no source of this name in the archive", "", "")
    scans = prepared[source.key]
    named = [scan for scan in scans if scan.scan_id == scan_id]
    usable = [scan for scan in scans if scan.status == Status.OK]
    if len(named) == 1:
        return named[0]
    if scan_id != source.key and scan_id.rpartition("#")[0] == source.key:
        return PreparedScan(source.key, scan_id, NOT_IN_ARCHIVE, "its source holds no such series", "", "")
    if len(usable) > 1:
        names = ", ".join(scan.scan_id for scan in usable)
        return PreparedScan(source.key, scan_id, AMBIGUOUS, f"source holds several scans, name one of {names}", "", "")
    return (usable or scans)[0]
