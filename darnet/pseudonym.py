"""Identifiers and a node's own secret enter; keyed digests leave, and nothing that tells the secret."""

import hmac
import os
from collections.abc import Mapping
from hashlib import sha256

from darnet.errors import UsageError

PSEUDONYM_VARIABLE = "DARNET_PSEUDONYM_KEY"
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


def pseudonymise(value: str, kind: str, secret: bytes | None) -> str | None:
    """HMAC-SHA256 of an identifier in hex; None without a secret or a value."""
    if secret is None or not value:
        return None
    return hmac.new(secret, f"{kind}\0{value}".encode("utf-8", "surrogateescape"), sha256).hexdigest()


def mark_secret(secret: bytes | None) -> str | None:
    """What tells one secret from another without telling it, None of none: nodes are compared by it."""
    return None if secret is None else hmac.new(secret, b"which secret is this", sha256).hexdigest()[:16]
