"""The rows of a whole run go in; the next numbered, immutable object of the results table comes out, or nothing.

One conditional put decides which of several runs takes a number; whoever loses drops what the winner made final.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
from numpy.typing import NDArray

from darnet.errors import NEVER_GIVEN_UP, ObjectMissing, PutUncertain, RunError, Status, StorageError
from darnet.publishing.objects import (
    ROW_GROUP_ROWS,
    Listing,
    Stored,
    demand_origin,
    demand_whole,
    describe_commit,
    list_commit_objects,
    make_commit_key,
    open_parquet,
    open_writer,
    read_stored,
    stream_objects,
)
from darnet.publishing.origin import Origin
from darnet.publishing.rows import (
    KEY_COLUMNS,
    MODEL_KEY,
    PROBABILITIES,
    SCAN_KEY,
    SCHEMA,
    SOURCE_KEY,
    Keys,
    PlacedKeys,
    Rows,
    is_among,
    is_error,
    select_model,
    spell_key,
)
from darnet.publishing.staged import ROW_KEY, StagedRows
from darnet.scan import DIAGNOSES, BoolArray
from darnet.storage import Store
from darnet.storage_local import explain_os_errors, find_temporary_folder

GIVE_UP_NIGHTS = 3  # Source: design: the same ERR on the same bytes for the third night is final
PUT_ATTEMPTS = 6  # Source: ours; with doubling pauses from 0.2 s this spans about 12 s of a store's trouble
IS_LATER, IS_GIVEN_UP, PLACE = "is_later", "is_given_up", "place"  # columns of our own beside the keys
NOWHERE = -1
OPEN_GROUPS = 256  # Source: ours; of 16,384 rows each, and a quarter of the files that a process may usually open
ORDER = [("source", "ascending"), ("scan_id", "ascending")]
LOST = "is planned, but has no row"
_KNOWN_NOTHING = SCHEMA.empty_table().select(KEY_COLUMNS).append_column(IS_LATER, pa.array([], pa.bool_()))
PROBABILITY_TOLERANCE = 1e-5  # Source: ours; a float32 softmax over three classes sums to 1 within 2e-7


# The gate before publishing


def check_rows(planned_sources: Iterable[str], rows: StagedRows, origin: Origin, remedy: str = "") -> None:
    """Demand of a run's rows that nothing was lost, doubled or made up, and all is named as the run says.

    Planned are keys of the archive. An error tells no name, which may be a patient's, but the row of the plan or parts;
    and `remedy`: what the run's next drivers find again each night, a person has to end.
    Raises: UsageError as `recall_names`; RunError of a source that is without rows, not planned, has a scan twice, an
        unknown status, probabilities that are none, or another model than the rest.
    """
    _demand_own_names(rows, origin)
    for complaint, is_of_plan, places in _find_wrong(planned_sources, rows, origin):
        if wrong := [int(place) for place in places]:
            where = f"row {wrong[0] + 1} of the run's plan.parquet"
            if not is_of_plan:
                where = f"row {rows.find_row(wrong[0])} of the run's parts, in the order of their names,"
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            again = "start the same night again, which scores it; if it stays so, " if complaint == LOST else ""
            told = f"the source in {where} {complaint}{more}; nothing is published"
            raise RunError(f"results rows are wrong: {told}" + (f"; {again}{remedy}" if remedy else ""))


def _find_wrong(
    planned_sources: Iterable[str], rows: StagedRows, origin: Origin
) -> Iterator[tuple[str, bool, Iterable[int]]]:
    """What may be wrong, whether the plan's rows are meant or the parts', and which of them."""
    name = origin.recall_names().name_source
    places: dict[str, int] = {}
    twice = []
    for row, key in enumerate(planned_sources):
        if places.setdefault(spell_key(name(key)), row) != row:
            twice.append(row)
    yield "is planned twice", True, twice
    found = set(rows.keys["source"].unique().to_pylist())
    yield LOST, True, [row for key, row in places.items() if key not in found]
    made_up = pa.array(sorted(found - places.keys()), pa.string())
    yield "has rows, but was not planned", False, np.flatnonzero(pc.is_in(rows.keys["source"], made_up))
    model_sha256 = ""
    for place, piece in rows.stream(["source", "scan_id", "status", "model_sha256", "prediction", *PROBABILITIES]):
        frame = piece.to_pandas()
        frame.index += place.start
        model_sha256 = model_sha256 or frame["model_sha256"].iloc[0]
        yield "has a scan twice", False, frame.index[frame.duplicated(["source", "scan_id"])]
        yield "has an unknown status", False, frame.index[~frame["status"].isin(list(Status))]
        yield "has another model than the first row", False, frame.index[frame["model_sha256"] != model_sha256]
        yield from ((complaint, False, wrong) for complaint, wrong in _find_wrong_probabilities(frame))


def _demand_own_names(rows: StagedRows, origin: Origin) -> None:
    for column in ("source", "scan_id"):
        origin.demand_own_names(name.as_py() for name in rows.keys[column])


def _find_wrong_probabilities(frame: pd.DataFrame) -> Iterator[tuple[str, Iterable[int]]]:
    is_ok = frame["status"] == Status.OK.value
    scored, others = frame[is_ok], frame[~is_ok]
    given = others[[*PROBABILITIES, "prediction"]].notna().any(axis=1)
    yield "has a probability or a prediction without being OK", others.index[given]
    probability = scored[PROBABILITIES].to_numpy(dtype=np.float64)
    is_sound = np.isfinite(probability).all(axis=1) & (probability >= 0).all(axis=1)
    is_sound &= np.abs(probability.sum(axis=1) - 1) <= PROBABILITY_TOLERANCE
    yield "is OK, but its probabilities do not sum to 1", scored.index[~is_sound]
    labels = np.array(DIAGNOSES)[:, None] == scored["prediction"].to_numpy()
    is_highest = (labels.T & (probability == probability.max(axis=1, initial=0, keepdims=True))).any(axis=1)
    yield "predicts another class than its highest probability", scored.index[~is_highest]


# Publishing


def publish(
    store: Store,
    run_id: str,
    rows: StagedRows,
    listing: Listing,
    origin: Origin,
    pause: Callable[[float], None] = time.sleep,
    confirm: Callable[[], object] = lambda: None,
    facts: Mapping[str, str] | None = None,
) -> int | None:
    """Make a run's rows the next object of the table; its number, or None if they hold nothing new.

    Rows that another run made final meanwhile are left out, those of sources of which it made other bytes final that it
    listed later, and those of trouble that is never given up and was the last word already; the third night of the same
    ERR of decoding becomes BAD_GAVE_UP.
    A run that was published before, but never heard of it, gets its number and publishes nothing. `confirm` is called
    last before every put, and what it raises keeps the run out of the table. `facts` go into the object's
    metadata, for people.

    Raises: RunError if the rows are not of this run, its origin, one model and one preprocessing; UsageError if a run
        of this origin may not add to the table; StorageError, CredentialsError.
    """
    if not rows.num_rows:
        return None
    for name, values in rows.run_key.items():
        if len(values) > 1 or (name == "run_id" and run_id not in values):
            raise RunError(f"publish: rows of more than one {name}, or not of run {run_id}")
    _demand_own_names(rows, origin)
    known = [_KNOWN_NOTHING]
    number = 1
    for stored in demand_origin(stream_objects(store, list_commit_objects(store), KEY_COLUMNS), origin):
        if stored.run_id == run_id:
            demand_whole(store, stored.key)
            return stored.commit
        known.append(_select_related(stored, rows, listing))
        number = stored.commit + 1
    keys = _add_places(rows)
    description = describe_commit(run_id, listing.ended_at, origin, facts or {})
    while True:
        past = pa.concat_tables(known)
        settled = _drop_repeats(_settle(_drop_superseded(keys, past), past), past)
        if not settled.num_rows:
            return None
        key = make_commit_key(number)
        with _write_object(rows, settled, number, description) as path:
            holder = _claim(store, key, path, run_id, pause, confirm)
        if holder == run_id:
            return number
        for stored in demand_origin([read_stored(store, key, KEY_COLUMNS)], origin):
            known.append(_select_related(stored, rows, listing))
        number += 1


@contextmanager
def _write_object(rows: StagedRows, settled: PlacedKeys, number: int, description: Mapping[str, str]) -> Iterator[Path]:
    """The settled rows as a local file, numbered, in an order that does not depend on who finished first.

    No more than one row group is held: rows are dealt out to a file for each as they come, and sorted there. So many
    files are open at once; of more groups the rows are read again.
    """
    places = settled[PLACE].to_numpy()
    is_given_up, group = np.zeros(rows.num_rows, np.bool_), np.full(rows.num_rows, NOWHERE)
    is_given_up[places] = settled[IS_GIVEN_UP].to_numpy()
    group[places[pc.sort_indices(settled, ORDER)]] = np.arange(len(places)) // ROW_GROUP_ROWS
    place = find_temporary_folder()
    with explain_os_errors(place, "write rows"), tempfile.TemporaryDirectory(prefix="darnet-") as temporary:
        path = Path(temporary, "commit.parquet")
        with open_writer(path, SCHEMA, description) as writer:
            for first in range(0, group.max() + 1, OPEN_GROUPS):
                dealt = [Path(temporary, f"group{index}") for index in range(min(OPEN_GROUPS, group.max() + 1 - first))]
                pieces = ((group[where] - first, give_up(piece, is_given_up[where])) for where, piece in rows.stream())
                _deal_out(pieces, dealt)
                for file in dealt:
                    with pa.OSFile(str(file)) as source:
                        writer.write_table(_finish(pa.ipc.open_file(source).read_all(), number))
        yield path


def _deal_out(pieces: Iterable[tuple[NDArray[np.int64], Rows]], files: Sequence[Path]) -> None:
    """Write each row to the file of its number, or nowhere if there is none."""
    with ExitStack() as stack:
        writers = [stack.enter_context(pa.ipc.new_file(str(file), SCHEMA)) for file in files]
        for numbers, rows in pieces:
            for number in set(numbers.tolist()) & set(range(len(files))):
                writers[number].write_table(rows.filter(pa.array(numbers == number)))


@dataclass(frozen=True)
class Outlook:
    """What becomes of a run's rows in the table as it stands. Shape: (num_rows,) each, in the order of the keys.

    `is_settled`: the table will not take it, as the scan is final there, or newer bytes of its source are.
    `is_repeat`: of the others, the table has the same ERR of this scan and bytes. That is no news of tonight: to count
    it would hold every night until the last such scan is given up or put right, which may take months. `is_given_up`:
    it is the ERR of one night too many, and becomes BAD_GAVE_UP. `statuses` counts the rows that are not settled, with
    that, the commonest first.
    """

    is_settled: BoolArray
    is_repeat: BoolArray
    is_given_up: BoolArray
    statuses: Mapping[str, int]


def read_outlook(store: Store, rows: StagedRows, listing: Listing) -> Outlook:
    """What `publish` would make of a run's rows if nobody else published before; of a run that is published, made."""
    known = [_KNOWN_NOTHING]
    for stored in stream_objects(store, list_commit_objects(store), KEY_COLUMNS):
        if stored.run_id in rows.run_key["run_id"]:
            break
        known.append(_select_related(stored, rows, listing))
    past = pa.concat_tables(known)
    is_settled, is_given_up = np.ones(rows.num_rows, np.bool_), np.zeros(rows.num_rows, np.bool_)
    kept = _settle(_drop_superseded(_add_places(rows), past), past)
    is_settled[kept[PLACE].to_numpy()] = False
    is_given_up[kept[PLACE].to_numpy()] = kept[IS_GIVEN_UP].to_numpy()
    is_repeat = ~is_settled & _are_known_errors(rows.keys, past)
    statuses = rows.keys.select(["status"]).filter(pa.array(~is_settled))
    counts = Counter(give_up(statuses, is_given_up[~is_settled])["status"].to_pylist())
    return Outlook(is_settled, is_repeat, is_given_up, dict(counts.most_common()))


