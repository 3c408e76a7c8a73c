"""The stage of a fault: an archive, a bundle, a store that can fail, a reader who looks on, and what came of it."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import boto3.session
from botocore.config import Config

from darnet.archive import list_sources
from darnet.bundle import read_model
from darnet.code_version import name_scoring_code
from darnet.config import ScoreConfig
from darnet.errors import StorageError
from darnet.ingest import Ingester
from darnet.manifest import RunFacts
from darnet.publishing.check import check_table
from darnet.publishing.objects import list_commits
from darnet.publishing.rows import SCHEMA
from darnet.reading.road import Road
from darnet.results import read_rows
from darnet.score import Ensemble, make_row
from darnet.storage import Store, open_store
from tests.bundle_fixtures import write_random_bundle
from tests.conftest import run_s3_server
from tests.fault_proxy import FaultProxy, run_fault_proxy
from tests.night_jobs import NIGHT, UNREADABLE, finish_job, start_job, write_archive
from tests.results_fixtures import publish_rows

NUM_CHESTS = 3
LAST_SOURCE = "two"  # of the archive, in the order of its keys
MARK = "PYTHON_CHAOS_NIGHT"  # in the environment of a job and all that it starts; decoders get Python's names alone
END_S = 30.0
WAIT_S = 240.0
# What a clock, a run's name or a store's own versions change; all else must be the same to the last bit.
UNSTABLE = {"run_id", "commit", "night", "scored_at", "input_sha256", "fetch_s", "decode_s", "model_s"}
FACTS = [name for name in SCHEMA.names if name not in UNSTABLE]
Key = tuple[str, str]
Truth = dict[Key, Any]


class ChaosError(Exception):
    """A fault did what it must not."""


@dataclass(frozen=True)
class Site:
    """What all nights share; `truth` is what the quiet one published, by source and scan."""

    folder: Path
    bucket: str
    proxy: FaultProxy
    truth: Truth = field(default_factory=dict)

    @property
    def archive(self) -> Path:
        """The scans, on the disk."""
        return self.folder / "archive"

    @property
    def model(self) -> str:
        """The bundle, on the disk."""
        return str(self.folder / "bundle")


@dataclass(frozen=True)
class Outcome:
    """What a night lost, of `due` rows; all counts but `due` and `polls` should be 0, or are None: not looked for.

    `exits` are the jobs' codes.
    """

    due: int
    lost: int | None
    doubled: int | None
    other: int
    partial: int | None
    polls: int | None
    left_running: int
    exits: tuple[int, ...] = field(default=(), compare=False)

    @property
    def is_sound(self) -> bool:
        """Whether nothing was lost, doubled, changed, seen in part or left behind."""
        return not (self.lost or self.doubled or self.other or self.partial or self.left_running)


@contextmanager
def prepare_site(folder: Path, *, is_quick: bool = False) -> Iterator[Site]:
    """Write archive and bundle, start the S3 server with the proxy before it, and run the quiet night.

    If `is_quick`, this process alone takes that night's place.
    """
    with run_s3_server(folder) as make_bucket, run_fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        site = Site(folder, make_bucket(), proxy)
        write_archive(site.archive, NUM_CHESTS)
        write_random_bundle(Path(site.model))
        upload(str(site.archive), f"{site.bucket}/ct")
        quiet = Night(site, "quiet", is_remote=False)
        if is_quick:
            score_alone(open_store(quiet.archive), open_store(site.model), quiet.results)
        else:
            quiet.run(0)
        site.truth.update(collect_facts(quiet.results))
        yield site


def score_alone(archive: Store, model: Store, results: Store) -> None:
    """Publish what a night would, without a cluster: one source after another is read and scored here."""
    config = ScoreConfig()
    bundle = read_model(model, config)
    ensemble = Ensemble.from_bundle(bundle, config, "cpu")
    ingester = Ingester(archive, Road(bundle.manifest.settings.volume, config.decode))
    run, rows = RunFacts("alone", date(2026, 1, 1), bundle.manifest, name_scoring_code()), []
    for source in list_sources(archive.list_objects()):
        for scan in ingester.ingest(source):
            scores = [] if scan.volume is None else ensemble.score([scan.volume.voxels])
            score = next(iter(scores), None)
            rows.append(make_row(run, source.key, source.input_sha256, scan, score, datetime.now(UTC)))
    ingester.close()
    publish_rows(results, run.run_id, *rows)


def upload(folder: str, uri: str, **settings: Any) -> None:
    """Copy a folder to a prefix of a bucket, by a client of these settings."""
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    client = boto3.session.Session().client("s3", config=Config(**settings))
    for item in open_store(folder).list_objects():
        client.put_object(Bucket=bucket, Key=f"{prefix}/{item.key}", Body=Path(folder, item.key).read_bytes())
    client.close()


def collect_facts(results: Store) -> Truth:
    """The latest rows by source and scan."""
    rows = read_rows(results).select(FACTS).to_pylist()
    return {(row["source"], row["scan_id"]): repr(row) for row in rows}  # repr tells any two floats apart


def mark_processes(mark: str) -> dict[str, str]:
    """Variables under which all that a job starts can be found; Ray's workers write their titles over theirs else."""
    return {MARK: mark, "SPT_NOENV": "1", "RAY_AUTH_MODE": "disabled"}


