"""What several test files share: places to store, an S3 server and a Ray cluster, started only when a test asks."""

import gc
import itertools
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3.session
import pytest

from darnet.storage import Store, open_store
from darnet.storage_s3 import _share_client
from tests.places import ROOT

ATTEMPTS = 300  # times 0.1 s
SERVER_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "127.0.0.1",
}


RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_metrics_report_interval_ms": "2000",  # else a test waits ten seconds for a count
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process less a fold; nobody preempts this machine
    # Workers start in a folder of Ray's own and must find the code all the same.
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Clusters of several nodes come first: to take one down also ends a session that this process has beside it."""
    items.sort(key=lambda item: "cluster" not in getattr(item, "fixturenames", ()))


@contextmanager
def run_s3_server(folder: Path) -> Iterator[Callable[[], str]]:
    """A private S3 server that this process and its children use; yields a function that makes a fresh bucket.

    Clients that this process shares are made anew: they go to the server that was there before.
    """
    port = find_free_port()
    log = folder / "server.log"
    with pytest.MonkeyPatch.context() as patch, log.open("wb") as sink:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        for name, value in SERVER_ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        command = [sys.executable, "-m", "tests.s3_server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=sink, stderr=sink, env=dict(os.environ), cwd=ROOT)
        try:
            wait_until_it_answers(server, port, log)
            _share_client.cache_clear()
            yield _make_bucket_factory()
        finally:
            _share_client.cache_clear()
            server.terminate()
            server.wait(timeout=30)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], str]]:
    """A function that makes a fresh bucket on a private S3 server and returns its s3:// address."""
    with run_s3_server(tmp_path_factory.mktemp("moto")) as make_bucket:
        yield make_bucket


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A place where nothing is yet, once of each kind."""
    if request.param == "local":
        return open_store(str(tmp_path / "results"))
    return open_store(request.getfixturevalue("s3")() + "/results")


@pytest.fixture
def local(tmp_path: Path) -> Store:
    """The same on this disk only."""
    return open_store(str(tmp_path / "results"))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head that does no work, like that of cluster.yaml. Its jobs are processes of their own."""
    with run_cluster() as cluster:
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        yield cluster


@contextmanager
def run_cluster(variables: Mapping[str, str] | None = None) -> Iterator[Any]:
    """The same until the block ends, started under these variables."""
    from ray._common.utils import reset_ray_address
    from ray.cluster_utils import Cluster  # takes seconds, and most runs of pytest deselect this file

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        for name, value in {**RAY_ENVIRONMENT, **(variables or {})}.items():
            patch.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            yield cluster
        finally:
            # not shutdown(), which also resets this process's other session
            for node in reversed(cluster.list_all_nodes()):
                # asked, not killed: the agents of a head that was killed try to tell it for a minute
                cluster.remove_node(node, allow_graceful=True)
            reset_ray_address()
            gc.collect()


@pytest.fixture
def head_node() -> Any:
    """`ray start --head` on loopback, and the environment of its clients."""
    ray = Path(sys.executable).with_name("ray")
    environment = {
        **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{ray.parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_TMPDIR": "/tmp/ray-darnet-test",
    }
    ports = {"--port": "26379", "--dashboard-port": "28265", "--dashboard-agent-listen-port": "28266"}
    flags = [part for pair in ports.items() for part in pair]
    start = [str(ray), "start", "--head", "--block", "--num-cpus=3", "--node-ip-address=127.0.0.1"]
    start += [
        *flags,
        "--object-store-memory=150000000",
        "--dashboard-host=127.0.0.1",
        "--temp-dir=/tmp/ray-darnet-test",
    ]
    with Path("/dev/null").open("wb") as sink:
        head = subprocess.Popen(start, env=environment, stdout=sink, stderr=sink)
    address = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:28265"}
    try:
        _wait_for_dashboard(head)
        yield str(ray), environment | address
    finally:
        head.terminate()  # with --block it ends what it started, and nothing else on this machine
        head.wait(timeout=60)
        shutil.rmtree("/tmp/ray-darnet-test", ignore_errors=True)


def _wait_for_dashboard(head: "subprocess.Popen[bytes]") -> None:
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s and head.poll() is None:
        try:
            with urllib.request.urlopen("http://127.0.0.1:28265/api/version", timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError("the head node's dashboard did not start")


def find_free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_it_answers(server: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    """Raises: RuntimeError with the log, if the server does not come up."""
    for _ in range(ATTEMPTS):
        if server.poll() is not None:
            break
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"the S3 server did not start:\n{log.read_text()}")


def _make_bucket_factory() -> Callable[[], str]:
    client = boto3.session.Session().client("s3")
    numbers = itertools.count(1)

    def make_bucket() -> str:
        name = f"bucket-{next(numbers)}"
        client.create_bucket(Bucket=name)
        return f"s3://{name}"

    return make_bucket


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A cluster in this process's care, never one that happens to be running."""
    import ray  # takes seconds, and most tests need none

    with pytest.MonkeyPatch.context() as patch:
        for name, value in RAY_ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init("local", num_cpus=4, object_store_memory=150_000_000, include_dashboard=False, log_to_driver=False)
        yield
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # Ray forgets its own processes before they have ended
            ray.shutdown()
            gc.collect()
