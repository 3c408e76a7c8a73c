"""README and docs keep their promises: what they say to analysts runs as it stands, and what they name is there."""

import json
import re
import shlex
from collections.abc import Iterator
from typing import Any

import duckdb
import pandas as pd
import pytest

import darnet.settings
from darnet.errors import UsageError
from darnet.results import LATEST_SQL, describe_schema
from darnet.settings import Settings, read_settings
from darnet.storage import Store
from tests.iam import is_allowed
from tests.places import ROOT
from tests.results_fixtures import make_row, publish_rows

DOCUMENTS = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
README, PANDAS, HOUSE = (DOCUMENTS[ROOT / name] for name in ("README.md", "docs/pandas.md", "docs/house.md"))
SQL = re.findall(r"```sql\n(.*?)```", README, re.DOTALL)
POLICIES: list[dict[str, Any]] = [json.loads(text) for text in re.findall(r"```json\n(.*?)```", README, re.DOTALL)]
PYTHON = re.findall(r"```python\n(.*?)```", PANDAS, re.DOTALL)
DAY_1, DAY_2 = pd.Timestamp(2030, 1, 1), pd.Timestamp(2030, 1, 2)
SCAN = "ct/0001#0a1b2c3d"

# Both answers to each question, in the documents' order, worked out by hand from `publish_two_nights`.
ANSWERS: dict[str, list[tuple[Any, ...]]] = {
    "As of a date": [
        (SCAN, "ERR_TIMEOUT", None),
        ("ct/0002", "OK", "NCP"),
        ("ct/0003", "OK", "CP"),
        ("ct/0004", "BAD_TILT", None),
    ],
    "As of a commit": [
        (SCAN, "ERR_TIMEOUT", None),
        ("ct/0002", "OK", "NCP"),
        ("ct/0003", "OK", "CP"),
        ("ct/0004", "BAD_TILT", None),
    ],
    "The history of one scan": [
        (DAY_1, "ERR_TIMEOUT", "what happened", "1", None, None),
        (DAY_2, "OK", "", "2", "NCP", 0.7),
    ],
    "Agreement between model versions": [("1", "2", 2, 0.5, 0.25)],
    "Positives per night": [(DAY_1, 2, 1, 0.5), (DAY_2, 3, 3, 1.0)],
    "Scans that failed, and why": [
        ("ct/0004", "BAD_TILT", "what happened", DAY_1),
        ("ct/0005", "ERR_STORAGE", "what happened", DAY_2),
    ],
}


def publish_two_nights(store: Store) -> None:
    """Night one under model version 1; night two under version 2, which scores three scans, and one source is new."""
    cp = {"prediction": "CP", "probability_cp": 0.6, "probability_ncp": 0.2, "probability_normal": 0.2}
    first = [
        make_row(SCAN, "ERR_TIMEOUT"),
        make_row("ct/0002"),
        make_row("ct/0003", **cp),
        make_row("ct/0004", "BAD_TILT"),
    ]
    publish_rows(store, "one", *first)
    new = {"night": 2, "model_version": "2", "model_sha256": "n" * 64}
    second = [make_row(name, **new) for name in (SCAN, "ct/0002", "ct/0003")]
    publish_rows(store, "two", *second, make_row("ct/0005", "ERR_STORAGE", **new))


def list_answer(frame: pd.DataFrame) -> list[tuple[Any, ...]]:
    """Rows as tuples, dates and nulls spelled one way."""
    if "night" in frame:
        frame = frame.assign(night=pd.to_datetime(frame["night"]))
    return [tuple(None if pd.isna(cell) else cell for cell in row) for row in frame.itertuples(index=False, name=None)]


def assert_answers(given: list[tuple[Any, ...]], expected: list[tuple[Any, ...]]) -> None:
    assert len(given) == len(expected)
    for row, expected_row in zip(given, expected, strict=True):
        for cell, expected_cell in zip(row, expected_row, strict=True):
            is_number = isinstance(expected_cell, float)
            assert cell == (pytest.approx(expected_cell) if is_number else expected_cell)


def test_each_question_is_answered_in_sql_and_pandas() -> None:
    assert len(SQL) == len(PYTHON) == len(ANSWERS) + 1
    for text in (README, PANDAS):
        assert re.findall(r"^\*\*([^*]+?)\.?\*\*", text[text.index("**As of") :], re.M) == list(ANSWERS)


