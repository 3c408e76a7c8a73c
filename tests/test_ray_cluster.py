"""What a cluster must agree to before anything is scored: who may reach it, and one secret of pseudonyms."""

import functools
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import date
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from ray.exceptions import AuthenticationError

from darnet.archive import list_sources
from darnet.config import DecodeConfig, ScoreConfig, VolumeConfig
from darnet.decoded_scan import unpack_scan
from darnet.errors import ExitCode, RunError, Status, UsageError
from darnet.manifest import RunFacts
from darnet.pseudonym import PSEUDONYM_VARIABLE, mark_secret
from darnet.ray_cluster import MAX_TASKS, count_task_sources
from darnet.reading.road import Road
from darnet.scan import IngestedScan
from darnet.storage_local import LocalStore
from tests.block_fixtures import make_block
from tests.bundle_fixtures import write_random_bundle
from tests.ct_fixtures import write_chest
from tests.places import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("default")]

SECRET = "a secret of thirty-two bytes or more"


def score(folder: Path) -> tuple[int, dict[str, Any], str]:
    """Exit code, summary and what was told of a night on one chest."""
    places = [f"--{name}={folder / name}" for name in ("archive", "model", "results")]
    command = [sys.executable, "-m", "jobs.score", *places]
    job = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300, check=False)
    return job.returncode, json.loads(job.stdout.splitlines()[-1]), job.stderr


def add_node(cluster: Any, secret: str, **arguments: Any) -> Mapping[str, Any]:
    node: Mapping[str, Any] = cluster.add_node(num_cpus=2, env_vars={PSEUDONYM_VARIABLE: secret}, **arguments)
    return node


@pytest.mark.slow
@pytest.mark.parametrize("other", ["", SECRET[::-1], "k33p-out"])
def test_nodes_of_different_secrets_score_nothing_and_machines_without_a_token_neither(
    other: str, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PSEUDONYM_VARIABLE, SECRET)
    write_chest(tmp_path / "archive" / "chest")
    write_random_bundle(tmp_path / "model")
    add_node(cluster, SECRET)
    add_node(cluster, other)
    code, summary, told = score(tmp_path)
    assert code == summary["exit_code"] == 2
    assert PSEUDONYM_VARIABLE in summary["error"]
    assert SECRET not in told + str(summary)
    assert not list((tmp_path / "results").rglob("part*"))

    add_node(cluster, SECRET, node_ip_address="127.0.0.2")  # another machine, and nobody is asked for a token
    code, summary, _ = score(tmp_path)
    assert code == 2
    assert "2 machines" in summary["error"]
    assert "RAY_AUTH_MODE=token" in summary["error"]


TALKATIVE = """
import time
import ray
from darnet.ray_cluster import connect, iterate_blocks
connect()
from ray._private.utils import publish_error_to_driver
client = ray._private.worker.global_worker.gcs_client
for _ in iterate_blocks(ray.data.range(1)):
    for _ in range(3):
        publish_error_to_driver("worker_died", "a worker died", client)
        time.sleep(1)
print("a summary")
"""


@pytest.mark.slow
def test_nothing_that_ray_tells_of_its_workers_is_on_stdout() -> None:
    """It tells of the first at once, and of others like it when the interpreter exits."""
    done = subprocess.run([sys.executable, "-c", TALKATIVE], cwd=ROOT, text=True, capture_output=True, check=True)
    assert done.stderr.count("a worker died") == 2
    assert done.stdout == "a summary\n"


