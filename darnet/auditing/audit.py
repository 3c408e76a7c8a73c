"""What to know about a cohort before a network learns from it: a table, and images if there are any, in; an audit out.

Who is in both cohorts, what predicts the diagnosis without a look at the lungs, which scans are there twice, and whose
slices are out of order.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd

from darnet import RESEARCH_USE
from darnet.archive import list_sources
from darnet.auditing.features import (
    Duplicate,
    Look,
    find_same_files,
    find_same_sources,
    find_same_volumes,
    list_fact_features,
    list_file_features,
    list_image_features,
    list_table_features,
    look_at_volumes,
)
from darnet.auditing.shortcuts import Feature, Shortcut, find_shortcuts
from darnet.cohort import (
    FLAG_COLUMNS,
    ORDER_DEFECTS,
    LeftOut,
    count_cohort,
    divide_cohort,
    find_known_order,
    find_leaking_patients,
    find_left_out,
    find_reversed,
    has_cohorts,
    list_other_settings,
    match_cohort,
    name_own_cohorts,
)
from darnet.config import digest_json
from darnet.errors import UsageError
from darnet.reading.slice_order import SliceOrder
from darnet.scan import LABELS, Source
from darnet.settings import PrepareSettings
from darnet.storage import Store, open_store
from darnet.volumes_cache import open_volumes
from darnet.volumes_folder import VolumesIndex, read_facts

SCAN_COLUMNS = ("scan_id", "diagnosis", "patient_id", "cohort", "fold")  # an evaluation knows the first two at least
KEYS = ("found", "known")
PIXEL_FINDINGS = ("slice order", "borders", "pixel duplicates")  # what only the volumes tell


@dataclass(frozen=True)
class CohortCounts:
    """Two cohorts, counted, and who is in both. `by` is the table's column that makes them, or `patient`."""

    by: str
    counts: dict[str, dict[str, int]]
    train_patients: int
    test_patients: int
    test_scans: int
    patients_in_both_cohorts: int
    test_scans_of_those: int


@dataclass(frozen=True)
class OrderFinding:
    """A scan whose images say that its slices are not head first."""

    scan_id: str
    diagnosis: str
    order: str
    told_by_table: str


@dataclass(frozen=True, eq=False)
class Images:
    """What was there besides the table: sources by scan, the volumes folder, a look at each volume, and its facts."""

    sources: Mapping[str, Source] = field(default_factory=dict)
    index: VolumesIndex | None = None
    looks: Mapping[str, Look] = field(default_factory=dict)
    duplicates: Sequence[Duplicate] = ()
    facts: pd.DataFrame = field(default_factory=pd.DataFrame)


@dataclass(frozen=True, eq=False)
class Audit:
    """All that was found. `cohorts` are the printed ones where the table has any; `division` is what the settings make.

    `division` is None, and `division_fault` says why, where the cohort cannot be divided so; `division_settings` is
    what it takes besides the table to divide it so again. `division_frame` is the whole table with the cohorts and
    folds of the division, `reasons` says of each of its rows why it is left out, if it is.
    """

    name: str
    looked_at: tuple[str, ...]
    num_scans: int
    num_patients: int
    patients_of_several_diagnoses: int
    cohorts: CohortCounts
    division: CohortCounts | None
    division_fault: str
    left_out: dict[str, int]
    reversed_scans: int
    findings: dict[str, dict[str, dict[str, int]]]
    shortcuts: list[Shortcut]
    num_features: int
    unread_columns: list[str]
    duplicates: list[dict[str, Any]]
    order_counts: dict[str, dict[str, int]]
    order_findings: list[OrderFinding]
    division_settings: dict[str, Any]
    division_frame: pd.DataFrame
    reasons: "pd.Series[str]"

    @property
    def not_looked_at(self) -> tuple[str, ...]:
        """What this audit cannot say anything of, without volumes."""
        return () if "volumes" in self.looked_at else PIXEL_FINDINGS


