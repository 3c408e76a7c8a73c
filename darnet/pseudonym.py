"""Identifiers and a node's own secret enter; keyed digests leave, and nothing that tells the secret."""

import hmac
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256

from darnet.errors import UsageError

PSEUDONYM_VARIABLE = "DARNET_PSEUDONYM_KEY"
HIDDEN_KEY = "hmac:"
MIN_KEY_BYTES = 32  # Source: RFC 2104 sec. 3: not below the 32 bytes of SHA-256


def read_secret(environment: Mapping[str, str] = os.environ) -> bytes | None:
    """The secret of this node's environment, None where there is none.

    Raises: UsageError if it is too short to keep anything secret.
    """
    secret = environment.get(PSEUDONYM_VARIABLE, "").encode("utf-8", "surrogateescape")
    if 0 < len(secret) < MIN_KEY_BYTES:
        raise UsageError(
            f"{PSEUDONYM_VARIABLE} is shorter than {MIN_KEY_BYTES} bytes: whoever tries keys finds it; take a longer "
            "one, such as of `openssl rand -hex 32`, on every node"
        )
    return secret or None


def pseudonymise(value: str, secret: bytes | None) -> str | None:
    """HMAC-SHA256 of an identifier's UTF-8 in hex; None without a secret or a value."""
    if secret is None or not value:
        return None
    return hmac.new(secret, value.encode("utf-8", "surrogateescape"), sha256).hexdigest()


def mark_secret(secret: bytes | None) -> str | None:
    """What tells one secret from another without telling it, None of none: nodes are compared by it."""
    return None if secret is None else hmac.new(secret, b"which secret of plain digests", sha256).hexdigest()[:16]


@dataclass(frozen=True)
class KeyNames:
    """How a table names sources and scans: by their keys in the archive or, with a secret, by keyed digests of those.

    A digest begins with `scheme`, which tells the secret's mark: a table of two schemes would hold each scan twice.
    """

    secret: bytes | None = field(default=None, repr=False)

    @property
    def scheme(self) -> str:
        """What every name begins with; nothing where names are keys."""
        return "" if self.secret is None else f"{HIDDEN_KEY}{mark_secret(self.secret)}:"

    def name_source(self, key: str) -> str:
        """The table's `source`."""
        return key if self.secret is None else f"{self.scheme}{pseudonymise(key, self.secret)}"

    def name_scan(self, scan_id: str) -> str:
        """The table's `scan_id`."""
        return scan_id if self.secret is None else f"{self.scheme}{pseudonymise(scan_id, self.secret)}"


OPEN_KEYS = KeyNames()


def choose_names(kind: str) -> KeyNames:
    """Names of kind `key` or `hmac`.

    Raises: UsageError if there is no secret for digests.
    """
    if kind == "key":
        return OPEN_KEYS
    secret = read_secret()
    if secret is None:
        raise UsageError(f"--scan-id hmac needs {PSEUDONYM_VARIABLE}, on the driver's machine and on every node")
    return KeyNames(secret)
