"""What analysts read: the place of a results table goes in, a frame of predictions and its documentation come out.

`publishing.rows` holds the columns, `publishing.runs` a run's work, `publishing.commit` the way it is published.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import date
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from numpy.typing import NDArray

from darnet.publishing.objects import (
    NOTICE,
    list_commit_objects,
    read_commit_number,
    read_objects,
    stream_objects,
)
from darnet.publishing.rows import KEY_COLUMNS, MODEL_KEY, SCHEMA, SOURCE_KEY, Keys, Rows, is_among, is_error
from darnet.storage import Store, open_store

# What `read_predictions` does, for analysts at a DuckDB prompt, who put their place for RESULTS; the README shows it.
LATEST_SQL = """\
CREATE VIEW predictions AS FROM read_parquet('RESULTS/predictions/*.parquet');
CREATE MACRO latest(day := DATE '9999-12-31', last_commit := 99999999) AS TABLE
WITH rows AS (FROM predictions WHERE night <= day AND commit <= last_commit),
newest AS (
    SELECT source, max(commit) AS newest_commit, arg_max(input_sha256, commit) AS input_sha256,
           arg_max(model_sha256, commit) AS model_sha256,
           arg_max(preprocessing_version, commit) AS preprocessing_version
    FROM rows GROUP BY source)
SELECT rows.* FROM rows JOIN newest USING (source, input_sha256, model_sha256, preprocessing_version)
WHERE NOT starts_with(status, 'ERR_') OR commit = newest_commit
QUALIFY row_number() OVER (PARTITION BY source, scan_id ORDER BY commit DESC) = 1
ORDER BY source, scan_id;
"""


def read_predictions(
    uri: str, latest: bool = True, as_of: date | None = None, last_commit: int | None = None
) -> pd.DataFrame:
    """The results table as a frame: one row for each (source, scan_id) as last scored, or every row ever published.

    Latest means, for each source, the bytes, model and preprocessing of its newest commit: of these the final rows,
    and the ERR rows of that commit only, since the source was tried again as a whole. For DuckDB the same is
    `LATEST_SQL`. With `as_of`, the rows of later nights do not count; those of a night published later do. With
    `last_commit`, the rows of objects of higher numbers do not: such an answer never changes.

    Raises: StorageError, CredentialsError; a table without any object is an empty frame.
    """
    frame: pd.DataFrame = read_rows(open_store(uri), latest, as_of, last_commit).to_pandas()
    return frame


def read_rows(store: Store, latest: bool = True, as_of: date | None = None, last_commit: int | None = None) -> Rows:
    """What `read_predictions` reads, as an Arrow table.

    Rows are chosen by their keys; of other columns no row is kept that does not count.
    """
    items = list_commit_objects(store)
    if last_commit is not None:
        items = [item for item in items if read_commit_number(item.key) <= last_commit]
    if not items or (not latest and as_of is None):
        return pa.concat_tables([SCHEMA.empty_table(), *_take_rows(store, [(item.key, None) for item in items])])
    keys, counts = [SCHEMA.empty_table().select(KEY_COLUMNS)], Counter[str]()
    for stored in stream_objects(store, items, KEY_COLUMNS):
        keys.append(stored.rows)
        counts[stored.key] += stored.rows.num_rows
    table = pa.concat_tables(keys).combine_chunks()
    places = np.arange(table.num_rows)
    if as_of is not None:
        places = places[pc.less_equal(table["night"], pa.scalar(as_of, pa.date32())).to_numpy()]
    if latest:
        places = places[_find_latest(table.take(pa.array(places)))]
    chosen = np.sort(places)
    ends = np.cumsum([counts[item.key] for item in items])
    parts = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
    wanted = [
        (item.key, part - (end - counts[item.key]))
        for item, part, end in zip(items, parts, ends.tolist(), strict=True)
        if len(part)
    ]
    rows = pa.concat_tables([SCHEMA.empty_table(), *_take_rows(store, wanted)])
    return rows.take(pa.array(np.searchsorted(chosen, places)))


def _take_rows(store: Store, wanted: Sequence[tuple[str, NDArray[np.int64] | None]]) -> Iterator[Rows]:
    """Of objects, by their keys, the rows at these places, or all."""
    objects = read_objects(store, [key for key, _ in wanted])
    for stored, (_, places) in zip(objects, wanted, strict=True):
        yield stored.rows if places is None else stored.rows.take(pa.array(places))


def export_latest(store: Store, name: str) -> tuple[bytes, int]:
    """One row a scan as a file of this name, .csv or .parquet, and how many; the notice travels with it.

    A CSV has the notice in a column of its own, and lists as JSON.
    """
    table = read_rows(store)
    if name.endswith(".parquet"):
        sink = pa.BufferOutputStream()
        pq.write_table(table.replace_schema_metadata({"notice": NOTICE}), sink, compression="zstd")
        return sink.getvalue().to_pybytes(), table.num_rows
    frame = table.to_pandas()
    for field in SCHEMA:
        if pa.types.is_list(field.type):
            frame[field.name] = [None if value is None else json.dumps(value.tolist()) for value in frame[field.name]]
    return frame.assign(notice=NOTICE).to_csv(index=False).encode(), table.num_rows


def _find_latest(table: Keys) -> Any:
    """Indices of the latest rows, ordered by source and scan."""
    keys = table.select(KEY_COLUMNS).to_pandas()
    is_newest = keys["commit"] == keys.groupby("source")["commit"].transform("max")
    is_current = is_among(keys, keys[is_newest], [*SOURCE_KEY, *MODEL_KEY])
    valid = keys[is_current & (is_newest | ~is_error(keys))]
    ordered = valid.sort_values(["source", "scan_id", "commit"])
    return ordered.drop_duplicates(["source", "scan_id"], keep="last").index.to_numpy()


def describe_schema() -> str:
    """The columns as a Markdown table."""
    lines = ["| column | type | null | meaning |", "|---|---|---|---|"]
    for field in SCHEMA:
        may_be_null = "yes" if field.nullable else "no"
        lines.append(f"| {field.name} | {field.type} | {may_be_null} | {field.metadata[b'description'].decode()} |")
    return "\n".join(lines) + "\n"