def _are_known_errors(keys: Keys, known: Keys) -> BoolArray:
    """Which rows the table has already, with the same ERR. Shape: (len(keys),)."""
    columns = [*SCAN_KEY, "status"]
    before = known.select(columns).filter(pc.starts_with(known["status"], "ERR_"))
    if not before.num_rows:
        return np.zeros(len(keys), np.bool_)
    return is_among(keys.select(columns).to_pandas(), before.to_pandas(), columns)


def _add_places(rows: StagedRows) -> PlacedKeys:
    """Keys of a run's rows with their places; none is given up yet."""
    keys = rows.keys.append_column(PLACE, pa.array(np.arange(rows.num_rows)))
    return keys.append_column(IS_GIVEN_UP, pa.array(np.zeros(rows.num_rows, np.bool_)))


def _claim(
    store: Store, key: str, path: Path, run_id: str, pause: Callable[[float], None], confirm: Callable[[], object]
) -> str:
    """Put until somebody holds this key; the run that does.

    Reads the holder after a refusal too: a repeated request may have been refused because of its own first try.
    """
    for attempt in range(PUT_ATTEMPTS):
        try:
            confirm()
        except RunError as error:
            if not attempt:
                raise
            raise RunError(f"{error}; but a put of it was not answered, and may yet arrive") from error
        try:
            if store.put_if_absent(key, path):
                return run_id
        except PutUncertain:
            pass
        try:
            holder = open_parquet(store, key)[1]
        except ObjectMissing:
            pause(0.2 * 2**attempt)
            continue
        if holder == run_id:
            demand_whole(store, key)
        return holder
    raise StorageError(f"{store.uri}/{key}: no clear answer to {PUT_ATTEMPTS} puts; start the same run again later")