@dataclass
class Night:
    """One table of results and the jobs that write it, on the disk or in the failing store.

    `truth` is what it must end in; sources of `guests` are beside it, and the fault itself judges their rows.
    `is_table_damaged` is set by a fault that damages an object of the table, and mends it; the reader holds `look`
    while it polls, and a fault while it moves the table; `day` is the night that jobs are told, or "" if they shall
    take it from their clock.
    """

    site: Site
    name: str
    is_remote: bool = True
    archive: str = ""
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    truth: Truth = field(default_factory=dict)
    guests: set[str] = field(default_factory=set)
    is_table_damaged: bool = False
    look: threading.Lock = field(default_factory=threading.Lock)
    day: str = NIGHT
    exits: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.archive = self.archive or (f"{self.site.bucket}/ct" if self.is_remote else str(self.site.archive))
        self.truth = self.truth or self.site.truth
        self.folder = self.site.folder / f"results-{self.name}"
        self.uri = f"{self.site.bucket}/results-{self.name}" if self.is_remote else str(self.folder)

    @property
    def model(self) -> str:
        """The bundle, on the disk."""
        return self.site.model

    @property
    def results(self) -> Store:
        """The table, past the proxy."""
        return open_store(self.uri, create=True)

    def start(self, *flags: str, **variables: str) -> "subprocess.Popen[str]":
        """A driver; its requests go through the proxy."""
        told = mark_processes(self.mark) | {"AWS_ENDPOINT_URL": self.site.proxy.url} | variables
        return start_job(self.archive, self.model, self.uri, *flags, night=self.day, variables=told)

    def start_and_hold(self, *flags: str, **variables: str) -> "subprocess.Popen[str]":
        """A driver that has staged two parts and waits for its last source, which the proxy holds until `release`."""
        self.archive = f"{self.site.bucket}/ct"
        self.site.proxy.hold(f"/ct/{LAST_SOURCE}/")
        job = self.start(*flags, **variables)
        wait_until(lambda: len(list_parts(self.results)) >= 2, job)
        return job

    def run(self, *codes: int, flags: tuple[str, ...] = (), **variables: str) -> dict[str, Any]:
        """A driver from its start to its end; its summary.

        Raises: ChaosError if it ends with another exit code than one of these, or with one but 0 and publishes.
        """
        return self.finish(self.start(*flags, **variables), *codes)

    def finish(self, job: "subprocess.Popen[str]", *codes: int) -> dict[str, Any]:
        """Raises: ChaosError as `run`."""
        before = list_commits(self.results)
        try:
            summary = finish_job(job)
        except (ValueError, AssertionError, subprocess.TimeoutExpired) as error:
            end_group(job)
            raise ChaosError(f"the job ended without a summary: {error!r}, {job.returncode}") from error
        self.exits.append(summary["exit_code"])
        if summary["exit_code"] not in codes:
            raise ChaosError(f"exit code {summary['exit_code']} in place of {codes}: {summary.get('error')}")
        if summary["exit_code"] and list_commits(self.results) != before:
            raise ChaosError(f"published in spite of exit code {summary['exit_code']}")
        return summary

    def resume(self) -> int:
        """How many sources a driver that is started again need not score.

        Raises: ChaosError as `run`, or if these are none or all.
        """
        summary = self.run(0)
        if not 0 < summary["resumed_sources"] < summary["planned_sources"]:
            raise ChaosError(f"{summary['resumed_sources']} of {summary['planned_sources']} sources resumed")
        return int(summary["resumed_sources"])

    def find_processes(self, title: str = "") -> list[int]:
        """Whatever is alive of what the jobs of this night started."""
        return find_marked(self.mark, title)


def end_group(job: "subprocess.Popen[str]") -> None:
    """SIGKILL to a job and all in its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    job.communicate()


def wait_until(is_there: Callable[[], bool], job: "subprocess.Popen[str]") -> None:
    """Raises: ChaosError if the job ends before, or if it takes too long."""
    deadline_s = time.monotonic() + WAIT_S
    while not is_there():
        if job.poll() is not None or time.monotonic() > deadline_s:
            raise ChaosError(f"the moment for the fault never came; the job's exit code is {job.poll()}")
        time.sleep(0.05)


def list_runs(results: Store) -> set[str]:
    """The runs that have a plan."""
    return {item.key.split("/")[1] for item in results.list_objects("_runs/") if item.key.endswith("/plan.parquet")}


def list_parts(results: Store) -> list[str]:
    """Keys of what is staged."""
    return [item.key for item in results.list_objects("_runs/") if "/parts/" in item.key]


def find_marked(mark: str, title: str = "") -> list[int]:
    """Live processes with this mark in their environment, by what their command line holds."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if not entry.name.isdecimal() or f"{MARK}={mark}\0".encode() not in (entry / "environ").read_bytes():
                continue
            is_dead = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            if not is_dead and title in (entry / "cmdline").read_text():
                found.append(int(entry.name))
    return sorted(found)


