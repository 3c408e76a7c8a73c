"""An audit in; the files a colleague reads before training out: audit.html, audit.json, division.csv, excluded.csv."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from darnet.auditing.audit import Audit, CohortCounts, summarise_audit
from darnet.auditing.shortcuts import Shortcut
from darnet.cohort import NEEDED_COLUMNS, LeftOut
from darnet.errors import UsageError
from darnet.page import COLOURS, Bar, Cell, HtmlTable, Section, render_page
from darnet.reading.slice_order import SliceOrder
from darnet.scan import LABELS
from darnet.storage import open_store

STRONG_FROM = 0.6  # lower bound of an AUC from which a sentence, not a table row alone, tells of a shortcut
MAX_ROWS = 60
CHANCE_COLOUR = "#b0b7bf"
WORDS = {
    "border_zero_share": "black border",
    "border_mean": "border brightness",
    "border_histogram": "border histogram",
    "zero_share": "black voxels",
    "bytes_per_file": "bytes per file",
    "file_format": "file format",
    "image_size": "image size",
    "num_files": "number of files",
    "num_slices": "number of slices",
    "pixel_spacing_mm": "pixel spacing",
    "slice_spacing_mm": "slice spacing",
}
DIRECTION_WORDS = {"higher": "higher in", "lower": "lower in", "fitted": "fitted for"}
IMAGE_WORDS = (
    "The border is the outermost 1/32 of each slice of the standard volume, where no lung is: black border and black"
    " voxels are the shares of border and of all voxels that are exactly 0, as where the surroundings of the lungs were"
    " blackened; border brightness is a mean, border histogram all values in 16 bins."
)
COHORT_WORDS = {
    "patient": "dealt on patient level",
    "cohort": "by the table's column cohort",
    "paper_cohort": "by the table's column paper_cohort, as the paper has them",
}


def write_audit(audit: Audit, out: str) -> dict[str, Any]:
    """Write the audit to a folder or prefix, and say on stderr what it did not look at; a summary for schedulers."""
    store = open_store(out, create=True)
    summary = summarise_audit(audit) | {"told": _summarise(audit)}
    store.write_bytes("audit.json", (json.dumps(summary, indent=2) + "\n").encode())
    store.write_bytes("audit.html", render_audit(audit).encode())
    if audit.division is None:
        store.delete("division.csv")  # an earlier audit's is no record of this one
    else:
        store.write_bytes("division.csv", audit.division_frame.to_csv(index=False).encode())
    is_left_out = audit.reasons != ""
    excluded = audit.division_frame.loc[is_left_out, list(NEEDED_COLUMNS)].assign(status=audit.reasons[is_left_out])
    excluded = excluded.assign(detail=[LeftOut(status).detail for status in excluded["status"]])
    store.write_bytes("excluded.csv", excluded.to_csv(index=False).encode())
    if audit.not_looked_at:
        print(_tell_unseen(audit), file=sys.stderr)
    told = ("counts", "test_patients", "patients_in_both_cohorts", "test_scans_of_those")
    strong = [item.feature for item in audit.shortcuts if is_strong(item)]
    return {
        "audit": f"{store.uri}/audit.html",
        **{name: summary[name] for name in told},
        "strong_shortcuts": sorted(set(strong)),
        "duplicates": len(audit.duplicates),
        "order_findings": len(audit.order_findings),
    }


def describe_audit(summary: Mapping[str, Any]) -> Section:
    """What audit.json says, for the report of a model that was trained on the cohort: the page's own first words.

    Raises: UsageError if it is none of this version's.
    """
    try:
        strong = [item for item in (Shortcut(**fields) for fields in summary["shortcuts"]) if is_strong(item)]
        text = f"By {summary['table']}. {summary['told']}"
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"audit.json: not written by this version ({error}); run jobs.prepare --audit again") from None
    return Section("The audit of the data", text, [_tabulate_shortcuts(strong)] if strong else [])


def is_strong(shortcut: Shortcut) -> bool:
    """Whether a shortcut is worth a sentence: no chance finding, and more than a hint."""
    return shortcut.is_beyond_chance and shortcut.low >= STRONG_FROM


def render_audit(audit: Audit) -> str:
    """The page."""
    sections = [
        _describe_cohorts(audit),
        _describe_leak(audit),
        _describe_division(audit),
        *_describe_findings(audit),
        _describe_shortcuts(audit),
        *_describe_duplicates(audit),
        *_describe_order(audit),
        _describe_limits(audit),
    ]
    return render_page(f"Cohort audit: {audit.name}", _summarise(audit), sections)


def _summarise(audit: Audit) -> str:
    """What matters most, in a few sentences."""
    sentences = [f"{audit.num_scans} scans of {audit.num_patients} patients. {_tell_leaks(audit)}"]
    strong: dict[str, Shortcut] = {}
    for item in audit.shortcuts:
        if is_strong(item):
            strong.setdefault(item.feature, item)
    if strong:
        told = "; ".join(f"{_name(item)} tells {item.diagnosis} with {_tell_auc(item)}" for item in strong.values())
        sentences.append(f"A network can pass without looking at lungs: {told}.")
    elif audit.shortcuts:
        sentences.append("No property of the scans that was looked at is a strong shortcut to the diagnosis.")
    if audit.duplicates:
        sentences.append(f"{_count(len(audit.duplicates), 'group')} of scans that are one and the same.")
    if audit.order_findings:
        sentences.append(f"{_count(len(audit.order_findings), 'scan')} with slices out of order, by the images.")
    if audit.not_looked_at:
        sentences.append(_tell_unseen(audit))
    return "\n\n".join(sentences)


def _tell_unseen(audit: Audit) -> str:
    *others, last = audit.not_looked_at
    return f"{', '.join(others).capitalize()} and {last} were not looked at: give --volumes."


def _tell_leaks(audit: Audit) -> str:
    """Who is in both of the printed cohorts, and in both of those that the settings make where these are others."""
    told = f"Cohorts {COHORT_WORDS[audit.cohorts.by]}: {_tell_leak(audit.cohorts)}"
    if audit.division is None or audit.division == audit.cohorts:
        return told
    return f"{told} As these settings divide, cohorts {COHORT_WORDS[audit.division.by]}: {_tell_leak(audit.division)}"


def _tell_leak(cohorts: CohortCounts) -> str:
    if cohorts.patients_in_both_cohorts == 0:
        return "No patient is in both cohorts."
    return (
        f"{cohorts.patients_in_both_cohorts} of the {cohorts.test_patients} test patients "
        f"({cohorts.test_scans_of_those} of {cohorts.test_scans} test scans) also have scans in the training cohort."
    )


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _name(item: Shortcut) -> str:
    return WORDS.get(item.feature, item.feature)


def _tell_auc(item: Shortcut) -> str:
    return f"an AUC of {item.auc:.2f} ({item.low:.2f} to {item.high:.2f})"


def _tabulate_counts(cohorts: CohortCounts, caption: str) -> HtmlTable:
    patients = {"train": cohorts.train_patients, "test": cohorts.test_patients}
    rows: list[list[Cell]] = [
        [name, *row.values(), sum(row.values()), patients[name]] for name, row in cohorts.counts.items()
    ]
    return HtmlTable(["cohort", *LABELS, "all scans", "patients"], rows, caption)


def _describe_cohorts(audit: Audit) -> Section:
    table = _tabulate_counts(audit.cohorts, "Scans by cohort and diagnosis (the form of the paper's Table 1)")
    return Section("The cohorts", f"Cohorts {COHORT_WORDS[audit.cohorts.by]}.", [table])


def _describe_leak(audit: Audit) -> Section:
    told = _tell_leaks(audit)
    if audit.cohorts.patients_in_both_cohorts:
        told += (
            " A network may know the anatomy, scanner and course of patients in both cohorts; what it scores on them is"
            " no evidence of how it does on new ones. Numbers from such cohorts must say so."
        )
    several = audit.patients_of_several_diagnoses
    if several:
        told += f"\n\n{_count(several, 'patient')} with scans of more than one diagnosis: a course, or a wrong label."
    return Section("Patients in both cohorts", told)


def _describe_division(audit: Audit) -> Section:
    title = "The division of these settings"
    left_out = "; ".join(f"{number} as {reason}" for reason, number in audit.left_out.items())
    told = [f"Left out before dividing: {left_out}." if left_out else "No scan is left out before dividing."]
    if audit.reversed_scans:
        is_turned = audit.division_settings["cohorts"]["turn_reversed"]
        done = "turned when prepared" if is_turned else "used so (cohorts.turn_reversed is false)"
        told.append(f"Scans known to be stored in reverse, and {done}: {audit.reversed_scans}.")
    told.append(f"SHA-256 of the settings that divide: {audit.division_settings['sha256']}.")
    if audit.division is None:
        return Section(title, "\n\n".join([*told, f"These settings cannot divide the cohort: {audit.division_fault}."]))
    told.append(f"Cohorts {COHORT_WORDS[audit.division.by]}. {_tell_leak(audit.division)} No patient is in two folds.")
    train = audit.division_frame[audit.division_frame["cohort"] == "train"]
    folds: list[list[Cell]] = [
        [f"fold {fold}", *(int((rows["diagnosis"] == label).sum()) for label in LABELS), len(rows)]
        for fold, rows in train.groupby("fold")
    ]
    told.append(
        "division.csv is the whole table with every scan's cohort and fold; given as --cohort, it is divided the same"
        " again. excluded.csv says why a scan is left out."
    )
    tables = [
        _tabulate_counts(audit.division, "Scans by cohort and diagnosis"),
        HtmlTable(["training fold", *LABELS, "all scans"], folds, "Scans by training fold"),
    ]
    return Section(title, "\n\n".join(told), tables)


def _describe_findings(audit: Audit) -> list[Section]:
    """What the table itself says of its scans' quality; no section where it says nothing."""
    if not audit.findings:
        return []
    rows = [[name, *(_tell_share(counts[label]) for label in LABELS)] for name, counts in audit.findings.items()]
    table = HtmlTable(["finding", *LABELS], rows, "Scans that have the finding, of those where it is known")
    return [Section("What the table says of its scans", "A finding common in one diagnosis is a shortcut.", [table])]