@pytest.mark.usefixtures("ray_cluster")
def test_what_a_worker_says_of_its_end_is_not_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an exception that nobody expected, from decoding or elsewhere, may be a header's words."""
    import ray

    from darnet import ray_cluster
    from darnet.ray_actor import ScoringActor

    text = tmp_path / "text"  # so that no line of code holds it
    text.write_text("Doe^Jane")

    def read(*_: object) -> float:
        return float(text.read_text())

    ray_cluster.connect()
    with pytest.raises(RunError) as caught:
        list(ray_cluster.iterate_blocks(ray.data.range(2).map(lambda _: {"x": read()})))
    line = read.__code__.co_firstlineno + 1
    assert str(caught.value) == f"the cluster gave up: ValueError at test_ray_cluster.py:{line}"
    told = capfd.readouterr()
    assert "Doe" not in told.out + told.err

    # What decodes and what scores raise nothing, as Ray writes all of it to its own logs.
    store, road = LocalStore(tmp_path / "archive"), Road(VolumeConfig(shape=(8, 16, 16)), DecodeConfig())
    write_chest(tmp_path / "archive" / "chest")
    (source,) = list_sources(store.list_objects())
    (row,) = ray_cluster.decode_row({"source": pickle.dumps(source)}, store, road)
    batch = make_block([row])
    manifest = write_random_bundle(tmp_path / "model", shape=road.volume.shape).manifest
    facts = RunFacts("run", date(2026, 1, 1), manifest, "0")
    model = LocalStore(tmp_path / "model")
    actor = ScoringActor(model, facts, ScoreConfig(), "cpu")
    assert not isinstance(pickle.loads(actor(batch)["row"][0])[2], RunError)
    monkeypatch.setattr("darnet.score.make_row", read)
    ((_, _, failure),) = map(pickle.loads, actor(batch)["row"])
    assert ": scoring ended in an unexpected ValueError at ray_actor.py:" in str(failure)
    monkeypatch.setattr("darnet.bundle.read_model", read)
    ((_, _, failure),) = map(pickle.loads, ScoringActor(model, facts, ScoreConfig(), "cpu")(batch)["row"])
    assert ": ValueError at ray_actor.py:" in str(failure)
    monkeypatch.setattr(ray_cluster.Ingester, "ingest", read)
    (row,) = ray_cluster.decode_row({"source": pickle.dumps(source)}, store, road)
    ray_cluster._keep_ingester.cache_clear()
    failure = unpack_scan(**row).failure
    assert ": decoding ended in an unexpected ValueError at ray_cluster.py:" in str(failure)


def test_a_machine_that_joins_later_is_asked_by_its_own_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was not there when the cluster was; the refusal is the row, or the network's error, that ends the job."""
    from darnet import ray_cluster, ray_token
    from darnet.ray_actor import ScoringActor

    store, road = LocalStore(tmp_path / "archive"), Road(VolumeConfig(shape=(8, 16, 16)), DecodeConfig())
    write_chest(tmp_path / "archive" / "chest")
    (source,) = list_sources(store.list_objects())

    def find_failure(mode: str, *addresses: str) -> RunError | None:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
        monkeypatch.setattr("ray.is_initialized", lambda: True)
        monkeypatch.setattr(ray_token, "list_addresses", lambda: set(addresses))
        monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.0.0.2")
        monkeypatch.setattr(ray_cluster.Ingester, "ingest", lambda *_: [IngestedScan("chest", Status.ERR_GONE, "")])
        ray_cluster._keep_ingester.cache_clear()
        (row,) = ray_cluster.decode_row({"source": pickle.dumps(source)}, store, road)
        ray_cluster._keep_ingester.cache_clear()
        return unpack_scan(**row).failure

    assert find_failure("", "10.0.0.1") is None
    assert find_failure("token", "10.0.0.1", "10.0.0.2") is None
    refused = find_failure("", "10.0.0.1", "10.0.0.2")
    assert isinstance(refused, UsageError)
    told = "node 10.0.0.2 needs no token, in a cluster of 2 machines; set RAY_AUTH_MODE=token"
    assert str(refused).startswith(told)
    manifest = write_random_bundle(tmp_path / "model").manifest
    run = RunFacts("run", date(2026, 1, 1), manifest, "0")
    actor = ScoringActor(LocalStore(tmp_path / "model"), run, ScoreConfig(), "cpu")
    ((_, _, refused),) = map(pickle.loads, actor(pa.table({}))["row"])
    assert isinstance(refused, UsageError)
    assert str(refused).startswith(told)


