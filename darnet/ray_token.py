"""The nodes of the cluster that was joined enter; an error leaves where one asks nobody for a token."""

import os
from collections.abc import Callable, Iterable, Set
from typing import Any

import ray

from darnet.errors import UsageError

AUTH_REMEDY = (
    "set RAY_AUTH_MODE=token for `ray start` on every node and for this job, and share the token that "
    "`ray get-auth-token --generate` makes"
)


def refuse_open_cluster(addresses: Set[str], ask: Callable[[], Iterable[tuple[str, bool]]]) -> None:
    """Demand a token of several machines, of this process's and of each that `ask` asks whether it wants one.

    Raises: UsageError where one wants none: who reaches it runs code among patients' scans.
    """
    if len(addresses) < 2:
        return
    if not asks_for_token():
        raise UsageError(f"the cluster has {len(addresses)} machines and asks nobody for a token; {AUTH_REMEDY}")
    if lax := sorted({address for address, is_closed in ask() if not is_closed}):
        raise UsageError(
            f"the cluster has {len(addresses)} machines, of which {', '.join(lax)} need no token; {AUTH_REMEDY}"
        )


def refuse_open_node() -> None:
    """Demand a token of the node this worker runs on, which may have joined in mid-run.

    Raises: UsageError where it wants none and is not the only machine.
    """
    if not ray.is_initialized() or asks_for_token():
        return
    if (num_machines := len(list_addresses())) > 1:
        node = ray.util.get_node_ip_address()
        raise UsageError(f"node {node} needs no token, in a cluster of {num_machines} machines; {AUTH_REMEDY}")


def asks_for_token() -> bool:
    """Whether what runs in this process's environment wants a token of whoever reaches it."""
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def list_nodes() -> list[dict[str, Any]]:
    """The nodes that are alive, as Ray describes them."""
    return [node for node in ray.nodes() if node["Alive"]]


def list_addresses() -> set[str]:
    """The machines of the nodes that are alive."""
    return {node["NodeManagerAddress"] for node in list_nodes()}