def _tell_share(counts: dict[str, int]) -> str:
    if counts["known"] == 0:
        return "not known"
    return f"{counts['found']} of {counts['known']} ({counts['found'] / counts['known']:.0%})"


def _describe_shortcuts(audit: Audit) -> Section:
    title = "Shortcuts: what tells the diagnosis without the lungs"
    if not audit.shortcuts:
        return Section(title, "Nothing but identifiers and diagnoses was there to look at.")
    text = (
        "Each property alone is asked to tell one diagnosis from the two others. An AUC of 0.5 is a coin, 1 is"
        " certain; it is of the better direction (higher or lower values in that diagnosis). Categories and histograms"
        " are scored by a ridge regression fitted on other patients (fitted), where less than 0.5 means that what was"
        " fitted did not hold; so are numbers, by value or in ten parts of equal size, where that tells surely more."
        " Intervals hold with 95% confidence and count patients, not scans. Beyond chance are those that luck would not"
        " have brought once among all comparisons, with the same confidence: a dozen properties of a few scans always"
        " show something."
    )
    if any(item.origin == "images" for item in audit.shortcuts):
        text += f"\n\n{IMAGE_WORDS}"
    if audit.unread_columns:
        text += f"\n\nNot looked at, being neither numbers nor a category: {', '.join(audit.unread_columns)}."
    return Section(title, text, [_tabulate_shortcuts(audit.shortcuts)])


