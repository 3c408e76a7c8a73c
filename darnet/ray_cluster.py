"""The cluster this job runs on, and the one operator that training and scoring share: sources in, decoded scans out."""

import atexit
import functools
import logging
import os
import pickle
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, TypeVar

import numpy as np
import ray
import ray.data
from ray.data import DataContext, Dataset
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import AuthenticationError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from darnet.decoded_scan import DecodedScan, pack_scan, size_block
from darnet.errors import RunError, Status, UsageError, name_defect
from darnet.ingest import Ingester
from darnet.pseudonym import OPEN_KEYS, PSEUDONYM_VARIABLE, KeyNames, mark_secret, read_secret
from darnet.ray_backpressure import bound_waiting
from darnet.ray_token import asks_for_token, list_addresses, list_nodes, refuse_open_cluster, refuse_open_node
from darnet.reading.road import Road
from darnet.scan import IngestedScan, Source
from darnet.storage import Store

AnswerT = TypeVar("AnswerT")
SOURCES_PER_TASK = 8
TASKS_PER_READER = 2  # in a short night, so that all end at about the same time
MAX_TASKS = 10_000  # Source: ours; the driver keeps some 20 KB of each
STANDSTILL_S = 86_400  # Source: ours; machines with GPUs may be waited for that long, and by Ray's default half an hour
TOKEN_REMEDY = (
    "set RAY_AUTH_MODE=token, copy what `ray get-auth-token` says on its head to ~/.ray/auth_token, and unset "
    "RAY_AUTH_TOKEN and RAY_AUTH_TOKEN_PATH, which go before that file"
)
SECRET_REMEDY = "set the same on the machine of the driver and on every node before `ray start`, or on none"


def connect() -> None:
    """Join the cluster of RAY_ADDRESS, or start one in this process; a session already joined is kept.

    Raises: UsageError as `_join_cluster`, if any of several machines asks for no token, or if a session without
        RAY_ADDRESS has a single CPU; RunError if a machine does not say whether it asks, if no cluster starts here, or
        if that of RAY_ADDRESS has no two CPUs now: one whose machines come and go may have them another time.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if address == "local":  # Ray's word for a cluster of its own
        address = ""
    if not ray.is_initialized():
        atexit.register(_leave_stdout)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else every actor pool logs a false alarm
        if address:
            _join_cluster(address)
        else:
            _start_local()
        refuse_open_cluster(list_addresses(), lambda: ask_every_node(asks_for_token))
    if ray.cluster_resources().get("CPU", 0) < 2:
        told = "the cluster has fewer than 2 CPUs, and decoding and the network need one each"
        if not address:
            raise UsageError(f"{told}; start it with two")
        raise RunError(
            f"{told}; if it is still starting, or its spot machines were reclaimed, start the same command again when "
            "a worker is up (`ray status`)"
        )
    for name in ("ray.data", "ray.data._internal.progress"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # an error is raised as well, and told without its text


def _leave_stdout() -> None:
    """What Ray still has to tell of its workers' deaths when the interpreter exits would follow a job's summary."""
    sys.stdout = sys.stderr


def _join_cluster(address: str) -> None:
    """Raises: UsageError if no cluster answers there, or none of this Ray, this Python and this process's token."""
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.WARNING)
    except ConnectionError as error:
        told = "no Ray cluster answers there; start it, or if it asks for another token than this process has, "
        raise UsageError(f"RAY_ADDRESS={address}: {told}{TOKEN_REMEDY}") from error
    except AuthenticationError as error:
        raise UsageError(f"RAY_ADDRESS={address}: this process has no token for it; {TOKEN_REMEDY}") from error
    except RuntimeError as error:  # Ray has none of its own for another version
        told = " ".join(str(error).split())
        if "version mismatch" not in told.lower():
            raise
        raise UsageError(f"RAY_ADDRESS={address}: {told}; install the same Python and Ray here and there") from error


