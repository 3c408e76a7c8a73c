"""A check-up's lines: what follows a wrong one is not tried, and the exit code is that of the first wrong one."""

import pytest

from darnet.checkup.findings import CheckError, Finding, UnfitError, Verdict, examine, report_findings, sum_up
from darnet.errors import CredentialsError, ExitCode, ScanError, Status


def _raise(error: Exception) -> str:
    raise error


def test_what_builds_on_a_wrong_line_is_not_tried() -> None:
    tried = []
    findings = examine(
        [
            ("one", lambda: "seen"),
            ("two", lambda: _raise(CheckError("odd", "do this"))),
            ("three", lambda: tried.append(3) or "seen"),  # type: ignore[func-returns-value]
            ("four", lambda: tried.append(4) or "seen"),  # type: ignore[func-returns-value]
        ]
    )
    assert [item.verdict for item in findings] == [Verdict.FINE, Verdict.WRONG, Verdict.UNTRIED, Verdict.UNTRIED]
    assert (findings[1].told, findings[1].remedy, tried) == ("odd", "do this", [])


def test_a_reservation_stops_nothing() -> None:
    findings = examine(
        [
            ("one", lambda: _raise(CheckError("slow", "buy more", Verdict.MIND))),
            ("two", lambda: "seen"),
        ]
    )
    assert [item.verdict for item in findings] == [Verdict.MIND, Verdict.FINE]
    assert report_findings(findings)["verdicts"] == {"mind": 1, "fine": 1}


def test_the_exit_code_is_that_of_the_first_wrong_line() -> None:
    refused = CredentialsError("s3://a: the store does not let us in (403); check AWS_PROFILE")
    findings = examine([("one", lambda: _raise(refused))])
    findings += examine([("two", lambda: _raise(ScanError(Status.ERR_STORAGE, "odd")))])
    assert findings[0] == Finding(
        "one",
        Verdict.WRONG,
        "s3://a: the store does not let us in (403)",
        "check AWS_PROFILE",
        ExitCode.CREDENTIALS,
    )
    with pytest.raises(UnfitError, match="check AWS_PROFILE") as caught:
        report_findings(findings)
    assert caught.value.exit_code is ExitCode.CREDENTIALS
    assert caught.value.facts["verdicts"] == {"wrong": 2}


def test_an_error_that_nobody_expected_is_a_line_and_its_text_is_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    error = KeyError("Doe^John")
    findings = examine([("one", lambda: _raise(error)), ("two", lambda: "seen")])
    findings += examine([("three", lambda: "seen")])
    assert [item.verdict for item in findings] == [Verdict.WRONG, Verdict.UNTRIED, Verdict.FINE]
    assert findings[0].told.startswith("unexpected KeyError at ")
    assert "traceback" in findings[0].remedy
    with pytest.raises(UnfitError, match="one: unexpected KeyError") as caught:
        report_findings(findings)
    assert caught.value.exit_code is ExitCode.FAILED
    told = capsys.readouterr().err
    assert "Traceback (most recent call last)" in told
    assert "Doe" not in told + str(findings)


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        ({"fine": 30}, "Fit for a night."),
        ({"fine": 28, "untried": 1, "mind": 2}, "Fit for a night, but for lines: 1 not tried, 2 to mind."),
        ({"fine": 29, "mind": 1}, "Fit for a night, but for lines: 1 to mind."),
        ({"wrong": 1, "untried": 3}, "Not fit for a night; lines: 1 wrong, 3 not tried."),
    ],
)
def test_the_last_line_tells_what_was_left_open(counts: dict[str, int], told: str) -> None:
    assert sum_up(counts) == told


def test_the_last_line_counts_the_findings(capsys: pytest.CaptureFixture[str]) -> None:
    verdicts = [Verdict.FINE, Verdict.UNTRIED, Verdict.MIND, Verdict.UNTRIED]
    report_findings([Finding("one", verdict, "seen") for verdict in verdicts])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "Fit for a night, but for lines: 2 not tried, 1 to mind."
