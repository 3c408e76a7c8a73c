"""A check's outcome: something to try goes in; a finding with what was seen and what to do comes out."""

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, TypeAlias

from darnet.errors import ExitCode, RunError, ScanError, name_defect, print_defect
from darnet.terminal import print_table


class Verdict(StrEnum):
    """How a check ended: fit for a night, fit with a reservation, unfit, or not tried because of an earlier one."""

    FINE = "fine"
    MIND = "mind"
    WRONG = "wrong"
    UNTRIED = "untried"


@dataclass(frozen=True)
class Finding:
    """One line for the operator; `remedy` says what to do and is empty where all is fine."""

    check: str
    verdict: Verdict
    told: str
    remedy: str = ""
    exit_code: ExitCode = ExitCode.DONE


class CheckError(Exception):
    """A check's own objection: what was seen, what to do, and whether a night could still be trusted."""

    def __init__(
        self,
        told: str,
        remedy: str,
        verdict: Verdict = Verdict.WRONG,
        exit_code: ExitCode = ExitCode.FAILED,
    ) -> None:
        super().__init__(told)
        self.remedy = remedy
        self.verdict = verdict
        self.exit_code = exit_code if verdict is Verdict.WRONG else ExitCode.DONE


Check: TypeAlias = tuple[str, Callable[[], str]]
"""A check's name, and what tries it: returns what was seen, or raises CheckError, RunError or ScanError."""

DEFECT_REMEDY = (
    "try again; if it stays, show whoever looks after this program the traceback, which is on stderr here, and of "
    "another machine in Ray's logs there"
)


def examine(checks: Sequence[Check]) -> list[Finding]:
    """Try the checks in order. The first of a group that is wrong leaves the rest of it untried: they build on it."""
    findings: list[Finding] = []
    for name, look in checks:
        if findings and findings[-1].verdict in (Verdict.WRONG, Verdict.UNTRIED):
            findings.append(Finding(name, Verdict.UNTRIED, "not tried: it builds on the line above"))
        else:
            findings.append(_look(name, look))
    return findings


def _look(name: str, look: Callable[[], str]) -> Finding:
    """A check that ends in an error of any kind is a line too: else all other lines would stay untold."""
    try:
        return Finding(name, Verdict.FINE, look())
    except CheckError as error:
        return Finding(name, error.verdict, str(error), error.remedy, error.exit_code)
    except RunError as error:
        told, _, remedy = str(error).partition("; ")
        return Finding(name, Verdict.WRONG, told, remedy, error.exit_code)
    except ScanError as error:
        return Finding(name, Verdict.WRONG, str(error), "look at that object and at the store's log", ExitCode.FAILED)
    except Exception as error:  # its text may hold a header's words
        print_defect(error)
        return Finding(name, Verdict.WRONG, f"unexpected {name_defect(error)}", DEFECT_REMEDY, ExitCode.FAILED)


class UnfitError(RunError):
    """Something a night needs is wrong; the exit code is that of the first such finding."""

    def __init__(self, wrong: Finding, facts: Mapping[str, Any]) -> None:
        super().__init__(f"{wrong.check}: {wrong.told}; {wrong.remedy}")
        self.exit_code = wrong.exit_code
        self.facts = facts


def report_findings(findings: Sequence[Finding]) -> dict[str, Any]:
    """Print a line a check, with what to do, and one of all of them; counts and findings for the summary.

    Raises: UnfitError if one is wrong.
    """
    rows = [[finding.verdict.value, finding.check, finding.told, finding.remedy] for finding in findings]
    print_table("Fit for a night?", ["", "check", "what was seen", "what to do"], rows)
    counts = Counter(finding.verdict.value for finding in findings)
    print(sum_up(counts), file=sys.stderr)
    facts = {"checks": len(findings), "verdicts": dict(counts), "findings": [asdict(item) for item in findings]}
    for finding in findings:
        if finding.verdict is Verdict.WRONG:
            raise UnfitError(finding, facts)
    return facts


def sum_up(counts: Mapping[str, int]) -> str:
    """Whether a night may be trusted to this, and how many lines leave that open, of the counts by verdict."""
    words = {Verdict.WRONG: "wrong", Verdict.UNTRIED: "not tried", Verdict.MIND: "to mind"}
    told = [f"{num} {word}" for verdict, word in words.items() if (num := counts.get(verdict.value, 0))]
    if counts.get(Verdict.WRONG.value):
        return f"Not fit for a night; lines: {', '.join(told)}."
    return f"Fit for a night, but for lines: {', '.join(told)}." if told else "Fit for a night."