def audit_cohort(cohort: pd.DataFrame, settings: PrepareSettings) -> Audit:
    """Audit a checked cohort table, and the images of `settings.archive` and `settings.volumes` if they are named.

    Raises: UsageError where a division is asked for that the table cannot give, or an archive or a volumes folder holds
            none of its scans.
    """
    images = _gather_images(cohort, settings)
    reasons = _find_left_out(cohort, settings, images.index)
    divided, fault = _divide(cohort[reasons == ""], settings, images.index)
    printed = next((column for column in ("paper_cohort", "cohort") if has_cohorts(cohort, column)), None)
    if printed is None and divided is None:
        raise UsageError(f"{settings.cohort}: the table has no cohorts of its own, and none can be made: {fault}")
    division = None if divided is None else count_cohorts(divided, _name_cohorts(cohort, settings, images.index))
    cohorts = division if printed is None else count_cohorts(cohort.assign(cohort=cohort[printed]), printed)
    assert cohorts is not None
    features, unread = _list_features(cohort, images)
    shortcuts = find_shortcuts(features, cohort["diagnosis"].tolist(), cohort["patient_id"].tolist(), 0)
    return Audit(
        name=settings.cohort.rpartition("/")[2],
        looked_at=("table", *(kind for kind in ("archive", "volumes") if getattr(settings, kind))),
        num_scans=len(cohort),
        num_patients=cohort["patient_id"].nunique(),
        patients_of_several_diagnoses=int((cohort.groupby("patient_id")["diagnosis"].nunique() > 1).sum()),
        cohorts=cohorts,
        division=division,
        division_fault=fault,
        left_out={str(why): int((reasons == why).sum()) for why in LeftOut if (reasons == why).any()},
        reversed_scans=len(find_reversed(cohort[reasons == ""])),
        findings=count_findings(cohort),
        shortcuts=shortcuts,
        num_features=len(features),
        unread_columns=unread,
        duplicates=describe_duplicates(images.duplicates, cohort, divided),
        order_counts=_count_orders(images.looks, cohort),
        order_findings=_list_order_findings(images.looks, cohort),
        division_settings=_describe_settings(settings),
        division_frame=_merge_division(cohort, divided),
        reasons=reasons,
    )


def count_cohorts(frame: pd.DataFrame, by: str) -> CohortCounts:
    """Count two cohorts by the column `cohort`, and the leak between them."""
    train, test = (frame[frame["cohort"] == cohort] for cohort in ("train", "test"))
    leaking = find_leaking_patients(frame)
    return CohortCounts(
        by=by,
        counts=count_cohort(frame),
        train_patients=train["patient_id"].nunique(),
        test_patients=test["patient_id"].nunique(),
        test_scans=len(test),
        patients_in_both_cohorts=len(leaking),
        test_scans_of_those=int(test["patient_id"].isin(leaking).sum()),
    )


def count_findings(frame: pd.DataFrame) -> dict[str, dict[str, dict[str, int]]]:
    """Count the table's own findings: finding -> diagnosis -> scans that have it (`found`) of those known (`known`).

    No order_defect is a finding too, where that is known (`find_known_order`).
    """
    marks = {column: frame[column] for column in FLAG_COLUMNS if column in frame}
    findings = {column: (cells == "1", cells != "") for column, cells in marks.items()}
    if "order_defect" in frame:
        is_known = find_known_order(frame)
        findings |= {f"order {defect}": (frame["order_defect"] == defect, is_known) for defect in ORDER_DEFECTS}
    is_label = {label: frame["diagnosis"] == label for label in LABELS}
    return {
        name: {label: _count_pair(pair, where) for label, where in is_label.items()} for name, pair in findings.items()
    }


def _count_pair(pair: "tuple[pd.Series[bool], pd.Series[bool]]", where: "pd.Series[bool]") -> dict[str, int]:
    return {key: int((marked & where).sum()) for key, marked in zip(KEYS, pair, strict=True)}


def describe_duplicates(
    duplicates: Sequence[Duplicate], cohort: pd.DataFrame, divided: pd.DataFrame | None
) -> list[dict[str, Any]]:
    """Each group once, however it was seen, and whose scans they are.

    Worst is where one scan stands under two diagnoses or in both cohorts.
    """
    rows = cohort.set_index("scan_id")[["patient_id", "diagnosis"]]
    placed = {} if divided is None else dict(zip(divided["scan_id"], divided["cohort"], strict=True))
    described = []
    for scan_ids, ways in _merge_duplicates(duplicates):
        known = rows.reindex([scan_id for scan_id in scan_ids if scan_id in rows.index])
        described.append(
            {
                "by": ways,
                "scan_ids": scan_ids,
                "patients": sorted(set(known["patient_id"])),
                "diagnoses": sorted(set(known["diagnosis"])),
                "cohorts": sorted({placed[scan_id] for scan_id in scan_ids if scan_id in placed}),
            }
        )
    keys = ("diagnoses", "cohorts", "patients")
    return sorted(described, key=lambda item: ([-len(item[key]) for key in keys], item["scan_ids"]))