@pytest.mark.parametrize("shape", [(16, 32, 32), VolumeConfig().shape])
def test_a_block_has_the_rows_of_a_batch(
    shape: tuple[int, int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the buffer in which Ray gathers what a worker yields, be it scans or what is said of those refused."""
    from ray.data._internal.output_buffer import BlockOutputBuffer, OutputBlockSizeOption

    from darnet.decoded_scan import size_block
    from darnet.ray_cluster import decode_row

    monkeypatch.setattr("ray.data._internal.size_estimator._ray_initialized", True)  # it would start a cluster
    write_chest(tmp_path / "chest")
    write_chest(tmp_path / "gap")[7].unlink()
    store, road = LocalStore(tmp_path), Road(VolumeConfig(shape=shape), DecodeConfig())
    sources = [{"source": pickle.dumps(source)} for source in list_sources(store.list_objects())]
    rows = [row for source in sources for row in decode_row(source, store, road)]
    for batch_size in (1, 2, 3, 4, 8):
        buffer = BlockOutputBuffer(OutputBlockSizeOption.of(size_block(road.volume, batch_size)))
        num_rows = []
        for row in islice(cycle(rows), 25):
            buffer.add(row)
            num_rows += [block.num_rows for block in buffer.iter_ready_blocks()]
        assert num_rows == [batch_size] * (25 // batch_size)


@pytest.mark.parametrize("num_readers", [1, 1.5, 2, 16, 500])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 6, 7, 8, 13, 20, 31, 32])
def test_tasks_are_made_of_whole_batches_or_batches_of_whole_tasks(batch_size: int, num_readers: float) -> None:
    for num_sources in (1, 2, 3, 5, 12, 13, 64, 100, 1000, 12_399, 30_000, 50_000, 1_000_003):
        step = count_task_sources(num_sources, batch_size, num_readers)
        assert step % batch_size == 0 or batch_size % step == 0
        num_tasks = -(-num_sources // step)
        assert num_tasks <= MAX_TASKS
        has_enough = num_tasks >= min(num_sources, int(num_readers))
        assert has_enough or num_sources > MAX_TASKS, "some who read have no task, for which there would be room"


@pytest.mark.parametrize(
    ("num_sources", "batch_size", "num_readers", "expected"),
    [
        (12, 4, 2, 2),  # six tasks for two readers, and no batch of one scan
        (1000, 4, 2, 8),
        (1000, 32, 16, 8),  # four tasks make a batch: a worker that dies costs no more
        (1000, 31, 16, 31),  # which has no smaller parts but single sources
        (40, 31, 16, 1),  # unless some would have nothing to read
        (1_000_000, 4, 64, 100),
        (3, 4, 64, 1),
    ],
)
def test_a_task_is_neither_so_long_that_some_wait_nor_so_short_that_nothing_is_fetched_ahead(
    num_sources: int, batch_size: int, num_readers: float, expected: int
) -> None:
    assert count_task_sources(num_sources, batch_size, num_readers) == expected


def test_a_batch_is_made_of_whole_blocks_and_not_joined_into_one(tmp_path: Path) -> None:
    """What an actor is handed of a night of 26 scans, be they sound or refused, on the way they take through Ray.

    Tasks are of six sources for batches of two, and of four for batches of eight; one task at a time has room.
    """
    from ray.data import ActorPoolStrategy

    from darnet import ray_cluster

    store, road = LocalStore(tmp_path / "archive"), Road(VolumeConfig(shape=(16, 32, 32)), DecodeConfig())
    for number in range(26):
        files = write_chest(tmp_path / "archive" / f"{number:02}")
        if number == 5:
            files[7].unlink()
    sources = list(list_sources(store.list_objects()))
    ray_cluster.connect()

    class Recorder:
        """Tells of each batch how many rows each of its pieces in memory has."""

        def __call__(self, batch: pa.Table) -> dict[str, list[bytes]]:
            return {"pieces": [pickle.dumps([len(chunk) for chunk in batch["voxels"].chunks])]}

    def list_batches(batch_size: int) -> list[list[int]]:
        ahead = ray_cluster.DecodePlan(2.0, batch_size, 64)
        read = functools.partial(_choose, sources)
        dataset = ray_cluster.decode_planned(list(range(26)), read, store, road, ahead).map_batches(
            Recorder,  # type: ignore[arg-type]
            batch_size=batch_size,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=1),
            num_cpus=0.99,
        )
        return [pickle.loads(cell) for batch in ray_cluster.iterate_blocks(dataset) for cell in batch["pieces"]]

    assert ray_cluster.count_resource("CPU") == 4
    assert [count_task_sources(26, batch_size, 2) for batch_size in (8, 2)] == [4, 6]
    assert list_batches(8) == [[4, 4]] * 3 + [[2]]
    assert list_batches(2) == [[2]] * 13


def _choose(sources: list[Any], places: Any) -> list[Any]:
    return [sources[place] for place in places]


def test_a_task_that_nobody_reads_on_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has fetched the source after the one whose rows were read."""
    from darnet import ray_cluster
    from tests.bench.memory import Remote

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    for name in "abc":
        write_chest(tmp_path / "archive" / name)
    store, road = Remote(tmp_path / "archive"), Road(VolumeConfig(shape=(16, 32, 32)), DecodeConfig())
    sources = list(list_sources(store.list_objects()))
    rows = ray_cluster.decode_places({"places": [0, 1, 2]}, lambda _: sources, store, road)
    assert unpack_scan(**next(rows)).source_key == "a"
    assert len(list((tmp_path / "temporary").glob("darnet-*"))) == 1
    rows.close()  # type: ignore[attr-defined]
    assert list((tmp_path / "temporary").glob("darnet-*")) == []
    ray_cluster._keep_ingester.cache_clear()


@pytest.mark.parametrize("error", [ConnectionError(), Exception("The current node timed out during startup.\nMore")])
def test_a_cluster_that_does_not_start_here_is_no_defect(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor anybody's wrong use: a scheduler starts the night again."""
    from darnet import ray_cluster

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", refuse)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"):
        monkeypatch.setenv(name, "")  # `connect` sets them; they are put back
    for address in ("", "local"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(RunError, match="no Ray cluster started on this machine") as caught:
            ray_cluster.connect()
        assert caught.value.exit_code is ExitCode.FAILED
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert "RAY_AUTH_MODE" not in os.environ  # which Ray sets to "token" itself


OTHER_VERSION = "Version mismatch: The cluster was started with:\n    Ray: 2.59.0\n    Python: 3.11.9\n"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ConnectionError(), "no Ray cluster answers there; start it, or if it asks for another token"),
        (AuthenticationError("no token"), "this process has no token for it; set RAY_AUTH_MODE=token, copy what"),
        (RuntimeError(OTHER_VERSION), "Ray: 2.59.0 Python: 3.11.9; install the same Python and Ray here and there"),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_told_with_what_to_do(
    error: Exception, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from darnet import ray_cluster

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", refuse)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.9:6379")
    with pytest.raises(UsageError, match=rf"^RAY_ADDRESS=10\.0\.0\.9:6379: .*{re.escape(told)}"):
        ray_cluster.connect()


STRANGER = """
import sys
from darnet.errors import UsageError
from darnet.ray_cluster import connect
try:
    connect()
except UsageError as error:
    sys.exit(error.exit_code)
"""
ON_ITS_OWN = """
import os
import subprocess
import sys
import ray
from darnet.ray_cluster import connect
connect()
address = ray.get_runtime_context().gcs_address
for mode, token in (("disabled", ""), ("token", "another" * 5), ("token", os.environ["RAY_AUTH_TOKEN"])):
    variables = os.environ | {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": token, "RAY_ADDRESS": address}
    print(subprocess.run([sys.executable, "-c", sys.argv[1]], env=variables, stderr=subprocess.PIPE).returncode)
"""


@pytest.mark.slow
def test_a_cluster_of_this_machine_alone_takes_nobody_without_its_token(tmp_path: Path) -> None:
    """Its processes listen on every address of the machine; the token is in their environment alone."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    job = subprocess.run(
        [sys.executable, "-c", ON_ITS_OWN, STRANGER],
        cwd=ROOT,
        env=variables | {"HOME": str(tmp_path)},
        text=True,
        capture_output=True,
        check=True,
    )
    assert job.stdout.split() == ["2", "2", "0"]
    assert list(tmp_path.rglob("auth_token")) == []


@pytest.mark.parametrize(("address", "code"), [("10.0.0.1:6379", ExitCode.FAILED), ("", ExitCode.WRONG_USE)])
def test_a_cluster_that_lost_its_workers_may_have_them_another_time(
    address: str, code: ExitCode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """jobs/night.sh tries 1 again and leaves 2 to a person."""
    from darnet import ray_cluster

    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 1.0})
    with pytest.raises(RunError, match="fewer than 2 CPUs") as caught:
        ray_cluster.connect()
    assert caught.value.exit_code is code
    assert ("start the same command again" in str(caught.value)) == bool(address)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    ray_cluster.connect()


@pytest.mark.usefixtures("ray_cluster")
def test_a_question_may_bring_what_it_is_about() -> None:
    from darnet.ray_cluster import ask_every_node

    assert [answer for _, answer in ask_every_node(functools.partial(int, "7"))] == [7]


def test_who_does_not_answer_is_named_unless_it_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    from darnet import ray_cluster

    nodes = [{"NodeID": str(number), "NodeManagerAddress": f"10.0.0.{number}"} for number in range(1, 4)]
    monkeypatch.setattr(ray_cluster, "_ask", lambda _: zip(nodes, ([None], [], []), strict=True))
    monkeypatch.setattr(ray_cluster, "list_nodes", lambda: nodes[:2])  # the third is lost meanwhile
    monkeypatch.delenv(PSEUDONYM_VARIABLE, raising=False)
    assert list(ray_cluster.ask_nodes(ray_cluster.read_mark)) == [("10.0.0.1", None)]
    with pytest.raises(RunError, match=r"^node 10\.0\.0\.2 does not answer; install the same darnet") as caught:
        ray_cluster.agree_on_secret()
    assert caught.value.exit_code is ExitCode.FAILED
    monkeypatch.setattr(ray_cluster, "list_nodes", lambda: nodes[:1])
    assert ray_cluster.agree_on_secret() is None


@pytest.mark.parametrize(
    ("own", "other", "told"),
    [
        (SECRET, None, f"has no {PSEUDONYM_VARIABLE}, which the driver has"),
        (SECRET, SECRET[::-1], f"has another {PSEUDONYM_VARIABLE} than the driver"),
        ("", SECRET, f"has a {PSEUDONYM_VARIABLE} and the driver none"),
    ],
)
def test_a_node_of_another_secret_stops_the_run(
    own: str, other: str | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from darnet import ray_cluster

    monkeypatch.setenv(PSEUDONYM_VARIABLE, own)
    answers = [("10.0.0.1", ray_cluster.read_mark()), ("10.0.0.2", mark_secret(other.encode() if other else None))]
    monkeypatch.setattr(ray_cluster, "ask_every_node", lambda _: answers)
    with pytest.raises(UsageError, match=rf"^node 10\.0\.0\.2 {re.escape(told)}; set the same on"):
        ray_cluster.agree_on_secret()


@pytest.mark.slow
def test_a_drivers_word_for_the_token_of_its_nodes_is_not_taken(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_chest(tmp_path / "archive" / "chest")
    write_random_bundle(tmp_path / "model")
    for address in ("127.0.0.2", "127.0.0.3"):
        cluster.add_node(num_cpus=2, node_ip_address=address)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a-token-that-nobody-asks-for")
    code, summary, _ = score(tmp_path)
    assert code == 2
    assert "of which 127.0.0.2, 127.0.0.3" in summary["error"]
    assert "need no token" in summary["error"]
