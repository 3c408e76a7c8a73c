"""Where the rows of a run come from and how they are named goes in; a refusal of what does not fit a table comes out.

The rules are all here: a table is of one archive, names its scans in one way, and has patients' keys of one secret.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Self

from darnet.errors import RunError, UsageError
from darnet.pseudonym import HIDDEN_KEY, OPEN_KEYS, PSEUDONYM_VARIABLE, KeyNames, mark_secret, read_secret

ORIGIN = "origin"


@dataclass(frozen=True)
class Origin:
    """What the runs into one table share; each of its objects says it.

    `archive` is an address, and `moved_from` the one it had before, if a person said so. `names` is the scheme of
    `KeyNames`; `secret_mark` that of the secret under which patients' and series' keys are made, empty where they are
    null.
    """

    archive: str
    names: str = ""
    secret_mark: str = ""
    moved_from: str = ""

    @classmethod
    def here(cls, archive: str, names: KeyNames, moved_from: str = "") -> Self:
        """Of a run that this machine begins.

        Raises: UsageError as `read_secret`.
        """
        return cls(archive, names.scheme, mark_secret(read_secret()) or "", moved_from.rstrip("/"))

    def recall_names(self) -> KeyNames:
        """How this run names sources and scans.

        Raises: UsageError if that takes a secret which this machine has not.
        """
        names = KeyNames(read_secret()) if self.names else OPEN_KEYS
        if names.scheme != self.names:
            raise UsageError(
                f"the run names its scans by digests under a {PSEUDONYM_VARIABLE} that this machine has not; set the "
                "one it was scored with"
            )
        return names

    def to_metadata(self) -> dict[str, str]:
        """What a published object says of it."""
        return {ORIGIN: json.dumps(asdict(self))}

    @classmethod
    def from_metadata(cls, metadata: Mapping[bytes, bytes]) -> Self | None:
        """None if the object does not say; ValueError or TypeError for what `to_metadata` did not write."""
        told = metadata.get(ORIGIN.encode())
        return None if told is None else cls(**json.loads(told))

    def demand_own_names(self, rows: Iterable[str]) -> None:
        """Raises: RunError, which tells no name, if a row of this run is named in another way than the run says."""
        for name in rows:
            if not name.startswith(self.names):
                raise RunError("results rows are wrong: they are not named as their run says; nothing is published")

    def refuse_object(self, other: "Origin | None", names: Iterable[str]) -> None:
        """Refuse an object of the table that is named in another way, or has patients' keys of another secret.

        What has no patients' keys goes with any secret: its nulls claim nothing. `names` are of the object's rows, for
        one that says nothing of its origin.
        Raises: UsageError.
        """
        theirs = next(iter(names), self.names) if other is None else other.names
        is_hidden = theirs.startswith(HIDDEN_KEY)
        if is_hidden != bool(self.names) or not theirs.startswith(self.names):
            others = "--scan-id hmac" if is_hidden else "the keys of the archive"
            secret = f" and another {PSEUDONYM_VARIABLE}" if self.names and is_hidden else ""
            raise UsageError(
                f"the table names its scans by {others}{secret}: score into it in the same way, or into a table of its "
                "own; each scan would be in it twice"
            )
        if other is not None and other.secret_mark not in ("", self.secret_mark):
            own = "another" if self.secret_mark else "no"
            raise UsageError(
                f"the table's patient keys are made under a {PSEUDONYM_VARIABLE}, and this machine has {own} one: one "
                "patient would get two keys. Set that one on every node, or score into a table of its own"
            )

    def refuse_archive(self, newest: "Origin | None") -> None:
        """Refuse a table whose newest object is of another archive, unless that moved.

        Raises: UsageError.
        """
        if newest is not None and newest.archive not in (self.archive, self.moved_from):
            raise UsageError(
                f"the table is of the archive {newest.archive}, not of {self.archive}: one key in both would be one "
                f"scan. Score into a table of its own; or, if the archive moved, add --archive-moved-from "
                f"{newest.archive} until a night has published"
            )
