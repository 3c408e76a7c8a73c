"""Tries the cluster of RAY_ADDRESS, where one is named, and its machines: the environment enters, findings leave."""

import functools
import ipaddress
import os
from collections.abc import Callable
from dataclasses import replace

import ray

from darnet.checkup.findings import Check, CheckError, Finding, Verdict, examine
from darnet.checkup.machine import check_bundle_on_gpu, examine_machine
from darnet.checkup.places import Trial, check_reach
from darnet.config import ScoreConfig
from darnet.ray_cluster import (
    agree_on_secret,
    ask_every_node,
    ask_nodes,
    connect,
    count_resource,
    find_dashboard,
)
from darnet.ray_token import AUTH_REMEDY, asks_for_token, list_addresses, list_nodes
from darnet.store import Store


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


def examine_machines(
    archive: Store | None, model: Store | None, trial: Trial | None, config: ScoreConfig
) -> list[Finding]:
    """Of every machine of the cluster that was joined, else of this one alone; what several have alike is one line.

    Machines of a cluster are tried as readers of the places too, of which the driver's word says nothing.
    """
    if not (os.environ.get("RAY_ADDRESS") and ray.is_initialized()):
        return examine_machine()
    question = functools.partial(_examine_node, archive, model, trial, config)
    answers: dict[str, list[Finding]] = {}
    (heard,) = examine([("machine: answers", lambda: _hear_all(question, answers))])
    alike: dict[Finding, list[str]] = {}
    for address, findings in sorted(answers.items()):
        for finding in findings:
            alike.setdefault(finding, []).append(address)
    found = [
        replace(finding, told=f"{', '.join(addresses)}: {finding.told}")
        for finding, addresses in sorted(alike.items(), key=lambda item: item[0].check)
    ]
    return found if heard.verdict is Verdict.FINE else [*found, heard]


def _hear_all(question: Callable[[], list[Finding]], answers: dict[str, list[Finding]]) -> str:
    """Put what each machine says into `answers`, also of those that were heard before Ray failed.

    Raises: CheckError naming who said nothing.
    """
    answers.update(ask_nodes(question))
    if silent := sorted(list_addresses() - answers.keys()):
        remedy = "install the same darnet and Python there as here, or look at that node's log"
        raise CheckError(f"{', '.join(silent)}: gave no answer", remedy)
    return "every machine"


def _examine_node(
    archive: Store | None, model: Store | None, trial: Trial | None, config: ScoreConfig
) -> list[Finding]:
    groups = [*check_reach(archive, trial), check_bundle_on_gpu(model, config)]
    return examine_machine() + [finding for group in groups for finding in examine(group)]


def _join() -> str:
    address = os.environ.get("RAY_ADDRESS")
    connect()
    if not address:
        remedy = "to try the cluster, start the check-up there: ray job submit --working-dir . -- python -m jobs.doctor"
        raise CheckError("none named by RAY_ADDRESS, so one on this machine was tried", remedy, Verdict.MIND)
    return f"Ray {ray.__version__}; RAY_ADDRESS={address}"


def _look_at_auth() -> str:
    """Several machines without a token were refused on joining. One listens where its address says."""
    if _is_closed():
        return "RAY_AUTH_MODE=token, here and on every node"
    if within_reach := sorted(address for address in list_addresses() if not _is_loopback(address)):
        told = f"{', '.join(within_reach)} asks nobody for a token, and who reaches it may run programs there"
        remedy = f"{AUTH_REMEDY}, before other machines join; until then keep its ports from others by a firewall"
        raise CheckError(told, remedy, Verdict.MIND)
    return "listens on loopback, which this machine alone reaches"


def _is_closed() -> bool:
    return asks_for_token() and all(is_closed for _, is_closed in ask_every_node(asks_for_token))


def _look_at_dashboard() -> str:
    """Whoever reaches the dashboard's port may start jobs, and with them any program."""
    address = find_dashboard()
    if not address:
        return "none"
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost" or _is_loopback(host):
        return f"{address}, which only the head's own machine reaches"
    if _is_closed():
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
    nodes = len(list_nodes())
    return f"{nodes} node{'s' * (nodes != 1)}, {count_resource('CPU'):g} CPUs, {count_resource('GPU'):g} GPUs"