def _start_local() -> None:
    """A cluster of this machine alone that ends with this process. Two CPUs are the least it needs.

    Its processes listen on every address of the machine, and ask for a token: one in the environment of this process
    and its children, unless RAY_AUTH_MODE is set, by which Ray goes then.

    Raises: RunError if one of its processes died or took too long, as on a busy machine.
    """
    if not os.environ.get("RAY_AUTH_MODE"):
        os.environ.pop("RAY_AUTH_MODE", None)  # an empty one would be none to Ray, and no token asked for
        if not (os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")):
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # else Ray would write one to the home folder
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process a fold; nobody preempts this machine
    try:
        ray.init(
            "local",
            num_cpus=max(os.cpu_count() or 1, 2),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:  # Ray has none of its own for it
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(f"no Ray cluster started on this machine ({told}); start the same command again") from error


def find_dashboard() -> str:
    """Host and port of the cluster's dashboard, empty if it has none."""
    return ray.init(ignore_reinit_error=True, logging_level=logging.ERROR).dashboard_url or ""


def count_resource(name: str) -> float:
    """How much of a resource ("CPU", "GPU") the cluster has."""
    return float(ray.cluster_resources().get(name, 0.0))


def agree_on_secret() -> str | None:
    """The mark of the secret for pseudonyms, which this process and every node must share; None if none has any.

    Raises: UsageError naming the nodes that have another or none: one patient would get two keys in the table;
        RunError naming those that do not say.
    """
    own = mark_secret(read_secret())
    for address, mark in ask_every_node(read_mark):
        if isinstance(mark, UsageError):
            raise UsageError(f"node {address}: {mark}")
        if mark != own:
            raise UsageError(f"node {address} has {_compare_secrets(own, mark)}; {SECRET_REMEDY}")
    return own


def ask_nodes(question: Callable[[], AnswerT]) -> Iterator[tuple[str, AnswerT]]:
    """What each node answers, under its address; nothing of one that is lost meanwhile or cannot answer."""
    return ((node["NodeManagerAddress"], answer) for node, answers in _ask(question) for answer in answers)


def ask_every_node(question: Callable[[], AnswerT]) -> Iterator[tuple[str, AnswerT]]:
    """The same, but nobody may be silent: who does not say whether it asks for a token may ask for none.

    Raises: RunError, after the last answer, naming the nodes that gave none and are alive all the same.
    """
    silent = {}
    for node, answers in _ask(question):
        yield from ((node["NodeManagerAddress"], answer) for answer in answers)
        if not answers:
            silent[node["NodeID"]] = node["NodeManagerAddress"]
    if left := sorted({silent[node["NodeID"]] for node in list_nodes() if node["NodeID"] in silent}):
        raise RunError(
            f"node {', '.join(left)} does not answer; install the same darnet and Python there as here, or look at the "
            "log of that node, and start again"
        )


def _ask(question: Callable[[], AnswerT]) -> Iterator[tuple[dict[str, Any], list[AnswerT]]]:
    """Each node with its answer, or with none. Several nodes may have one address."""
    ask: Any = ray.remote(num_cpus=0)(_answer)
    asked = []
    for node in list_nodes():
        place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked.append((node, ask.options(scheduling_strategy=place).remote(question)))
    for node, answer in asked:
        try:
            answers = [ray.get(answer)]
        except RayError:
            answers = []
        yield node, answers


def _answer(question: Callable[[], AnswerT]) -> AnswerT:
    """What runs on a node: Ray itself takes plain functions alone, and no partial ones."""
    return question()


def read_mark() -> str | UsageError | None:
    """The mark of this node's secret, or what is wrong with it: Ray would strip an error of its type."""
    try:
        return mark_secret(read_secret())
    except UsageError as error:
        return error


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """How sources are read on the cluster: `num_cpus` are counted for each, and scans go on in batches.

    Where actors take them, no task that decodes is begun while `max_waiting` scans wait.
    """

    num_cpus: float
    batch_size: int
    max_waiting: int | None = None


def decode_sources(sources: Sequence[Source], store: Store, road: Road, num_cpus: float) -> Dataset:
    """A lazy data set with one row a scan, as of `pack_scan`."""
    items = [{"source": pickle.dumps(source)} for source in sources]
    num_tasks = -(-len(items) // count_task_sources(len(items), 1, count_resource("CPU") / num_cpus))
    return _decode(items, num_tasks, decode_row, store, road, DecodePlan(num_cpus, 1))


def decode_planned(
    places: Sequence[int],
    read: Callable[[Sequence[int]], list[Source]],
    store: Store,
    road: Road,
    how: DecodePlan,
) -> Dataset:
    """As `decode_sources`, of sources that are known here by their places in a plan alone, and read by the workers.

    So a driver holds nothing of their objects, of which a night may have millions. A block has the scans of a batch.
    """
    step = count_task_sources(len(places), how.batch_size, count_resource("CPU") / how.num_cpus)
    items = [{"places": list(places[start : start + step])} for start in range(0, len(places), step)]
    return _decode(items, max(len(items), 1), functools.partial(decode_places, read=read), store, road, how)


def count_task_sources(num_sources: int, batch_size: int, num_readers: float) -> int:
    """Sources that a task reads: equal parts of a batch or whole ones, so that batches are made of whole blocks.

    The scans that a block has beyond a batch would be a batch by themselves, which a GPU pads. As many as
    `SOURCES_PER_TASK` or fewer, unless parts of that size are none or the plan is too long; sources of several scans
    are not foreseen.
    """
    share = num_sources // max(int(TASKS_PER_READER * num_readers), 1)
    wanted = max(min(share, SOURCES_PER_TASK), -(-num_sources // MAX_TASKS), 1)
    parts = [part for part in range(1, batch_size) if batch_size % part == 0]
    fitting = [*parts, *range(batch_size, wanted + batch_size, batch_size)]
    below: int = max(step for step in fitting if step <= wanted)
    above: int = min(step for step in fitting if step >= wanted)
    has_small_parts = 2 * below < wanted and num_sources >= above * num_readers
    return above if has_small_parts or below * MAX_TASKS < num_sources else below


def _decode(
    items: list[dict[str, Any]],
    num_tasks: int,
    decode: Callable[..., Iterable[dict[str, Any]]],
    store: Store,
    road: Road,
    how: DecodePlan,
) -> Dataset:
    """`decode` of every item, where there is room."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = size_block(road.volume, how.batch_size)
    bound_waiting(context, how.max_waiting)
    context.execution_no_progress_timeout_s = STANDSTILL_S
    decode = functools.partial(decode, store=store, road=replace(road, pseudonym_key=None))
    return ray.data.from_items(items, override_num_blocks=num_tasks).flat_map(decode, num_cpus=how.num_cpus)  # type: ignore[arg-type]  # an iterator is fine


def iterate_blocks(dataset: Dataset) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    """Run a data set and yield its blocks as they come. What is printed meanwhile goes to people, on stderr.

    Raises: RunError if the cluster gives up.
    """
    try:
        with redirect_stdout(sys.stderr):  # where Ray tells of its workers' deaths, asked or not
            for batch in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
                assert isinstance(batch, dict)
                yield batch
    except RayError as error:
        raise RunError(f"the cluster gave up: {_spell_end(error)}") from error
    except ExecutionTimeoutError as error:
        raise RunError(
            "nothing went on for as long as may be: no actor came, or one hangs; look at the nodes, and start the same "
            "command again"
        ) from error


def _spell_end(error: RayError) -> str:
    """What Ray says of a lost worker or node; of an exception in one, its kind and place."""
    is_defect = isinstance(error, RayTaskError) or 'File "' in str(error)
    return name_defect(error) if is_defect else str(error)


def decode_row(row: dict[str, Any], store: Store, road: Road) -> list[dict[str, Any]]:
    """What a worker does with one source: a row for each of its scans, or one with what must stop the job."""
    source: Source = pickle.loads(row["source"])
    return _decode_source(source, store, road)


def decode_places(
    row: dict[str, Any], read: Callable[[Sequence[int]], list[Source]], store: Store, road: Road
) -> Iterator[dict[str, Any]]:
    """What a worker does with some places of a plan: the rows of their sources as they come.

    While a source is decoded the next one is fetched, where the store is remote.
    """
    try:
        sources = read(row["places"])
    except RunError as error:
        yield _pack_failure(Source("", ()), error, road)
        return
    try:
        for source, following in zip_longest(sources, sources[1:]):
            yield from _decode_source(source, store, road, following)
    finally:  # of a task that nobody reads on: whatever is ahead is of no other
        with suppress(RunError):
            _keep_ingester(store, road)[0].drop_ahead()  # type: ignore[arg-type]


def _decode_source(source: Source, store: Store, road: Road, following: Source | None = None) -> list[dict[str, Any]]:
    try:
        ingester, names = _keep_ingester(store, road)  # type: ignore[arg-type]  # every store is a frozen value
        scans = ingester.ingest(source, following)
    except RunError as error:
        return [_pack_failure(source, error, road)]
    except Exception as error:  # Ray would write its text to its logs, and to the driver's stderr
        node = ray.util.get_node_ip_address()
        defect = RunError(f"node {node}: decoding ended in an unexpected {name_defect(error)}")
        return [_pack_failure(source, defect, road)]
    told = (source.key, names.name_source(source.key), source.input_sha256, len(scans))
    named = [replace(scan, scan_id=names.name_scan(scan.scan_id)) for scan in scans]
    return [pack_scan(DecodedScan(*told, scan), road.volume) for scan in named]


def _pack_failure(source: Source, error: RunError, road: Road) -> dict[str, Any]:
    scan = IngestedScan(source.key, Status.ERR_STORAGE, str(error))
    return pack_scan(DecodedScan(source.key, "", source.input_sha256, 1, scan, error), road.volume)


@functools.lru_cache(maxsize=1)
def _keep_ingester(store: Store, road: Road) -> tuple[Ingester, KeyNames]:
    """A worker keeps its decoding child from row to row, and how scans are named.

    The secret comes from this node's own environment.

    Raises: UsageError as `refuse_open_node`, and if the node has not the secret of the road's mark.
    """
    refuse_open_node()
    if road.secret_mark is None:
        return Ingester(store, road), OPEN_KEYS
    secret = read_secret()
    if mark_secret(secret) != road.secret_mark:
        node = ray.util.get_node_ip_address()
        raise UsageError(f"node {node} has {_compare_secrets(road.secret_mark, mark_secret(secret))}; {SECRET_REMEDY}")
    return Ingester(store, replace(road, pseudonym_key=secret)), KeyNames(secret) if road.hides_keys else OPEN_KEYS


def _compare_secrets(own: str | None, other: str | None) -> str:
    if other is None:
        return f"no {PSEUDONYM_VARIABLE}, which the driver has"
    return f"{'another' if own else 'a'} {PSEUDONYM_VARIABLE} {'than the driver' if own else 'and the driver none'}"
