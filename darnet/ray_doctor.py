"""Tries the cluster of RAY_ADDRESS, where one is named: the environment enters, checks leave."""

import ipaddress
import os

import ray

from darnet.checkup.findings import Check, CheckError, Verdict
from darnet.ray_cluster import agree_on_secret, connect, count_resource, find_dashboard, list_nodes


def check_cluster() -> list[list[Check]]:
    """Does a cluster answer, is it closed to strangers, and has it room for decoding and a network?"""
    return [
        [
            ("cluster: answers", _join),
            ("cluster: closed to strangers", _look_at_auth),
            ("cluster: dashboard", _look_at_dashboard),
            ("cluster: key of pseudonyms", _look_at_secrets),
            ("cluster: room", _look_at_room),
        ]
    ]


def _join() -> str:
    address = os.environ.get("RAY_ADDRESS")
    connect()
    where = f"RAY_ADDRESS={address}" if address else "none named by RAY_ADDRESS, so jobs start one on this machine"
    return f"Ray {ray.__version__}; {where}"


def _look_at_auth() -> str:
    """Several machines without a token were refused on joining."""
    mode = os.environ.get("RAY_AUTH_MODE", "disabled")
    if mode == "token":
        return "RAY_AUTH_MODE=token"
    if os.environ.get("RAY_ADDRESS"):
        remedy = "set RAY_AUTH_MODE=token before other machines join"
        raise CheckError("one machine without a token", remedy, Verdict.MIND)
    return "on this machine alone"


def _look_at_dashboard() -> str:
    """Whoever reaches the dashboard's port may start jobs, and with them any program."""
    address = find_dashboard()
    if not address:
        return "none"
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost" or _is_loopback(host):
        return f"{address}, which only the head's own machine reaches"
    if os.environ.get("RAY_AUTH_MODE") == "token":
        return f"{address}, which asks for the token"
    remedy = "start the head with --dashboard-host=127.0.0.1, or set RAY_AUTH_MODE=token on every node"
    raise CheckError(f"{address} lets whoever reaches it start programs", remedy)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def _look_at_secrets() -> str:
    return "the same on every node" if agree_on_secret() else "none on any node: patient_key and series_key are null"


def _look_at_room() -> str:
    return f"{len(list_nodes())} nodes, {count_resource('CPU'):g} CPUs, {count_resource('GPU'):g} GPUs"