def test_the_sql_of_the_latest_is_the_tested_one_to_the_letter() -> None:
    """`tests/test_results.py` holds it against `read_predictions`."""
    assert SQL[0] == LATEST_SQL


def test_the_sql_of_the_readme_answers_as_a_hand_does(local: Store) -> None:
    publish_two_nights(local)
    with duckdb.connect() as connection:
        connection.execute(SQL[0].replace("RESULTS", local.uri))
        scans = connection.sql("SELECT scan_id FROM latest()").fetchall()
        assert scans == [(name,) for name in (SCAN, "ct/0002", "ct/0003", "ct/0004", "ct/0005")]
        for query, expected in zip(SQL[1:], ANSWERS.values(), strict=True):
            assert_answers(list_answer(connection.sql(query).df()), expected)


def test_the_pandas_of_the_documents_answers_as_a_hand_does(local: Store) -> None:
    publish_two_nights(local)
    names: dict[str, Any] = {}
    exec(PYTHON[0].replace("s3://hospital/darnet", local.uri), names)
    assert list(names["latest"]["scan_id"]) == [SCAN, "ct/0002", "ct/0003", "ct/0004", "ct/0005"]
    assert len(names["everything"]) == 8
    for code, expected in zip(PYTHON[1:], ANSWERS.values(), strict=True):
        exec(code.replace("s3://hospital/darnet", local.uri), names)
        assert_answers(list_answer(names["answer"]), expected)


def test_each_role_may_do_no_more_than_it_must() -> None:
    scorer, cleaner, analyst, _ = (_list_rights(policy) for policy in POLICIES)
    table, work = "hospital/darnet/predictions/*", "hospital/darnet/_runs/*"
    assert {place for right, place, _ in scorer if right == "s3:PutObject"} == {table, work}
    assert {place for role in (scorer, cleaner) for right, place, _ in role if right == "s3:DeleteObject"} == {work}
    assert {right for right, _, _ in analyst} == {"s3:ListBucket", "s3:GetObject"}
    assert ("s3:GetObject", table, "") in analyst
    assert [terms for right, place, terms in scorer if (right, place) == ("s3:PutObject", table)] == [
        '{"Null": {"s3:if-none-match": "false"}}'  # the key is there, so the put is conditional
    ]


ARCHIVE, MODEL, MISTYPED = ("hospital", "ct/a/1.dcm"), ("models", "darnet-1/manifest.json"), ("models", "dranet-1/m")
NIGHT, PART = ("hospital", "darnet/predictions/c00000001.parquet"), ("hospital", "darnet/_runs/one/parts/a.parquet")
PLACES = [ARCHIVE, MODEL, MISTYPED, NIGHT, PART]
NEEDS = {  # right: places of scorer, cleaner and analyst
    "List": ([ARCHIVE, MODEL, MISTYPED, NIGHT, PART], [NIGHT, PART], [NIGHT]),
    "Get": ([ARCHIVE, MODEL, NIGHT, PART], [NIGHT, PART], [NIGHT]),
    "Put": ([PART], [], []),
    "Put if absent": ([NIGHT, PART], [], []),
    "Delete": ([PART], [PART], []),
}


def test_each_role_may_do_what_its_jobs_do_and_nothing_else() -> None:
    """Every right on every place, so that a right too few is found as one too many is."""
    for right, needs in NEEDS.items():
        for policy, needed in zip(POLICIES, needs, strict=False):  # the last is of EC2
            assert [place for place in PLACES if _may(policy, right, *place)] == needed, right


def _may(policy: dict[str, Any], right: str, bucket: str, key: str) -> bool:
    """Listings are of a key's prefix, as jobs ask for one."""
    if right == "List":
        return is_allowed(policy, "s3:ListBucket", f"arn:aws:s3:::{bucket}", {"s3:prefix": key})
    terms = {"s3:if-none-match": "*"} if right == "Put if absent" else {}
    return is_allowed(policy, f"s3:{right.split()[0]}Object", f"arn:aws:s3:::{bucket}/{key}", terms)


