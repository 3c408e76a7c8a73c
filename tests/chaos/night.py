"""The stage of a fault: an archive, a bundle, a store that can fail, a reader who looks on, and what came of it."""

import contextlib
import os
import signal
import subprocess
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from darnet.errors import StorageError
from darnet.publishing.objects import list_commits
from darnet.results import read_rows
from darnet.storage import Store, open_store
from tests.bundle_fixtures import write_random_bundle
from tests.conftest import run_s3_server
from tests.fault_proxy import FaultProxy, fair_weather, run_fault_proxy
from tests.night_jobs import finish_job, start_job, write_archive

NUM_CHESTS = 3
MARK = "CHAOS_NIGHT"  # in the environment of a job and of all that it starts
END_S = 30.0
WAIT_S = 240.0
# What a clock, a run's name or a store's own versions do not change.
FACTS = [
    *("source", "scan_id", "status", "model_sha256", "prediction", "fold_probability_ncp", "cam_depth_profile"),
    *("probability_cp", "probability_ncp", "probability_normal", "fold_std_ncp", "cam_in_lung_fraction"),
]
Key = tuple[str, str]


class ChaosError(Exception):
    """A fault did what it must not."""


@dataclass(frozen=True)
class Site:
    """What all nights share; `truth` is what the quiet one published, by source and scan."""

    folder: Path
    bucket: str
    proxy: FaultProxy
    truth: dict[Key, Any] = field(default_factory=dict)

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
    """What a night lost, of `due` rows; all counts but `due` and `polls` should be 0."""

    due: int
    lost: int
    doubled: int
    other: int
    partial: int
    polls: int
    left_running: int

    @property
    def is_sound(self) -> bool:
        """Whether nothing was lost, doubled, changed, seen in part or left behind."""
        return not (self.lost or self.doubled or self.other or self.partial or self.left_running)


@contextmanager
def prepare_site(folder: Path) -> Iterator[Site]:
    """Write archive and bundle, start the S3 server with the proxy before it, and run the quiet night."""
    site = Site(folder, "", fair_weather)  # type: ignore[arg-type]
    write_archive(site.archive, NUM_CHESTS)
    write_random_bundle(Path(site.model))
    with run_s3_server(folder) as make_bucket, run_fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        site = Site(folder, make_bucket(), proxy)
        archive = open_store(f"{site.bucket}/ct")
        for item in open_store(str(site.archive)).list_objects():
            archive.write_bytes(item.key, (site.archive / item.key).read_bytes())
        quiet = Night(site, "quiet", is_remote=False)
        quiet.run(0)
        site.truth.update(collect_facts(quiet.results))
        yield site


def collect_facts(results: Store) -> dict[Key, Any]:
    """The latest rows by source and scan."""
    rows = read_rows(results).select(FACTS).to_pylist()
    return {(row["source"], row["scan_id"]): repr(row) for row in rows}  # repr tells any two floats apart


@dataclass
class Night:
    """One table of results and the jobs that write it, on the disk or in the failing store."""

    site: Site
    name: str
    is_remote: bool = True
    archive: str = ""
    model: str = ""
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        self.archive = self.archive or (f"{self.site.bucket}/ct" if self.is_remote else str(self.site.archive))
        self.model = self.model or self.site.model
        self.folder = self.site.folder / f"results-{self.name}"
        self.uri = f"{self.site.bucket}/results-{self.name}" if self.is_remote else str(self.folder)

    @property
    def results(self) -> Store:
        """The table, past the proxy."""
        return open_store(self.uri, create=True)

    def start(self, *flags: str, **variables: str) -> "subprocess.Popen[str]":
        """A driver; its requests go through the proxy."""
        told = {MARK: self.mark, "RAY_AUTH_MODE": "disabled", "AWS_ENDPOINT_URL": self.site.proxy.url} | variables
        return start_job(self.archive, self.model, self.uri, *flags, variables=told)

    def run(self, *codes: int, flags: tuple[str, ...] = (), **variables: str) -> dict[str, Any]:
        """A driver from its start to its end; its summary.

        Raises: ChaosError if it ends with another exit code than one of these.
        """
        return self.finish(self.start(*flags, **variables), *codes)

    def finish(self, job: "subprocess.Popen[str]", *codes: int) -> dict[str, Any]:
        """Raises: ChaosError as `run`."""
        try:
            summary = finish_job(job)
        except (IndexError, ValueError, AssertionError, subprocess.TimeoutExpired) as error:
            os.killpg(job.pid, signal.SIGKILL)
            raise ChaosError(f"the job ended without a summary: {error!r}, {job.returncode}") from error
        if summary["exit_code"] not in codes:
            raise ChaosError(f"exit code {summary['exit_code']} in place of {codes}: {summary.get('error')}")
        return summary

    def wait_for_parts(self, number: int, job: "subprocess.Popen[str]") -> None:
        """Until a run in progress has staged so many parts."""
        wait_until(lambda: len(list_parts(self.results)) >= number, job)

    def find_processes(self) -> list[int]:
        """Whatever is alive of what the jobs of this night started."""
        return find_marked(self.mark)


