"""Tries the cluster of RAY_ADDRESS, where one is named: the environment enters, checks leave."""

import os
from typing import Any

import ray

from darnet.checkup.findings import Check, CheckError, Verdict
from darnet.ray_cluster import connect, count_resource


def check_cluster() -> list[list[Check]]:
    """Does a cluster answer, is it closed to strangers, and has it room for decoding and a network?"""
    return [
        [
            ("cluster: answers", _join),
            ("cluster: closed to strangers", _look_at_auth),
            ("cluster: room", _look_at_room),
        ]
    ]


def _join() -> str:
    address = os.environ.get("RAY_ADDRESS")
    connect()
    where = f"RAY_ADDRESS={address}" if address else "none named by RAY_ADDRESS, so jobs start one on this machine"
    return f"Ray {ray.__version__}; {where}"


def _look_at_auth() -> str:
    addresses = {node["NodeManagerAddress"] for node in _list_nodes()}
    mode = os.environ.get("RAY_AUTH_MODE", "disabled")
    if mode == "token":
        return "RAY_AUTH_MODE=token"
    if len(addresses) > 1:
        remedy = "set RAY_AUTH_MODE=token on all nodes and here, and share the token of `ray get-auth-token --generate`"
        raise CheckError(f"{len(addresses)} machines, and whoever reaches them may run code", remedy)
    if os.environ.get("RAY_ADDRESS"):
        remedy = "set RAY_AUTH_MODE=token before other machines join"
        raise CheckError("one machine without a token", remedy, Verdict.MIND)
    return "on this machine alone"


def _look_at_room() -> str:
    return f"{len(_list_nodes())} nodes, {count_resource('CPU'):g} CPUs, {count_resource('GPU'):g} GPUs"


def _list_nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]