def _select_related(stored: Stored, rows: StagedRows, listing: Listing) -> Keys:
    """Of another commit, the rows that concern our sources under our model and preprocessing, and if it is later.

    Later is a commit that our plan did not know, of a run that did not end its listing before ours began. If both
    listed at once, or if it does not say, who saw a source last is unknown; dropping ours is then the harmless mistake:
    bytes that are still there are not final, and the next night scores them. Rows of bytes that are gone would stay.
    """
    (model_sha256,), (preprocessing_version,) = (rows.run_key[name] for name in MODEL_KEY)
    ours = stored.rows.filter(pc.is_in(stored.rows["source"], rows.keys["source"]))
    related = select_model(ours, model_sha256, preprocessing_version)
    is_unseen = stored.commit > listing.last_commit
    is_later = is_unseen and (stored.listed_until is None or stored.listed_until >= listing.started_at)
    return related.append_column(IS_LATER, pa.array([is_later] * related.num_rows, pa.bool_()))


def _drop_superseded(keys: PlacedKeys, known: Keys) -> PlacedKeys:
    """Keys of our rows without those of sources that changed: a later run made other bytes of theirs final."""
    past = known.filter(known[IS_LATER]).to_pandas()
    later = past[~is_error(past)]
    if later.empty:
        return keys
    mine = keys.select(SOURCE_KEY).to_pandas()
    changed = later.loc[~is_among(later, mine, SOURCE_KEY), "source"]
    return keys.filter(pa.array(~mine["source"].isin(changed)))