def _tabulate_shortcuts(shortcuts: Sequence[Shortcut]) -> HtmlTable:
    """The strongest first, each with a bar from 0.5; the scale begins where the lowest interval does."""
    shown = shortcuts[:MAX_ROWS]
    floor = min(0.5, *(item.low for item in shown))
    header = ["property", "tells", "AUC from 0.5", "AUC", "95% interval", "beyond chance", "from", "scans", "patients"]
    caption = "Properties by strength, those beyond chance first"
    if len(shortcuts) > MAX_ROWS:
        caption += f": the strongest {MAX_ROWS} of {len(shortcuts)}, all in audit.json"
    caption += f". Bars show the AUC from 0.5 (upright line), on a scale from {floor:.2f} to 1, lines its 95% interval."
    legend = [*zip(COLOURS, LABELS, strict=False), (CHANCE_COLOUR, "may be chance")]
    return HtmlTable(header, [_tell_shortcut(item, floor) for item in shown], caption, legend)


def _tell_shortcut(item: Shortcut, floor: float) -> list[Cell]:
    tells = f"{DIRECTION_WORDS[item.direction]} {item.diagnosis}"
    numbers = [f"{item.auc:.3f}", f"{item.low:.3f} to {item.high:.3f}", "yes" if item.is_beyond_chance else "no"]
    return [_name(item), tells, _draw_bar(item, floor), *numbers, item.origin, item.num_scans, item.num_patients]