def wait_until(is_there: Callable[[], bool], job: "subprocess.Popen[str]") -> None:
    """Raises: ChaosError if the job ends before, or if it takes too long."""
    deadline_s = time.monotonic() + WAIT_S
    while not is_there():
        if job.poll() is not None or time.monotonic() > deadline_s:
            raise ChaosError(f"the moment for the fault never came; the job's exit code is {job.poll()}")
        time.sleep(0.05)


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


class TableReader(threading.Thread):
    """An analyst who counts the published rows again and again, past the proxy."""

    def __init__(self, results: Store) -> None:
        super().__init__(daemon=True)
        self.counts: list[int] = []
        self._results, self._is_over = results, threading.Event()

    def run(self) -> None:
        while not self._is_over.wait(0.05):
            with contextlib.suppress(StorageError):  # a damaged object is not read at all
                self.counts.append(read_rows(self._results, latest=False).num_rows)

    def stop(self) -> None:
        """The last look is after the last job."""
        time.sleep(0.3)
        self._is_over.set()
        self.join(timeout=30)


def watch(night: Night, disturb: Callable[[Night], str]) -> tuple[Outcome, str]:
    """Run a fault under a reader's eyes; what came of it, and the fault's own remark.

    Raises: ChaosError if it did what it must not.
    """
    night.site.proxy.policy = fair_weather
    reader = TableReader(night.results)
    reader.start()
    try:
        remark = disturb(night)
    except BaseException:
        end_processes(night.find_processes())
        raise
    finally:
        night.site.proxy.policy = fair_weather
        reader.stop()
    return judge(night, reader.counts), remark


def judge(night: Night, counts: list[int]) -> Outcome:
    """Hold what was published against the quiet night, and what a reader saw against the table's whole objects."""
    results, truth = night.results, night.site.truth
    rows = read_rows(results, latest=False)
    columns = (rows[name].to_pylist() for name in ("source", "scan_id", "status"))
    final = Counter((source, scan) for source, scan, status in zip(*columns, strict=True) if status[:3] != "ERR")
    found = {key: facts for key, facts in collect_facts(results).items() if key in truth}
    whole, sums = 0, {0}
    for number in range(1, len(list_commits(results)) + 1):
        whole += rows["commit"].to_pylist().count(number)
        sums.add(whole)
    return Outcome(
        due=len(truth),
        lost=len(truth.keys() - final.keys()),
        doubled=final.total() - len(final),
        other=sum(facts != truth[key] for key, facts in found.items()),
        partial=sum(count not in sums for count in counts),
        polls=len(counts),
        left_running=count_left(night.mark),
    )


def count_left(mark: str) -> int:
    """Processes that outlive their jobs by half a minute; they are ended here."""
    deadline_s = time.monotonic() + END_S
    while (left := find_marked(mark)) and time.monotonic() < deadline_s:
        time.sleep(0.2)
    end_processes(left)
    return len(left)


def end_processes(pids: list[int]) -> None:
    """Kill what is still there."""
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