def summarise_audit(audit: Audit) -> dict[str, Any]:
    """The audit as JSON: the counts of the printed cohorts at the top, everything else below names of its own."""
    cohorts = asdict(audit.cohorts)
    rows = audit.division_frame
    digests = digest_scans(rows)
    division = None if audit.division is None else asdict(audit.division)
    return {
        "cohorts_by": cohorts.pop("by"),
        **cohorts,
        "table": audit.name,
        "looked_at": list(audit.looked_at),
        "not_looked_at": list(audit.not_looked_at),
        "scans": audit.num_scans,
        "patients": audit.num_patients,
        "patients_of_several_diagnoses": audit.patients_of_several_diagnoses,
        "division": division if division is not None else {"fault": audit.division_fault},
        "division_settings": audit.division_settings,
        "scan_digests": digests,
        "cohort_sha256": digest_cohort(digests, audit.division_settings),
        "left_out": audit.left_out,
        "reversed_scans": audit.reversed_scans,
        "findings": audit.findings,
        "shortcuts": [asdict(item) for item in audit.shortcuts],
        "unread_columns": audit.unread_columns,
        "duplicates": audit.duplicates,
        "slice_order": {"counts": audit.order_counts, "findings": [asdict(item) for item in audit.order_findings]},
        "notice": RESEARCH_USE,
    }


def digest_scans(rows: pd.DataFrame) -> dict[str, list[str]]:
    """What an audit keeps of its scans, so that they are known again; no name can be read from it.

    Last column -> the sorted digests of each scan by all of `SCAN_COLUMNS` up to that one.
    """
    columns = {column: rows[column].astype(object).where(rows[column].notna(), "") for column in SCAN_COLUMNS}
    return {
        last: sorted(map(digest_scan, *(columns[column] for column in SCAN_COLUMNS[: place + 1])))
        for place, last in enumerate(SCAN_COLUMNS)
        if place > 0
    }


def digest_scan(*facts: Any) -> str:
    """Digest of a scan's first `SCAN_COLUMNS`."""
    return hashlib.sha256("\0".join(map(str, facts)).encode()).hexdigest()[:16]


def digest_cohort(scan_digests: Mapping[str, Sequence[str]], division_settings: Mapping[str, Any]) -> str:
    """Digest of a cohort's scans and of what divided them."""
    return digest_json({"scans": dict(scan_digests), "division": dict(division_settings)})


def _gather_images(cohort: pd.DataFrame, settings: PrepareSettings) -> Images:
    """Match the table with the archive and the volumes folder, where they are named, and look at the volumes."""
    sources: dict[str, Source] = {}
    duplicates: list[Duplicate] = []
    if settings.archive:
        store = open_store(settings.archive)
        sources = _match(cohort, store, settings.archive)
        duplicates += find_same_sources(sources) + find_same_files(sources, store)
    if not settings.volumes:
        return Images(sources, None, {}, duplicates)
    index = open_volumes(settings.volumes, settings.cache)
    looks = look_at_volumes(index, cohort["scan_id"])
    if not looks:
        raise UsageError(f"--volumes {settings.volumes}: no scan of the table is there; name the folder made from it")
    facts = read_facts(open_store(settings.volumes))
    return Images(sources, index, looks, duplicates + find_same_volumes(index.frame), facts)


def _match(cohort: pd.DataFrame, store: Store, archive: str) -> dict[str, Source]:
    sources = match_cohort(cohort, list_sources(store.list_objects()))
    if not sources:
        raise UsageError(
            f"--archive {archive}: no scan of the table is there; scan_id is a source's key in the archive"
        )
    return sources


def _list_features(cohort: pd.DataFrame, images: Images) -> tuple[list[Feature], list[str]]:
    scan_ids = cohort["scan_id"].tolist()
    features, unread = list_table_features(cohort)
    if images.sources:
        features += list_file_features(scan_ids, images.sources)
    if images.index is not None:
        listed = {feature.name for feature in features}  # what the archive's own listing says is of more scans
        facts = list_fact_features(scan_ids, images.facts)
        features += [feature for feature in facts if feature.name not in listed]
        features += list_image_features(scan_ids, images.looks)
    return features, unread