def _draw_bar(item: Shortcut, floor: float) -> Bar:
    """Coloured by diagnosis; grey where it may be chance."""
    baseline, value, low, high = ((auc - floor) / (1 - floor) for auc in (0.5, item.auc, item.low, item.high))
    colour = dict(zip(LABELS, COLOURS, strict=False))[item.diagnosis]
    return Bar(baseline, value, low, high, colour if item.is_beyond_chance else CHANCE_COLOUR)


def _describe_duplicates(audit: Audit) -> list[Section]:
    """No section where no image was looked at."""
    if len(audit.looked_at) == 1:
        return []
    title = "The same scan more than once"
    if not audit.duplicates:
        ways = " or the same standard volume" if "volumes" in audit.looked_at else ""
        return [Section(title, f"No two scans have the same files{ways}.")]
    names = ("diagnoses", "cohorts", "patients")
    across = {name: sum(len(item[name]) > 1 for item in audit.duplicates) for name in names}
    text = (
        f"{_count(len(audit.duplicates), 'group')} of scans that are one and the same: {across['patients']} under"
        f" several patients, {across['diagnoses']} under several diagnoses, {across['cohorts']} in both cohorts of the"
        " division above. Keep one scan of each."
    )
    rows = [
        [
            ", ".join(item["scan_ids"]),
            ", ".join(item["by"]),
            *(", ".join(item[name]) for name in ("patients", *names[:2])),
        ]
        for item in audit.duplicates[:MAX_ROWS]
    ]
    header = ["scans", "seen by their", "patients", "diagnoses", "cohorts"]
    caption = "Scans that are the same" + (f"; the first {MAX_ROWS}" if len(audit.duplicates) > MAX_ROWS else "")
    return [Section(title, text, [HtmlTable(header, rows, caption)])]


def _describe_order(audit: Audit) -> list[Section]:
    """No section where no volume was looked at."""
    if not audit.order_counts:
        return []
    is_turned = audit.division_settings["cohorts"]["turn_reversed"]
    told = (
        "Prepared volumes should be head first, those turned on purpose included."
        if is_turned
        else f"{_count(audit.reversed_scans, 'scan')}, by the table reversed, lie as they are stored (turn_reversed)."
    )
    text = (
        "Told from the standard volumes alone: lungs begin as small discs and end as wide crescents, and a slice is"
        f" most like its neighbours. {told}"
        f" Not judged: {_count(sum(audit.order_counts[SliceOrder.NOT_JUDGED].values()), 'scan')}."
    )
    counts: list[list[Cell]] = [[order, *row.values()] for order, row in audit.order_counts.items()]
    tables = [HtmlTable(["order", *LABELS], counts, "Scans by the order of their slices")]
    if audit.order_findings:
        rows = [[cell or None for cell in asdict(item).values()] for item in audit.order_findings[:MAX_ROWS]]
        caption = "Scans whose slices are not head first"
        caption += f"; the first {MAX_ROWS}" if len(audit.order_findings) > MAX_ROWS else ""
        tables.append(HtmlTable(["scan", "diagnosis", "by its images", "by the table"], rows, caption))
    return [Section("Order of slices", text, tables)]


def _describe_limits(audit: Audit) -> Section:
    text = f"Looked at: {', '.join(audit.looked_at)}."
    if audit.not_looked_at:
        text += f" {_tell_unseen(audit)}"
    text += (
        "\n\nA property that tells the diagnosis is not always a fault: an older cohort has other scanners and other"
        " diseases. It is a reason to test on scans where it is alike in all diagnoses. That no shortcut was found does"
        " not say that there is none."
    )
    return Section("What this audit looked at", text)
