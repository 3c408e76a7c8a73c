"""What a policy of AWS allows: as much of its language as the README's policies speak.

Source: the IAM user guide, policy evaluation logic: what no statement allows is denied. A condition on a key that the
request has not is met by `Null: true` alone.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

NOTHING: Mapping[str, str] = {}


def is_allowed(policy: Mapping[str, Any], action: str, resource: str, context: Mapping[str, str] = NOTHING) -> bool:
    """Whether a request for this action on this resource, with these keys, is let through."""
    return any(
        _matches(statement["Action"], action)
        and _matches(statement["Resource"], resource)
        and all(
            _is_met(operator, wanted, context.get(key))
            for operator, terms in statement.get("Condition", {}).items()
            for key, wanted in terms.items()
        )
        for statement in policy["Statement"]
        if statement["Effect"] == "Allow"
    )


def _is_met(operator: str, wanted: str | list[str], given: str | None) -> bool:
    if operator == "Null":
        return wanted == ("true" if given is None else "false")
    assert operator in ("StringEquals", "StringLike")
    if given is None:
        return False
    return _matches(wanted, given) if operator == "StringLike" else given in _list(wanted)


def _matches(patterns: str | list[str], name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _list(patterns))


def _list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value