def _find_left_out(cohort: pd.DataFrame, settings: PrepareSettings, index: VolumesIndex | None) -> "pd.Series[str]":
    """Why each scan is not used, as a `LeftOut`, empty where it is; of volumes that are there, they decide that.

    Raises: UsageError if the volumes were divided by other settings than these.
    """
    reasons = find_left_out(cohort, settings.cohorts)
    if index is None:
        return reasons
    told = _describe_settings(settings)
    if index.division is not None and (differs := list_other_settings(told, index.division)):
        raise UsageError(
            f"--volumes {settings.volumes}: prepared with other settings ({', '.join(differs)}); audit with those"
        )
    is_there = cohort["scan_id"].isin(index.frame["scan_id"])
    reasons[~is_there & (reasons == "")] = LeftOut.NOT_IN_VOLUMES
    return reasons.mask(is_there, "")


def _divide(
    used: pd.DataFrame, settings: PrepareSettings, index: VolumesIndex | None
) -> tuple[pd.DataFrame | None, str]:
    """The division of the volumes where they are there, else that which jobs.prepare would make of these scans if all
    were usable; or why there is none."""
    if index is not None:
        given = index.frame.set_index("scan_id").loc[used["scan_id"]]
        return used.assign(cohort=given["cohort"].to_numpy(), fold=given["fold"].array), ""
    try:
        divided = divide_cohort(
            used,
            num_folds=settings.train.num_folds,
            seed=settings.cohorts.seed,
            division=settings.cohorts.division,
            test_fraction=settings.cohorts.test_fraction,
        )
    except UsageError as error:
        return None, str(error)
    return divided, ""


def _name_cohorts(cohort: pd.DataFrame, settings: PrepareSettings, index: VolumesIndex | None) -> str:
    """The table's column that makes the cohorts, or `patient`."""
    if index is not None and index.division is not None:
        return index.division.cohorts_by
    return name_own_cohorts(cohort, settings.cohorts.division) or "patient"


def _describe_settings(settings: PrepareSettings) -> dict[str, Any]:
    """What divided the table, its defaults resolved; the fingerprint is of this and of nothing else."""
    train = settings.train.model_dump(mode="json", include={"num_folds"})
    described = {"cohorts": settings.cohorts.resolved.model_dump(mode="json"), "train": train}
    return described | {"sha256": digest_json(described)}


def _merge_division(cohort: pd.DataFrame, divided: pd.DataFrame | None) -> pd.DataFrame:
    """The whole table, in its order, with the cohort and fold each scan was given, if it was."""
    if divided is None:
        return cohort.assign(cohort="", fold=pd.array([None] * len(cohort), dtype="Int64"))
    given = divided.set_index("scan_id").reindex(cohort["scan_id"])
    return cohort.assign(cohort=given["cohort"].fillna("").to_numpy(), fold=given["fold"].array)


def _merge_duplicates(duplicates: Sequence[Duplicate]) -> list[tuple[list[str], list[str]]]:
    """Scans that are one and the ways that was seen: what is the same as the same is the same, too."""
    merged: list[tuple[set[str], list[str]]] = []
    for item in duplicates:
        scan_ids, ways = set(item.scan_ids), [item.by]
        for group in [group for group in merged if not scan_ids.isdisjoint(group[0])]:
            merged.remove(group)
            scan_ids, ways = scan_ids | group[0], group[1] + ways
        merged.append((scan_ids, list(dict.fromkeys(ways))))
    return [(sorted(scan_ids), ways) for scan_ids, ways in merged]


def _count_orders(looks: Mapping[str, Look], cohort: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Verdict -> diagnosis -> scans; empty where no volume was looked at."""
    if not looks:
        return {}
    diagnosis = dict(zip(cohort["scan_id"], cohort["diagnosis"], strict=True))
    counted = Counter((str(look.order.order), diagnosis[scan_id]) for scan_id, look in looks.items())
    return {str(order): {label: counted[str(order), label] for label in LABELS} for order in SliceOrder}


def _list_order_findings(looks: Mapping[str, Look], cohort: pd.DataFrame) -> list[OrderFinding]:
    told = cohort["order_defect"] if "order_defect" in cohort else pd.Series("", cohort.index)
    rows = zip(cohort["scan_id"], cohort["diagnosis"], told, strict=True)
    suspicious = (SliceOrder.FEET_FIRST, SliceOrder.SHUFFLED)
    return [
        OrderFinding(scan_id, diagnosis, str(looks[scan_id].order.order), defect)
        for scan_id, diagnosis, defect in rows
        if scan_id in looks and looks[scan_id].order.order in suspicious
    ]
