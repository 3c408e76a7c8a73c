"""Tables that people bring, CSV or Parquet: bytes enter, a frame with row numbers for complaints leaves."""

import csv
import io
import unicodedata
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, TypeAlias

import pandas as pd

from darnet.errors import UsageError

Rule: TypeAlias = "tuple[str, str, pd.Series[bool]]"
"""A column, what is wrong with its value and what to do, and the rows that are wrong so."""


INVISIBLE = frozenset({"Cc", "Cf", "Zl", "Zp"})  # Unicode's controls and formats (NUL, zero width), its line breaks


def read_table(name: str, data: bytes, kind: str, needed: Sequence[str], optional: Sequence[str] = ()) -> pd.DataFrame:
    """Read a table; `name` tells its format (.csv or .parquet), and stands in every complaint as `kind` does in one.

    A CSV's cells are all text; its index holds line numbers, that of a Parquet table row numbers from 1.
    Raises: UsageError for another format, a damaged file, a column whose name is nearly that of a needed or `optional`
            one (it would be passed over in silence), or a needed column that is missing or there twice.
    """
    suffix = PurePosixPath(name).suffix.lower()
    if suffix not in (".csv", ".parquet"):
        raise UsageError(f"{name}: a {kind} is a .csv or .parquet file")
    frame = _parse_csv(name, data, needed) if suffix == ".csv" else _parse_parquet(name, data)
    _check_names(name, frame, (*needed, *optional))
    _check_columns(name, frame, needed)
    return frame


def to_text(name: str, column: "pd.Series[Any]") -> "pd.Series[str]":
    """Turn text or whole numbers into text, missing cells into empty ones.

    Raises: UsageError for other types: 12.0 may once have been 12, 012 or 12.0.
    """
    is_text = all(isinstance(value, str) for value in column.dropna())
    if not (is_text or pd.api.types.is_integer_dtype(column.dtype)):
        raise UsageError(f"{name}: column {column.name} is of type {column.dtype}; store it as text")
    return column.astype(object).where(column.notna(), "").astype(str)


def list_id_rules(frame: pd.DataFrame, columns: Sequence[str]) -> list[Rule]:
    """What makes two of one identifier without anybody seeing it: space around it, or a letter that is not shown.

    The columns are text; those that the table lacks are passed over.
    """
    rules: list[Rule] = []
    for column in columns:
        if column in frame:
            cells = frame[column]
            rules += [
                (column, "holds a character that is not shown; remove it", cells.map(_has_invisible)),
                (column, "begins or ends with white space; remove it", cells != cells.str.strip()),
            ]
    return rules


def refuse_rows(name: str, frame: pd.DataFrame, rules: Sequence[Rule]) -> None:
    """Raises: UsageError naming the first row that breaks the first broken rule, and how many more do."""
    for column, fault, is_wrong in rules:
        if is_wrong.any():
            row, value = frame.index[is_wrong][0], frame[column][is_wrong].iloc[:1].tolist()[0]
            more = f" ({is_wrong.sum() - 1} more rows like it)" if is_wrong.sum() > 1 else ""
            raise UsageError(f"{name} row {row}: {column} {value!r} {fault}{more}")


def _parse_csv(name: str, data: bytes, needed: Sequence[str]) -> pd.DataFrame:
    """Read all cells as text; the index holds line numbers, which a quoted line break does not put out of step."""
    try:
        lines = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        numbered = [(lines.line_num, cells) for cells in lines if cells]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{name}: not a CSV file in UTF-8 ({error}); export it again as such") from error
    if not numbered:
        raise UsageError(f"{name}: the file is empty; it needs a header with {', '.join(needed)}")
    header = numbered[0][1]
    for row, cells in numbered:
        if any("\0" in cell for cell in cells):
            raise UsageError(f"{name} row {row}: a cell holds a NUL byte, so the file is damaged; export it again")
        if len(cells) != len(header):
            raise UsageError(f"{name} row {row}: {len(cells)} cells, but the header has {len(header)}; align them")
    records = [cells for _, cells in numbered[1:]]
    return pd.DataFrame(records, columns=header, index=[row for row, _ in numbered[1:]], dtype=str)


def _parse_parquet(name: str, data: bytes) -> pd.DataFrame:
    """Read a Parquet table; the index holds row numbers from 1."""
    try:
        frame = pd.read_parquet(io.BytesIO(data))
    except (ValueError, OSError) as error:  # Arrow's errors are ValueErrors and OSErrors
        raise UsageError(f"{name}: not a Parquet file ({error})") from error
    frame.index = pd.RangeIndex(1, len(frame) + 1)
    return frame


def _check_names(name: str, frame: pd.DataFrame, known: Sequence[str]) -> None:
    """Raises: UsageError naming a column that differs from a known one in case, space or invisible letters alone."""
    meant = {column.casefold(): column for column in known}
    for column in frame.columns:
        shown = "".join(letter for letter in str(column) if not _has_invisible(letter))
        near = meant.get(shown.strip().casefold())
        if near is not None and column != near:
            raise UsageError(f"{name}: column {column!r} is nearly {near}; rename it to {near}, or to something else")


def _has_invisible(text: str) -> bool:
    return any(unicodedata.category(letter) in INVISIBLE for letter in text)


def _check_columns(name: str, frame: pd.DataFrame, needed: Sequence[str]) -> None:
    missing = [column for column in needed if column not in frame]
    twice = sorted(set(frame.columns[frame.columns.duplicated()]))
    if missing or twice:
        fault = f"no column {', '.join(missing)}; add or rename it" if missing else f"column {twice[0]} comes twice"
        raise UsageError(f"{name}: {fault} (columns here: {', '.join(map(str, frame.columns))})")
