"""An audit that lies somewhere, for the report of a model trained on the cohort: its bytes enter, what it says leaves.

It is believed only of the cohort that it was made of: audit.json keeps digests of each scan with diagnosis, patient,
cohort and fold, and of all of them together with the settings that divided them.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from darnet.auditing.audit import SCAN_COLUMNS, digest_cohort, digest_scan
from darnet.auditing.report import describe_audit
from darnet.cohort import Division, list_other_settings
from darnet.errors import UsageError
from darnet.page import Section

AUDIT_FILE = "audit.json"


@dataclass(frozen=True)
class AuditRecord:
    """What audit.json says, where it lies, and the digest of its bytes."""

    place: str
    sha256: str
    summary: Mapping[str, Any]

    def describe(self) -> Section:
        """The page's own first words."""
        return describe_audit(self.summary)

    def check(self, of: str, scans: Sequence[Sequence[Any]], division: Division | None = None) -> None:
        """Hold the audit against the scans that are evaluated, and their division if it is known.

        Of each scan as many of `SCAN_COLUMNS` as are known. Cohort and fold should be given where the table brought
        them: those that were dealt may move where a scan could not be prepared, and leak no patient.
        Raises: UsageError naming both, and a scan that the audit has not, or the settings that differ.
        """
        for num_known, last in enumerate(SCAN_COLUMNS[1:], start=2):
            known = set(self.summary["scan_digests"][last])
            lacking = [item for item in scans if len(item) >= num_known and digest_scan(*item[:num_known]) not in known]
            if lacking:
                more = f" ({len(lacking) - 1} more scans like it)" if len(lacking) > 1 else ""
                raise UsageError(
                    f"{self.place}: of another cohort than {of}: it has no scan {_name_scan(lacking[0][:num_known])}"
                    f"{more}; name the audit of this cohort, or make one"
                )
        if division is not None and (differs := list_other_settings(self.summary["division_settings"], division)):
            raise UsageError(
                f"{self.place}: its cohort was divided otherwise than {of} ({', '.join(differs)}); run jobs.prepare "
                "--audit with the settings of the volumes"
            )


def _name_scan(facts: Sequence[Any]) -> str:
    """A scan by what is known of it, the patient unnamed."""
    scan_id, diagnosis, *further = facts
    words = (
        "of the same patient",
        *(f"in {column} {value}" for column, value in zip(SCAN_COLUMNS[3:], further[1:], strict=False)),
    )
    return " ".join([f"{scan_id!r} with {diagnosis}", *words[: len(further)]])


def read_audit(place: str, data: bytes) -> AuditRecord:
    """Read audit.json.

    Raises: UsageError if it is damaged, edited, or none of this version's.
    """
    try:
        summary = json.loads(data)
        digest = digest_cohort(summary["scan_digests"], summary["division_settings"])
        is_whole = bool(digest == summary["cohort_sha256"])
        describe_audit(summary)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{place}: damaged, or not written by this version ({error}); run jobs.prepare --audit again"
        ) from error
    if not is_whole:
        raise UsageError(f"{place}: its scans are not those of its digest; run jobs.prepare --audit again")
    return AuditRecord(place, hashlib.sha256(data).hexdigest(), summary)