def _settle(keys: PlacedKeys, known: Keys) -> PlacedKeys:
    """Keys of our rows without what is final already, and with the last ERR of too many marked to be final."""
    if not known.num_rows or not keys.num_rows:
        return keys
    mine = keys.select(ROW_KEY).to_pandas()
    past = known.to_pandas()
    is_settled = is_among(mine, past[~is_error(past)], SCAN_KEY) | is_among(mine, _done_sources(past), SOURCE_KEY)
    kept = keys.filter(pa.array(~is_settled)).drop_columns(IS_GIVEN_UP)
    return kept.append_column(IS_GIVEN_UP, pa.array(_count_nights(mine[~is_settled], past) >= GIVE_UP_NIGHTS))


def _drop_repeats(keys: PlacedKeys, known: Keys) -> PlacedKeys:
    return keys.filter(pa.array(~_are_repeats(keys, known))) if _has_lasting(keys) else keys


def _has_lasting(keys: PlacedKeys) -> bool:
    """Whether any of these rows is of trouble that is never given up."""
    return not NEVER_GIVEN_UP.isdisjoint(keys["status"].unique().to_pylist())


def _are_repeats(keys: PlacedKeys, known: Keys) -> BoolArray:
    """Which of our rows are of sources whose newest commit holds these ERR rows, never given up, and no others.

    That commit tells of all of a source that is not final. To publish them every night would fill the table; the errors
    that are given up are published each night, as their nights are counted there.
    """
    columns = [*SCAN_KEY, "status"]
    mine = keys.select(columns).to_pandas()
    past = known.to_pandas()
    newest = past[(past["commit"] == past.groupby("source")["commit"].transform("max")) & is_error(past)]
    is_same = is_among(mine, newest, columns) & _is_lasting(mine).to_numpy()
    others = [mine.loc[~is_same, "source"], newest.loc[~is_among(newest, mine, columns), "source"]]
    is_repeat: BoolArray = is_same & ~mine["source"].isin(pd.concat(others)).to_numpy()
    return is_repeat


