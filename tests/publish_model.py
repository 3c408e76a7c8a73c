"""Every way two or three runs can meet in the results table, walked through with the code that publishes.

`python -m tests.publish_model` prints how many states it saw. A driver is `darnet.publishing.commit.publish` itself: it
is a function of what the store answers, so it is started again with the answers so far, and stopped at the first
question that has none yet. Between two questions of one driver any other may go on, a put may stay in flight, and
drivers may die and start again.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from darnet.errors import NEVER_GIVEN_UP, ObjectMissing, PutUncertain
from darnet.publishing.commit import publish
from darnet.publishing.objects import Listing
from darnet.publishing.rows import MODEL_KEY, SCAN_KEY, is_error, make_table
from darnet.publishing.staged import StagedRows
from darnet.scan import StoredObject
from tests.results_fixtures import ORIGIN, make_listing, make_row, stage

UNCERTAIN = "uncertain"
FINAL_KEY = [*SCAN_KEY, *MODEL_KEY]
COLUMNS = [*FINAL_KEY, "status"]


class Question(NamedTuple):
    """What a driver asks of the store: list, read a key, or put an object, named by its digest, at a key."""

    kind: str
    key: str = ""
    digest: str = ""


class Outcome(NamedTuple):
    """What `publish` returned."""

    number: int | None


class Run(NamedTuple):
    """A driver: its run, the rows it wants to publish, and when it listed the archive."""

    run_id: str
    rows: Any
    staged: StagedRows
    listing: Listing


class State(NamedTuple):
    """One moment: the table (key, digest), each driver's answers so far, puts in flight, troubles still to come."""

    table: tuple[tuple[str, str], ...]
    answers: tuple[tuple[Any, ...], ...]
    in_flight: tuple[tuple[str, str], ...]
    num_faults: int
    num_crashes: int


@dataclass(frozen=True)
class Scenario:
    """Runs that meet, the table they find, and how much may go wrong on one path.

    `minutes` has, for some runs, when their listing began and ended; without, all that meet listed at once, after the
    nights before. None of them knew the table of the others.
    """

    name: str
    runs: Sequence[Sequence[Mapping[str, Any]]]
    before: Sequence[Sequence[Mapping[str, Any]]] = ()
    num_faults: int = 2
    num_crashes: int = 2
    minutes: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass
class Walk:
    """What a walk through all states of a scenario found."""

    num_states: int = 0
    num_publishes: int = 0
    ends: set[tuple[tuple[str, str], ...]] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)


class Unanswered(BaseException):
    """The driver asked what nobody has answered yet; not an Exception, so that nothing in between takes it for one."""

    def __init__(self, question: Question) -> None:
        super().__init__(question)
        self.question = question


class AnsweringStore:
    """The part of a store that publishing may use, answering from a list.

    Objects it told of never change, so that reading them is no question.
    """

    uri = "model"

    def __init__(self, answers: Sequence[Any], objects: dict[str, bytes]) -> None:
        self._answers = iter(answers)
        self._objects = objects
        self._listed: dict[str, str] = {}

    def list_objects(self, prefix: str = "") -> Iterator[StoredObject]:
        self._listed = dict(self._ask(Question("list")))
        for key, digest in self._listed.items():
            if key.startswith(prefix):
                yield StoredObject(key, len(self._objects[digest]), digest)

    def read_bytes(self, key: str) -> bytes:
        digest = self._listed[key] if key in self._listed else self._ask(Question("read", key))
        if digest is None:
            raise ObjectMissing(key)
        return self._objects[digest]

    def put_if_absent(self, key: str, path: Path) -> bool:
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()[:16]
        self._objects[digest] = data
        answer = self._ask(Question("put", key, digest))
        if answer == UNCERTAIN:
            raise PutUncertain(key)
        return bool(answer)

    def _ask(self, question: Question) -> Any:
        try:
            return next(self._answers)
        except StopIteration:
            raise Unanswered(question) from None


