"""The table's key columns go in; which sources of an archive are settled comes out, in some 50 bytes a source."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow.compute as pc  # type: ignore[import-untyped]
from numpy.typing import NDArray

from darnet.publishing.objects import Stored, list_commit_objects, read_commit_number, stream_objects
from darnet.publishing.rows import MODEL_KEY, SOURCE_KEY, Reason, is_of_model, spell_key
from darnet.scan import BoolArray, Source
from darnet.storage import Store

# A digest of 128 bits decides what is scored. numpy sorts and finds byte strings of a fixed length; that it hides zeros
# at their end concerns those who take them out of the array, and nobody does.
Digests: TypeAlias = NDArray[np.bytes_]
PAIR_BYTES = 16
SOURCE_BYTES = 8  # Source: ours; whether a source was seen at all decides no more than the reason that people read


@dataclass(frozen=True)
class ScoredKeys:
    """What the table says of sources under one model and preprocessing, as of its object `last_commit`.

    Shape:  each is sorted: `done` and `retry` hold digests of (source, input_sha256), of sources all of whose scans are
            final, and of those with an ERR; `known` and `known_elsewhere` digests of sources that have any row under
            this model, and under another.
    """

    last_commit: int
    done: Digests
    retry: Digests
    known: Digests
    known_elsewhere: Digests

    def find_reasons(self, sources: Sequence[Source]) -> list[Reason | None]:
        """Why to score each source tonight; None if every one of its scans has a final row."""
        keys = [spell_key(source.key) for source in sources]
        pairs = _digest_pairs(keys, [source.input_sha256 for source in sources])
        reasons: list[Reason | None] = [None] * len(sources)
        is_open = ~_is_among(pairs, self.done)
        if is_open.any():
            names = _digest_sources(keys)
            is_retried, is_known = _is_among(pairs, self.retry), _is_among(names, self.known)
            is_known_elsewhere = _is_among(names, self.known_elsewhere)
            for index in np.flatnonzero(is_open):
                told = (is_retried[index], is_known[index], is_known_elsewhere[index])
                reasons[index] = _name_reason(*map(bool, told))
        return reasons


def _name_reason(is_retried: bool, is_known: bool, is_known_elsewhere: bool) -> Reason:
    if is_retried:
        return Reason.RETRY
    if is_known:
        return Reason.CHANGED
    return Reason.OTHER_MODEL if is_known_elsewhere else Reason.NEW


def read_scored_keys(store: Store, model_sha256: str, preprocessing_version: str) -> ScoredKeys:
    """What is settled under this model and preprocessing, read commit after commit.

    A source is done if its newest commit holds no ERR row: a commit tells of all its scans that were not final.
    """
    objects = list_commit_objects(store)
    events, known, known_elsewhere = _Events(), _Names(), _Names()
    for stored in stream_objects(store, objects, [*SOURCE_KEY, *MODEL_KEY, "status"]):
        is_ours = is_of_model(stored.rows, model_sha256, preprocessing_version)
        events.note(stored, is_ours)
        known.note(stored.rows["source"].filter(is_ours))
        known_elsewhere.note(stored.rows["source"].filter(pc.invert(is_ours)))
    done, retry = events.settle()
    last_commit = read_commit_number(objects[-1].key) if objects else 0
    return ScoredKeys(last_commit, done, retry, known.collect(), known_elsewhere.collect())


class _Events:
    """What each commit says of a source: whether all is well with it. The newest one counts."""

    def __init__(self) -> None:
        self._pairs: list[Digests] = []
        self._is_open: list[BoolArray] = []
        self._commit = 0

    def note(self, stored: Stored, is_ours: Any) -> None:
        """Add the rows of a commit, which may come in several pieces."""
        rows = stored.rows.filter(is_ours)
        rows = rows.append_column("is_open", pc.starts_with(rows["status"], "ERR_"))
        found = rows.group_by(SOURCE_KEY).aggregate([("is_open", "any")])
        pairs = _digest_pairs(found["source"].to_pylist(), found["input_sha256"].to_pylist())
        is_open = np.asarray(found["is_open_any"].to_numpy(), np.bool_)
        if stored.commit == self._commit:  # a source may lie across the border of two pieces
            pairs = np.concatenate([self._pairs.pop(), pairs])
            is_open = np.concatenate([self._is_open.pop(), is_open])
            is_open = np.isin(pairs, pairs[is_open])
        self._pairs.append(pairs)
        self._is_open.append(is_open)
        self._commit = stored.commit

    def settle(self) -> tuple[Digests, Digests]:
        """Sources that are done, and those to retry; forgets the rest."""
        pairs = np.concatenate([_digest_pairs([], []), *self._pairs])
        is_open = np.concatenate([np.empty(0, np.bool_), *self._is_open])
        self._pairs, self._is_open = [], []
        order = np.argsort(pairs, kind="stable")  # of equal ones the newest comes last
        pairs, is_open = pairs[order], is_open[order]
        is_newest = np.append(pairs[1:] != pairs[:-1], True)[: len(pairs)]
        return pairs[is_newest & ~is_open], pairs[is_newest & is_open]


class _Names:
    """Digests of sources, each once. Merged when they have doubled: most of a night's are known already."""

    def __init__(self) -> None:
        self._merged = _digest_sources([])
        self._fresh: list[Digests] = []
        self._num_fresh = 0

    def note(self, column: Any) -> None:
        """Add a column of sources."""
        self._fresh.append(_digest_sources(column.unique().to_pylist()))
        self._num_fresh += len(self._fresh[-1])
        if self._num_fresh > len(self._merged):
            self.collect()

    def collect(self) -> Digests:
        """All so far, sorted."""
        self._merged = np.unique(np.concatenate([self._merged, *self._fresh]))
        self._fresh, self._num_fresh = [], 0
        return self._merged


def _digest_pairs(keys: Sequence[str], input_sha256: Sequence[str]) -> Digests:
    pairs = zip(keys, input_sha256, strict=True)
    return _digest((f"{key}\0{sha256}" for key, sha256 in pairs), PAIR_BYTES)


def _digest_sources(keys: Sequence[str]) -> Digests:
    return _digest(keys, SOURCE_BYTES)


def _digest(texts: Iterable[str], num_bytes: int) -> Digests:
    joined = b"".join(hashlib.blake2b(text.encode(), digest_size=num_bytes).digest() for text in texts)
    return np.frombuffer(joined, f"S{num_bytes}")


def _is_among(wanted: Digests, found: Digests) -> BoolArray:
    """Whether each digest is in a sorted array of them."""
    if not len(found):
        return np.zeros(len(wanted), np.bool_)
    places = np.minimum(np.searchsorted(found, wanted), len(found) - 1)
    is_equal: BoolArray = found[places] == wanted
    return is_equal