def _is_lasting(frame: pd.DataFrame) -> "pd.Series[bool]":
    """Whether each row is of trouble that is never given up."""
    return frame["status"].isin(list(NEVER_GIVEN_UP))


def _done_sources(past: pd.DataFrame) -> pd.DataFrame:
    """Rows of the sources whose newest commit holds no ERR."""
    is_newest = past["commit"] == past.groupby(SOURCE_KEY)["commit"].transform("max")
    return past[~is_among(past, past[is_newest & is_error(past)], SOURCE_KEY)]


def _count_nights(mine: pd.DataFrame, past: pd.DataFrame) -> Any:
    """For each of our rows, tonight included, on how many nights this scan ended in this ERR; 0 if it did not.

    Nor is counted what may never become final.
    """
    columns = [*SCAN_KEY, "status"]
    both = pd.concat([past, mine])[[*columns, "night"]]
    counts = (
        both[is_error(both) & ~_is_lasting(both)].groupby(columns)["night"].nunique().rename("num_nights").reset_index()
    )
    return mine.merge(counts, how="left", on=columns)["num_nights"].fillna(0).to_numpy()


def give_up(rows: Rows, is_last: BoolArray) -> Rows:
    """Rows, or some columns of them, with the last ERR of too many turned final."""
    if not is_last.any():
        return rows
    changes = {"status": Status.BAD_GAVE_UP.value}
    if "status_detail" in rows.column_names:
        nights = f", {GIVE_UP_NIGHTS} nights: "
        changes["status_detail"] = pc.binary_join_element_wise(rows["status"], rows["status_detail"], nights)
    for name, replacement in changes.items():
        column = pc.if_else(pa.array(is_last), replacement, rows[name])
        rows = rows.set_column(rows.column_names.index(name), rows.schema.field(name), column)
    return rows


def _finish(rows: Rows, number: int) -> Rows:
    """Rows of one group as published."""
    numbered = rows.set_column(
        SCHEMA.get_field_index("commit"), SCHEMA.field("commit"), pa.array(np.full(rows.num_rows, number))
    )
    return numbered.sort_by(ORDER)