class PublishModel:
    """All states of one scenario. With `is_blind`, the store puts whatever lies there, and says that all is well."""

    def __init__(self, scenario: Scenario, *, is_blind: bool = False) -> None:
        self._scenario, self._is_blind = scenario, is_blind
        self._objects: dict[str, bytes] = {}
        self._next: dict[tuple[int, tuple[Any, ...]], Question | Outcome] = {}
        self._judged: dict[Any, list[str]] = {}
        self._runs = [self._make_run(rows) for rows in scenario.runs]
        self._listings = {run.run_id: run.listing for run in self._runs}

    def walk(self) -> Walk:
        """Visit every state once; stop at the first bad one."""
        first = State(self._publish_before(), ((),) * len(self._runs), (), *self._budget)
        walk, waiting, seen = Walk(), [first], {first}
        while waiting and not walk.faults:
            state = waiting.pop()
            walk.num_states += 1
            walk.faults = self._judge(state)
            if all(isinstance(self._ask(driver, state), Outcome) for driver in range(len(self._runs))):
                walk.ends.add(state.table)
            for later in self._follow(state):
                if later not in seen:
                    seen.add(later)
                    waiting.append(later)
        walk.num_publishes = len(self._next)
        return walk

    def read_statuses(self, table: tuple[tuple[str, str], ...]) -> list[dict[str, str]]:
        """Of each object of a table, the status of each scan."""
        frames = [self._read(digest) for _, digest in table]
        return [dict(zip(frame["scan_id"], frame["status"], strict=True)) for frame in frames]

    @property
    def _budget(self) -> tuple[int, int]:
        return self._scenario.num_faults, self._scenario.num_crashes

    def _publish_before(self) -> tuple[tuple[str, str], ...]:
        """The table the runs find: earlier nights, published one after another without any trouble."""
        table: dict[str, str] = {}
        for rows in self._scenario.before:
            run, answers, question = self._make_run(rows), (), Question("list")
            while not isinstance(question, Outcome):
                answers = (*answers, tuple(table.items()) if question.kind == "list" else True)
                if question.kind == "put":
                    table[question.key] = question.digest
                question = self._start(run, answers)  # type: ignore[assignment]
        return tuple(table.items())

    def _make_run(self, rows: Sequence[Mapping[str, Any]]) -> Run:
        run_id = rows[0]["run_id"]
        started, ended = self._scenario.minutes.get(run_id, (0, 0))
        listing = make_listing(started, minutes=ended - started, last_commit=len(self._scenario.before))
        return Run(run_id, make_table(rows), stage(rows), listing)

    def _start(self, run: Run, answers: tuple[Any, ...]) -> Question | Outcome:
        """Run the real code until it asks what is not answered, or ends."""
        try:
            store = AnsweringStore(answers, self._objects)
            return Outcome(publish(store, run.run_id, run.staged, run.listing, ORIGIN, lambda _: None))  # type: ignore[arg-type]
        except Unanswered as asked:
            return asked.question

    def _ask(self, driver: int, state: State) -> Question | Outcome:
        place = (driver, state.answers[driver])
        if place not in self._next:
            self._next[place] = self._start(self._runs[driver], state.answers[driver])
        return self._next[place]

    def _follow(self, state: State) -> Iterator[State]:
        """Every state that one step leads to."""
        for index, put in enumerate(state.in_flight):
            left = state.in_flight[:index] + state.in_flight[index + 1 :]
            yield state._replace(in_flight=left, table=self._put(state.table, *put)[0])
        for driver in range(len(self._runs)):
            question = self._ask(driver, state)
            if isinstance(question, Outcome):
                continue
            yield from self._answer(state, driver, question)
            if state.num_crashes and state.answers[driver]:
                dead = state._replace(num_crashes=state.num_crashes - 1)
                yield dead._replace(answers=_replace_at(state.answers, driver, ()))

    def _answer(self, state: State, driver: int, question: Question) -> Iterator[State]:
        """Every answer the store may give, and what it did."""

        def give(answer: Any, **changes: Any) -> State:
            told = _replace_at(state.answers, driver, (*state.answers[driver], answer))
            return state._replace(answers=told, **changes)

        if question.kind == "list":
            yield give(state.table)
        elif question.kind == "read":
            yield give(dict(state.table).get(question.key))
        else:
            put = (question.key, question.digest)
            table, is_created = self._put(state.table, *put)
            yield give(is_created, table=table)
            if state.num_faults:
                fewer = state.num_faults - 1
                flying = tuple(sorted([*state.in_flight, put]))
                yield give(UNCERTAIN, in_flight=flying, num_faults=fewer)  # lost, done, or carried out much later
                yield give(False, table=table, num_faults=fewer)  # the client's own second try was refused

    def _put(self, table: tuple[tuple[str, str], ...], key: str, digest: str) -> tuple[Any, bool]:
        is_free = self._is_blind or key not in dict(table)
        return (tuple(sorted((dict(table) | {key: digest}).items())) if is_free else table), is_free

    # What may never be

    def _judge(self, state: State) -> list[str]:
        faults = self._judge_once(state.table, self._judge_table)
        for driver in range(len(self._runs)):
            question = self._ask(driver, state)
            if isinstance(question, Outcome):
                faults = faults + self._judge_once(state.table, self._judge_outcome, driver, question)
        return faults

    def _judge_once(self, table: tuple[tuple[str, str], ...], judge: Callable[..., list[str]], *told: Any) -> list[str]:
        if (table, *told) not in self._judged:
            self._judged[table, *told] = judge(table, *told)
        return self._judged[table, *told]

    def _judge_table(self, table: tuple[tuple[str, str], ...]) -> list[str]:
        """What is wrong with a table, whoever made it."""
        faults = []
        if [key for key, _ in table] != [f"predictions/c{number + 1:08d}.parquet" for number in range(len(table))]:
            faults.append("the numbers have a gap")
        if not table:
            return faults
        frames = [self._read(digest) for _, digest in table]
        everything = pd.concat(frames)
        for number, frame in enumerate(frames, 1):
            if set(frame["commit"]) != {number} or frame["run_id"].nunique() != 1:
                faults.append(f"object {number} is not one run's rows under its number")
        if everything.groupby("run_id")["commit"].nunique().max() > 1:
            faults.append("a run is in two objects")
        final = everything[~is_error(everything)]
        if final.duplicated(FINAL_KEY).any():
            faults.append("a scan has two final rows")
        settled = everything.merge(final[[*FINAL_KEY, "commit"]], on=FINAL_KEY, suffixes=("", "_final"))
        if (is_error(settled) & (settled["commit"] >= settled["commit_final"])).any():
            faults.append("an ERR row follows the final row of its scan")
        for _, rows in everything.groupby("source"):
            said = [set(zip(*map(one.get, COLUMNS), strict=True)) for _, one in rows.groupby("commit")]
            if any(first == then and {row[-1] for row in then} <= NEVER_GIVEN_UP for first, then in pairwise(said)):
                faults.append("a commit repeats what the table says of a source")
        return faults + self._judge_order(frames)

    def _judge_order(self, frames: Sequence[pd.DataFrame]) -> list[str]:
        """Whether bytes that a run listed before another's end follow that one's final rows of other bytes."""
        faults = []
        for second, frame in enumerate(frames):
            ours = self._listings.get(frame["run_id"].iloc[0])
            for before in frames[:second] if ours else ():
                theirs = self._listings.get(before["run_id"].iloc[0])
                if theirs and theirs.ended_at >= ours.started_at:
                    both = frame.merge(before[~is_error(before)], on=["source", *MODEL_KEY])
                    if (both["input_sha256_x"] != both["input_sha256_y"]).any():
                        faults.append("older bytes follow newer ones")
        return faults

    def _judge_outcome(self, table: tuple[tuple[str, str], ...], driver: int, outcome: Outcome) -> list[str]:
        """What is wrong with what a driver was told."""
        run = self._runs[driver]
        frames = {number: self._read(digest) for number, (_, digest) in enumerate(table, 1)}
        own = [number for number, frame in frames.items() if set(frame["run_id"]) == {run.run_id}]
        faults = []
        if own != ([] if outcome.number is None else [outcome.number]):
            faults.append(f"{run.run_id} was told {outcome.number}, its rows are in {own}")
        everything = pd.concat([*frames.values(), self._read_rows(run.rows).iloc[:0]])
        mine = self._read_rows(run.rows)
        for scan, status in zip(mine["scan_id"], mine["status"], strict=True):
            found = everything.loc[everything["scan_id"] == scan, "status"]
            if not (found == status).any() and not (~found.str.startswith("ERR_")).any():
                faults.append(f"{run.run_id} ended, and {scan} {status} is lost")
        return faults

    def _read(self, digest: str) -> pd.DataFrame:
        return self._read_rows(pq.read_table(pa.BufferReader(self._objects[digest])))

    def _read_rows(self, rows: Any) -> pd.DataFrame:
        frame: pd.DataFrame = rows.select([*FINAL_KEY, "status", "commit", "run_id"]).to_pandas()
        return frame


