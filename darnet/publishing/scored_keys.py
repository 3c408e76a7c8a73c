"""The table's key columns go in; which sources of an archive are settled comes out, in some 50 bytes a source."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow.compute as pc  # type: ignore[import-untyped]
from numpy.typing import NDArray

from darnet.pseudonym import OPEN_KEYS, KeyNames
from darnet.publishing.objects import Stored, demand_origin, list_commit_objects, read_commit_number, stream_objects
from darnet.publishing.origin import Origin
from darnet.publishing.rows import MODEL_KEY, SOURCE_KEY, Reason, is_of_model, spell_key
from darnet.scan import BoolArray, Source
from darnet.storage import Store

# Of a source and its bytes: 64 bits of a digest of the source's key, and 64 of one of key and bytes. All 128 decide
# what is scored, the first half alone no more than the reason that people read. numpy sorts and finds byte strings of
# a fixed length; that it hides zeros at their end concerns those who take them out of the array, and nobody does.
Digests: TypeAlias = NDArray[np.bytes_]
HALF_BYTES = 8
PAIR_BYTES = 2 * HALF_BYTES


@dataclass(frozen=True)
class ScoredKeys:
    """What the table says of sources under one model and preprocessing, as of its object `last_commit`.

    Shape:  `pairs` (n,) sorted digests of every (source, input_sha256) under this model; `is_done` (n,), whether all
            scans of it are final; `known_elsewhere` sorted first halves of the digests of sources under other models.
    """

    last_commit: int
    pairs: Digests
    is_done: BoolArray
    known_elsewhere: Digests
    names: KeyNames = OPEN_KEYS

    def find_reasons(self, sources: Sequence[Source]) -> list[Reason | None]:
        """Why to score each source tonight; None if every one of its scans has a final row."""
        spelled = [spell_key(self.names.name_source(source.key)) for source in sources]
        wanted = _digest_pairs(spelled, [source.input_sha256 for source in sources])
        places = _find_places(self.pairs, wanted)
        is_found = _is_equal(self.pairs, places, wanted)
        is_open = ~is_found
        is_open[is_found] = ~self.is_done[places[is_found]]
        reasons: list[Reason | None] = [None] * len(sources)
        if is_open.any():
            halves = _take_halves(wanted)
            first_places = _find_places(self.pairs, halves.astype(wanted.dtype))  # zeros behind a half sort first
            is_known = _is_equal(_take_halves(self.pairs), first_places, halves)
            is_elsewhere = _is_equal(self.known_elsewhere, _find_places(self.known_elsewhere, halves), halves)
            for index in np.flatnonzero(is_open):
                told = (is_found[index], is_known[index], is_elsewhere[index])
                reasons[index] = _name_reason(*map(bool, told))
        return reasons


def _name_reason(is_retried: bool, is_known: bool, is_known_elsewhere: bool) -> Reason:
    if is_retried:
        return Reason.RETRY
    if is_known:
        return Reason.CHANGED
    return Reason.OTHER_MODEL if is_known_elsewhere else Reason.NEW


def read_scored_keys(store: Store, model_sha256: str, preprocessing_version: str, origin: Origin) -> ScoredKeys:
    """What is settled under this model and preprocessing, read commit after commit.

    A source is done if its newest commit holds no ERR row: a commit tells of all its scans that were not final.
    Raises: UsageError if a run of this origin may not add to the table.
    """
    names, objects = origin.recall_names(), list_commit_objects(store)
    events, elsewhere = _Events(), _Halves()
    for stored in demand_origin(stream_objects(store, objects, [*SOURCE_KEY, *MODEL_KEY, "status"]), origin):
        is_ours = is_of_model(stored.rows, model_sha256, preprocessing_version)
        events.note(stored, is_ours)
        elsewhere.note(stored.rows["source"].filter(pc.invert(is_ours)))
    last_commit = read_commit_number(objects[-1].key) if objects else 0
    return ScoredKeys(last_commit, *events.settle(), elsewhere.collect(), names)


class _Events:
    """What each commit says of a source: whether all is well with it. The newest one counts."""

    def __init__(self) -> None:
        self._pairs, self._is_open = bytearray(), bytearray()  # they grow without a second copy
        self._held: list[Digests] = []
        self._commit = 0

    def note(self, stored: Stored, is_ours: Any) -> None:
        """Add the rows of a commit, which may come in several pieces."""
        if stored.commit != self._commit:
            self._end_commit()
            self._commit = stored.commit
        rows = stored.rows.filter(is_ours)
        rows = rows.append_column("is_open", pc.starts_with(rows["status"], "ERR_"))
        found = rows.group_by(SOURCE_KEY, use_threads=False).aggregate([("is_open", "any")])
        pairs = _digest_pairs(found["source"].to_pylist(), found["input_sha256"].to_pylist())
        is_open = np.asarray(found["is_open_any"].to_numpy(), np.bool_)
        self._add(pairs[~is_open], is_open=False)
        self._held.append(pairs[is_open])

    def _end_commit(self) -> None:
        """What is open comes last of its commit, and so counts: a source may lie across the border of two pieces."""
        for pairs in self._held:
            self._add(pairs, is_open=True)
        self._held = []

    def _add(self, pairs: Digests, *, is_open: bool) -> None:
        self._pairs += pairs.tobytes()
        self._is_open += bytes([is_open]) * len(pairs)

    def settle(self) -> tuple[Digests, BoolArray]:
        """Each source and bytes once, sorted, and whether they are done; forgets the rest."""
        self._end_commit()
        pairs, is_open = np.frombuffer(self._pairs, f"S{PAIR_BYTES}"), np.frombuffer(self._is_open, np.bool_)
        order = np.argsort(pairs, kind="stable")  # of equal ones the newest comes last
        pairs, is_done = pairs[order], ~is_open[order]
        self._pairs, self._is_open = bytearray(), bytearray()
        is_newest = np.append(pairs[1:] != pairs[:-1], True)[: len(pairs)]
        return (pairs, is_done) if is_newest.all() else (pairs[is_newest], is_done[is_newest])


class _Halves:
    """First halves of sources' digests, each once. Merged when they have doubled: most of a night's are known."""

    def __init__(self) -> None:
        self._merged = _digest([], HALF_BYTES)
        self._fresh: list[Digests] = []
        self._num_fresh = 0

    def note(self, column: Any) -> None:
        """Add a column of sources."""
        self._fresh.append(_digest(column.unique().to_pylist(), HALF_BYTES))
        self._num_fresh += len(self._fresh[-1])
        if self._num_fresh > len(self._merged):
            self.collect()

    def collect(self) -> Digests:
        """All so far, sorted."""
        self._merged = np.unique(np.concatenate([self._merged, *self._fresh]))
        self._fresh, self._num_fresh = [], 0
        return self._merged


def _digest_pairs(keys: Sequence[str], input_sha256: Sequence[str]) -> Digests:
    halves = np.empty((len(keys), 2), f"S{HALF_BYTES}")
    halves[:, 0] = _digest(keys, HALF_BYTES)
    halves[:, 1] = _digest(map("\0".join, zip(keys, input_sha256, strict=True)), HALF_BYTES)
    return halves.view(f"S{PAIR_BYTES}").ravel()


def _take_halves(pairs: Digests) -> Digests:
    return pairs.view(f"S{HALF_BYTES}")[::2]


def _digest(texts: Iterable[str], num_bytes: int) -> Digests:
    joined = b"".join(hashlib.blake2b(text.encode(), digest_size=num_bytes).digest() for text in texts)
    return np.frombuffer(joined, f"S{num_bytes}")


def _find_places(found: Digests, wanted: Digests) -> NDArray[np.intp]:
    """Where in a sorted array each digest is, or would be."""
    return np.minimum(np.searchsorted(found, wanted), max(len(found) - 1, 0))


def _is_equal(found: Digests, places: NDArray[np.intp], wanted: Digests) -> BoolArray:
    """Whether each digest is where it would be."""
    return found[places] == wanted if len(found) else np.zeros(len(wanted), np.bool_)