@contextmanager
def keep_ray_logs() -> Iterator[dict[str, str]]:
    """Variables for a job whose cluster writes what happens to its workers where `count_crashes` looks."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:  # sockets: short
        yield {"RAY_TMPDIR": folder, "RAY_BACKEND_LOG_LEVEL": "info"}


def count_crashes(variables: dict[str, str]) -> int:
    """Workers of these jobs' clusters that ended otherwise than they were asked to."""
    logs = Path(variables["RAY_TMPDIR"]).glob("ray/session_2*/logs/gcs_server.out")
    lines = [line for log in logs for line in log.read_text().splitlines() if "Reporting worker exit" in line]
    return sum("SYSTEM_ERROR" in line for line in lines)


class TableReader(threading.Thread):
    """An analyst who counts the published rows again and again, past the proxy."""

    def __init__(self, results: Store, look: threading.Lock) -> None:
        super().__init__(daemon=True)
        self.counts: list[int] = []
        self.refusal = ""  # the last reason why the table could not be read
        self.error: Exception | None = None
        self._results, self._look, self._is_over = results, look, threading.Event()

    def run(self) -> None:
        try:
            is_last = False
            while not is_last:  # the last look begins after the last job
                is_last = self._is_over.wait(0.05)
                with self._look:
                    self.counts.append(self._count())
        except Exception as error:  # told by `stop`
            self.error = error

    def _count(self) -> int:
        try:
            return read_rows(self._results, latest=False).num_rows
        except StorageError as error:
            self.refusal = str(error)
            return UNREADABLE

    def end(self) -> None:
        """Look once more, and then no more."""
        self._is_over.set()
        self.join(timeout=END_S)

    def stop(self) -> list[int]:
        """What it counted. Raises: ChaosError if it could not look on."""
        self.end()
        if self.error is not None or self.is_alive():
            raise ChaosError(f"the reader ended after {len(self.counts)} polls: {self.error!r}")
        return self.counts


def watch(night: Night, disturb: Callable[[Night], str]) -> tuple[Outcome, str]:
    """Run a fault under a reader's eyes; what came of it, and the fault's own remark.

    Raises: ChaosError if it did what it must not.
    """
    night.site.proxy.release()
    reader = TableReader(night.results, night.look)
    reader.start()
    try:
        remark = disturb(night)
    except BaseException:
        reader.end()
        end_processes(night.find_processes())
        raise
    finally:
        night.site.proxy.release()
    outcome = judge(night, reader.stop())
    if outcome.partial:
        print(f"{night.name}: {outcome.partial} polls saw part of a night; {reader.refusal}", file=sys.stderr)
    return outcome, remark


def judge(night: Night, counts: list[int]) -> Outcome:
    """Hold what was published against the quiet night, and what a reader saw against the table's whole objects.

    A table that could not be read is one seen in part, unless the fault is a damaged object, which must not be read.
    Raises: ChaosError if the table is not sound, or has rows of what is not in the archive, or if the reader's last
        look, after the last job, did not see it whole.
    """
    results, truth = night.results, night.truth
    rows = read_rows(results, latest=False)
    columns = (rows[name].to_pylist() for name in ("source", "scan_id", "status"))
    final = Counter((source, scan) for source, scan, status in zip(*columns, strict=True) if status[:3] != "ERR")
    found = collect_facts(results)
    made_up = [key for key in found if key not in truth and key[0] not in night.guests]
    if made_up or (faults := check_table(results)[1]):
        raise ChaosError(f"rows of nothing: {made_up}" if made_up else f"the table is damaged: {faults}")
    whole, sums = 0, {0}
    for number in range(1, len(list_commits(results)) + 1):
        whole += rows["commit"].to_pylist().count(number)
        sums.add(whole)
    if not counts or counts[-1] != whole:
        raise ChaosError(f"the reader's last look saw {counts[-1] if counts else 'no'} rows of {whole}")
    if night.is_table_damaged:
        sums.add(UNREADABLE)
    return Outcome(
        due=len(truth),
        lost=len(truth.keys() - final.keys()),
        doubled=final.total() - len(final),
        other=sum(facts != truth[key] for key, facts in found.items() if key in truth),
        partial=sum(count not in sums for count in counts),
        polls=len(counts),
        left_running=count_left(night.mark),
        exits=tuple(night.exits),
    )


def count_left(mark: str) -> int:
    """Processes that outlive their jobs by half a minute; they are named on stderr, and ended here."""
    left = wait_for_end(lambda: find_marked(mark))
    for pid in left:
        print(f"left running: {name_process(pid)}", file=sys.stderr)
    end_processes(left)
    return len(left)


def name_process(pid: int) -> str:
    """Its command line, or its number where it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    return str(pid)


def wait_for_end(find: Callable[[], list[int]]) -> list[int]:
    """What is still found after half a minute; nothing as soon as there is nothing."""
    deadline_s = time.monotonic() + END_S
    while (left := find()) and time.monotonic() < deadline_s:
        time.sleep(0.2)
    return left


def end_processes(pids: list[int]) -> None:
    """Kill what is still there."""
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
