"""What happens to processes, disks and clocks while a night is scored; each ends with the table whole."""

import contextlib
import os
import shutil
import signal
from datetime import date, datetime, timedelta
from typing import Any

from darnet.archive import EVERYTHING
from darnet.bundle import read_bundle
from darnet.config import ScoreConfig
from darnet.publishing.planning import plan_night
from darnet.ray_score import describe_work
from darnet.results import read_rows
from darnet.storage import Store, open_store
from tests.chaos.night import ChaosError, Night, find_marked, list_parts, wait_until
from tests.poison_fixtures import write_bomb
from tests.small_disk import mount_small_disk

NIGHT = date(2026, 1, 1)
DAY = timedelta(days=1)


def kill_driver(night: Night) -> str:
    """SIGKILL to the driver and all in its process group, with parts staged; started again."""
    job = night.start()
    night.wait_for_parts(2, job)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    summary = night.run(0)
    return f"{summary['resumed_sources']} sources resumed"


def kill_workers(night: Night) -> str:
    """SIGKILL to a decoding worker, a network's actor and a decoding child, one after the other."""
    job = night.start()
    night.wait_for_parts(1, job)
    killed = []
    for title in ("FlatMap", "ScoringActor", "darnet.reading.sandbox"):
        found: list[int] = []
        with contextlib.suppress(ChaosError):  # the night may be over before
            wait_until(
                lambda title=title, found=found: bool(found.extend(find_marked(night.mark, title)) or found), job
            )
            os.kill(found[0], signal.SIGKILL)
            killed.append(title)
    if not killed:
        raise ChaosError("there was no worker to kill")
    summary = night.finish(job, 0)
    if summary["statuses"].get("ERR_MEMORY"):  # a child that is killed is taken for one that the system killed
        night.run(0)
    return f"killed {', '.join(killed)}; {summary['statuses']}"


def stop_driver(night: Night) -> str:
    """SIGSTOP to a driver until a second one has published its night, then SIGCONT."""
    job = night.start()
    night.wait_for_parts(1, job)
    os.kill(job.pid, signal.SIGSTOP)
    second = night.run(0)
    os.kill(job.pid, signal.SIGCONT)
    first = night.finish(job, 0)
    return f"the second published {second['published']}; the first woke up to {first['published']}"


def stop_everything(night: Night) -> str:
    """The same to the driver and all its processes, as where a machine sleeps."""
    job = night.start()
    night.wait_for_parts(1, job)
    asleep = night.find_processes()
    for pid in asleep:
        os.kill(pid, signal.SIGSTOP)
    twin = Night(night.site, night.name, is_remote=False)  # another mark
    second = twin.run(0)
    for pid in asleep:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGCONT)
    first = night.finish(job, 0, 1)
    return f"the second published {second['published']}; the first woke up and ended with {first['exit_code']}"


def full_results(night: Night) -> str:
    """The disk of the results is full in the middle of the staging: exit code 4; with room, the run goes on."""
    with mount_small_disk(night.folder, 2048) as disk:
        ballast = disk / "ballast"
        job = night.start()
        night.wait_for_parts(1, job)
        with contextlib.suppress(OSError), ballast.open("wb", 0) as sink:
            while True:
                sink.write(bytes(4096))
        summary = night.finish(job, 4)
        num_parts = len(list_parts(night.results))
        leftovers = [path.name for path in disk.rglob("*.tmp")]
        if leftovers or "No space left" not in summary["error"]:
            raise ChaosError(f"left {leftovers}: {summary['error']}")
        ballast.unlink()
        resumed = night.run(0)["resumed_sources"]
        shutil.copytree(disk, night.site.folder / "kept")
    shutil.copytree(night.site.folder / "kept", night.folder, dirs_exist_ok=True)
    return f"exit 4 with {num_parts} parts, {resumed} sources resumed"


def full_scratch(night: Night) -> str:
    """No room for the copies that workers make of the bucket's objects: ERR rows or exit code 4, then room."""
    scratch = night.site.folder / "scratch"
    with mount_small_disk(scratch, 128) as disk:
        first = night.run(0, 1, 4, TMPDIR=str(disk), RAY_TMPDIR="/tmp")
        left = sum(path.stat().st_size for path in disk.rglob("*") if path.is_file())
    night.run(0)
    return f"exit {first['exit_code']}, {first.get('statuses') or first.get('error')}, {left} bytes left; then room"


def starved_child(night: Night) -> str:
    """A deflated file of 3 GB, under a limit of 1: ERR_MEMORY, and the others are scored."""
    archive = night.site.folder / "starved"
    shutil.copytree(night.site.archive, archive, copy_function=shutil.copy2)
    write_bomb(archive / "bomb")
    night.archive = str(archive)
    night.run(0, flags=("--score.decode.memory-bytes", str(1 << 30)))
    rows = read_rows(night.results).select(["source", "status"]).to_pylist()
    (bomb,) = [row["status"] for row in rows if row["source"] == "bomb"]
    if bomb != "ERR_MEMORY":
        raise ChaosError(f"the bomb is {bomb}")
    return "the bomb is ERR_MEMORY"


def clock_ahead(night: Night) -> str:
    """A store whose clock is a day ahead while a driver plans and dies; set right, the run is finished."""
    return _finish_plan_of(night, DAY)


def clock_behind(night: Night) -> str:
    """The same, a day behind."""
    return _finish_plan_of(night, -DAY)


class _WrongClock:
    """A store that tells another time than it has."""

    def __init__(self, store: Store, shift: timedelta) -> None:
        self._store, self._shift = store, shift

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def read_clock(self) -> datetime:
        return self._store.read_clock() + self._shift


def _finish_plan_of(night: Night, shift: timedelta) -> str:
    archive, bundle = open_store(night.archive), read_bundle(open_store(night.model))
    work = describe_work(archive, bundle, ScoreConfig())
    plan = plan_night(archive, _WrongClock(night.results, shift), work, NIGHT, EVERYTHING)  # type: ignore[arg-type]
    assert plan.folder is not None
    summary = night.run(0)
    again = night.run(0)
    if summary["run_id"] != plan.folder.run_id and not summary["finished_first"]:
        raise ChaosError(f"the run that was planned is {plan.folder.run_id}, another was scored")
    return f"published {summary['published']}; a night later {again['published']}"
