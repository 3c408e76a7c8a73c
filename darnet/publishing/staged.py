"""What reads a run's staged parts goes in; its rows come out piece by piece, each source once and whole."""

from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import pyarrow as pa  # type: ignore[import-untyped]

from darnet.archive import batch_by
from darnet.publishing.objects import PIECE_ROWS
from darnet.publishing.rows import MODEL_KEY, SCAN_KEY, SCHEMA, Rows, is_error
from darnet.scan import BoolArray

ROW_KEY = [*SCAN_KEY, "status", "night"]
RUN_KEY = ["run_id", *MODEL_KEY]


class StagedRows:
    """The rows of a run, of which only the keys are held: some 250 bytes a row.

    `keys` has ROW_KEY of every row, in the order of `stream`; `run_key` the values that each column of RUN_KEY takes in
    parts with rows that count, which should be one. A source that was staged twice, by a driver that outlived its time,
    counts once and whole: the part without an ERR row of it counts, if there is one, else the first.
    """

    def __init__(self, read: Callable[[list[str]], Iterator[Rows]]) -> None:
        """`read` yields some columns of each part, always the same parts in the same order."""
        self._read = read
        parts, taken = [SCHEMA.empty_table().select(ROW_KEY)], [dict[str, set[str]]()]
        for part in read([*ROW_KEY, *RUN_KEY]):
            parts.append(part.select(ROW_KEY))
            taken.append({name: set(part[name].unique().to_pylist()) for name in RUN_KEY})
        self._is_counted = _choose_rows(parts)
        self.keys = pa.concat_tables(parts).combine_chunks().filter(pa.array(self._is_counted))
        ends = np.cumsum([len(part) for part in parts])[:-1]
        counts = [values for values, used in zip(taken, np.split(self._is_counted, ends), strict=True) if used.any()]
        self.run_key = {name: set().union(*(values[name] for values in counts)) for name in RUN_KEY}

    @property
    def num_rows(self) -> int:
        """How many rows count."""
        return int(self.keys.num_rows)

    def find_row(self, place: int) -> int:
        """The number, from 1, that a row of `keys` has among all that were staged."""
        return int(np.flatnonzero(self._is_counted)[place]) + 1

    def stream(self, columns: list[str] = SCHEMA.names) -> Iterator[tuple[slice, Rows]]:
        """Some columns of the rows in pieces of about `PIECE_ROWS`, each with its place in `keys`; no source is split.

        Raises: StorageError of a part that is gone or damaged.
        """
        num_read = num_counted = 0
        for parts in batch_by(self._read(columns), len, PIECE_ROWS):
            rows = pa.concat_tables(parts).combine_chunks()
            counted = rows.filter(pa.array(self._is_counted[num_read : num_read + len(rows)]))
            yield slice(num_counted, num_counted + len(counted)), counted
            num_read += len(rows)
            num_counted += len(counted)


def _choose_rows(parts: list[Rows]) -> BoolArray:
    """Whether each row counts: it lies in the part that its source is taken from."""
    frame = pa.concat_tables(parts).select(["source", "status"]).to_pandas()
    frame["part"] = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    has_error = is_error(frame).groupby([frame["source"], frame["part"]]).transform("any")
    rank: pd.Series[int] = has_error * len(parts) + frame["part"]
    is_counted: BoolArray = (rank == rank.groupby(frame["source"]).transform("min")).to_numpy()
    return is_counted