def _replace_at(items: tuple[Any, ...], index: int, item: Any) -> tuple[Any, ...]:
    return (*items[:index], item, *items[index + 1 :])


def _rows(
    run_id: str, night: int = 3, seconds: float = 0.0, changed: str = "", **statuses: str
) -> list[dict[str, Any]]:
    """Rows of a run; `a1` is the first series of source a, `a` a source with one scan. `changed` sources differ."""
    rows = []
    for name, status in statuses.items():
        scan_id = name if len(name) == 1 else f"{name[0]}#{name[1]}"
        bytes_now = {"input_sha256": ("j" if name[0] in changed else "i") * 64}
        rows.append(make_row(scan_id, status, run_id=run_id, night=night, fetch_s=seconds, **bytes_now))
    return rows


ERR, LASTING = "ERR_TIMEOUT", "ERR_ARCHIVED"
SCENARIOS = (
    Scenario("both score the same scan", [_rows("x", a="OK", b="OK"), _rows("y", a="OK", c="OK")]),
    Scenario("each fails where the other does not", [_rows("x", a="OK", b=ERR), _rows("y", a=ERR, b="OK")]),
    Scenario("one gets half of a source", [_rows("x", a1="OK", a2=ERR), _rows("y", a1="OK", a2="OK")]),
    Scenario(
        "one gives up, one succeeds",
        [_rows("x", a=ERR), _rows("y", a="OK", b="OK")],
        [_rows("night1", 1, a=ERR), _rows("night2", 2, a=ERR)],
    ),
    Scenario(
        "both try again in vain, one finds other trouble",
        [_rows("x", a=LASTING, b=LASTING, c="OK"), _rows("y", a=LASTING, b="ERR_DENIED")],
        [_rows("night1", 1, a=LASTING)],
    ),
    Scenario(
        "two drivers of one run, and a rival",
        [_rows("x", a="OK", b=ERR), _rows("x", a="OK", b=ERR, seconds=1.0), _rows("y", a="OK")],
        num_faults=1,
        num_crashes=1,
    ),
    Scenario(
        "one listed a source before it changed",
        [_rows("x", a1="OK", a2=ERR, b="OK"), _rows("y", a1="OK", a2="OK", changed="a", c=ERR)],
        minutes={"x": (0, 5), "y": (10, 15)},
    ),
    Scenario(
        "a source changed while both listed",
        [_rows("x", a="OK", b="OK"), _rows("y", a="OK", c="OK", changed="a")],
        minutes={"x": (0, 20), "y": (5, 10)},
    ),
    Scenario(
        "three runs",
        [_rows("x", a="OK", b=ERR), _rows("y", a=ERR, b="OK"), _rows("z", a="OK", b="OK", c="OK")],
        num_faults=1,
        num_crashes=1,
    ),
)


def walk_all(tell: Callable[[str], object]) -> Walk:
    """Every scenario; the sums, and all that was found wrong."""
    whole = Walk()
    for scenario in SCENARIOS:
        walk = PublishModel(scenario).walk()
        tell(
            f"{scenario.name}: {walk.num_states} states, publish run {walk.num_publishes} times, "
            f"{len(walk.ends)} tables at the end, {len(walk.faults)} bad"
        )
        whole = replace(
            whole,
            num_states=whole.num_states + walk.num_states,
            num_publishes=whole.num_publishes + walk.num_publishes,
            faults=whole.faults + walk.faults,
        )
    tell(f"all: {whole.num_states} states, publish run {whole.num_publishes} times, {len(whole.faults)} bad")
    return whole


if __name__ == "__main__":
    walk_all(print)