def _list_rights(policy: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Each action with each place and the terms it is allowed under."""
    rights = []
    for statement in policy["Statement"]:
        assert statement["Effect"] == "Allow"
        actions, places = (
            [value] if isinstance(value, str) else value for value in (statement["Action"], statement["Resource"])
        )
        terms = json.dumps(statement["Condition"]) if "Condition" in statement else ""
        rights += [(action, place.removeprefix("arn:aws:s3:::"), terms) for action in actions for place in places]
    return rights


def list_commands() -> Iterator[tuple[str, list[str], bool]]:
    """Each job that the documents start, its arguments, and whether these are all it needs."""
    blocks, spans = [], []
    for text in DOCUMENTS.values():
        blocks += re.findall(r"^    (.*)$", re.sub(r"\\\n *", "", text), re.M)
        spans += re.findall(r"`([^`]*)`", re.sub(r"^( {4}|```).*$", "", text, flags=re.M))
    for is_block, text in [*((True, line) for line in blocks), *((False, span) for span in spans)]:
        if (found := re.search(r"(?:python -m )?jobs\.(\w+)((?: |\n)[^#&]*)", text)) and found[1] != "X":
            arguments = shlex.split(found[2])
            yield found[1], [part for part in arguments if part != "..."], is_block and "..." not in arguments


def test_every_command_of_the_documents_is_one_that_its_job_understands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    commands = list(list_commands())
    assert len(commands) > 30
    for job, arguments, is_whole in commands:
        told = refuse(job, arguments)
        assert not (told and is_whole), (job, arguments, told)
        lacking = r"required|is missing|needs out|give either|belong together|need a reason"
        assert all(re.search(lacking, line) for line in told), (job, arguments, told)


def refuse(job: str, arguments: list[str]) -> list[str]:
    """What is wrong with them, a line each."""
    settings: type[Settings] = getattr(darnet.settings, f"{job.title()}Settings")
    try:
        read_settings(settings, arguments, job)
    except UsageError as error:
        return str(error).splitlines()[1:]
    return []


def test_every_flag_that_is_named_is_one_of_a_job(capsys: pytest.CaptureFixture[str]) -> None:
    of_others = {"--load_fast", "--runtime-env"}  # TensorBoard's, and that of `ray job submit`
    for path in sorted((ROOT / "jobs").glob("[a-z]*.py")):
        with pytest.raises(SystemExit):
            refuse(path.stem, ["--help"])
    flags = set(re.findall(r"--[a-z][\w.-]*", capsys.readouterr().out))
    assert "--score.compile" in flags
    named = {flag for text in DOCUMENTS.values() for flag in re.findall(r"`(--[a-z][\w.-]*)", text)}
    assert named - flags == of_others


def test_the_columns_are_documented_as_they_are() -> None:
    assert (ROOT / "docs" / "schema.md").read_text() == f"# The results table\n\n{describe_schema()}"


def test_every_file_and_job_that_is_named_exists() -> None:
    text = "\n".join(DOCUMENTS.values())
    named = re.findall(r"`((?:jobs|darnet|docs|tests)/[\w/-]+\.\w+)", text)
    assert "jobs/night.sh" in named
    for name in named:
        assert (ROOT / name).is_file(), name
    for job in set(re.findall(r"jobs\.(\w+)", text)) - {"X"}:
        assert (ROOT / "jobs" / f"{job}.py").is_file(), job


def test_every_link_leads_to_a_file_and_a_heading() -> None:
    """By a heading's anchor as GitHub makes it."""
    links = [
        (path, link)
        for path, text in DOCUMENTS.items()
        for link in re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", text)
    ]
    assert len(links) > 30
    for path, (target, picture) in links:
        name, _, anchor = (target or picture).partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.is_file(), (path, target)
        headings = re.findall(r"^#+ (.*)$", DOCUMENTS.get(file, ""), re.M)
        assert anchor in ["", *(re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in headings)], target


def test_the_house_table_names_every_module() -> None:
    house = HOUSE.partition("|---|---|")[2].partition("\n## ")[0]
    modules = [path.relative_to(ROOT / "darnet") for path in (ROOT / "darnet").rglob("*.py") if path.stem != "__init__"]
    assert sorted(re.findall(r"`([\w.]+)`", house)) == sorted(".".join(path.with_suffix("").parts) for path in modules)
