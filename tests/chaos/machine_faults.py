"""What happens to disks, memory and clocks while a night is scored; each ends with the table whole."""

import contextlib
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from darnet.archive import EVERYTHING
from darnet.config import ScoreConfig
from darnet.manifest import read_manifest
from darnet.publishing.planning import plan_night
from darnet.ray_score import NightRequest, describe_work
from darnet.results import read_rows
from darnet.storage import Store, open_store
from tests.chaos.night import ChaosError, Night, end_group, list_parts
from tests.poison_fixtures import write_bomb
from tests.small_disk import mount_small_disk

NIGHT = date(2026, 1, 1)
DAY = timedelta(days=1)
T = TypeVar("T")


def full_results(night: Night) -> str:
    """The disk of the results is full in the middle of the staging: exit code 4; with room, the run goes on."""
    with contextlib.ExitStack() as unseen:
        with mount_small_disk(night.folder, 2048) as disk:
            ballast = disk / "ballast"
            job = night.start_and_hold()
            with contextlib.suppress(OSError), ballast.open("wb", 0) as sink:
                while True:
                    sink.write(bytes(4096))
            night.site.proxy.release()
            summary = night.finish(job, 4)
            num_parts = len(list_parts(night.results))
            leftovers = [path.name for path in disk.rglob("*.tmp")]
            if leftovers or "No space left" not in summary["error"]:
                raise ChaosError(f"left {leftovers}: {summary['error']}")
            ballast.unlink()
            resumed = night.resume()
            kept = Path(shutil.copytree(disk, night.site.folder / "kept"))
            unseen.enter_context(night.look)  # no poll begins while the disk is taken away
        kept.rename(night.folder)
    return f"{num_parts} parts were staged; {resumed} sources resumed"


def full_scratch(night: Night) -> str:
    """No room for the copies that workers make of the bucket's objects: all are ERR rows; with room, all is scored."""
    with mount_small_disk(night.site.folder / "scratch", 128) as disk:
        first = night.run(0, TMPDIR=str(disk), RAY_TMPDIR="/tmp")
        left = [path.name for path in disk.rglob("*") if path.is_file()]
    if left or list(first["statuses"]) != ["ERR_STORAGE"]:
        raise ChaosError(f"{first['statuses']}; left {left}")
    night.run(0)
    return f"{first['statuses']}, nothing left; then room"


def starved_child(night: Night) -> str:
    """A deflated file of 3 GB, under a limit of 1: ERR_MEMORY, and the others are scored."""
    archive = night.site.folder / "starved"
    shutil.copytree(night.site.archive, archive)
    write_bomb(archive / "bomb")
    night.archive = str(archive)
    night.guests.add("bomb")
    night.run(0, flags=("--score.decode.memory-bytes", str(1 << 30)))
    rows = read_rows(night.results).select(["source", "status"]).to_pylist()
    (bomb,) = [row["status"] for row in rows if row["source"] == "bomb"]
    if bomb != "ERR_MEMORY":
        raise ChaosError(f"the bomb is {bomb}")
    return "the bomb is ERR_MEMORY"


def clock_ahead(night: Night) -> str:
    """Two drivers plan the same scans and die, one by a clock a day ahead; set right, both runs are finished."""
    return _finish_two_plans(night, DAY)


def clock_behind(night: Night) -> str:
    """The same, by a clock a day behind."""
    return _finish_two_plans(night, -DAY)


def driver_ahead(night: Night) -> str:
    """A driver whose clock is a day ahead, and told no night, publishes; set right, there is nothing new."""
    shifted = _shift_driver(night, DAY)
    first, dates = _note_dates(lambda: night.run(0, **shifted), DAY)
    if first["published"] != 1:
        raise ChaosError(f"published as {first['published']}")
    return _set_right(night, dates)


def driver_behind(night: Night) -> str:
    """One a day behind is killed with parts staged; set right, its run is finished under the night it was begun for."""
    shifted = _shift_driver(night, -DAY)
    job, dates = _note_dates(lambda: night.start_and_hold(**shifted), -DAY)
    end_group(job)
    night.site.proxy.release()
    num_resumed = night.resume()
    return f"{num_resumed} sources resumed; {_set_right(night, dates)}"


# Python looks for such a module at its start. What Ray takes to other processes names `time.time`, and is theirs there;
# the dictionary of the type is written to, as the type takes no attribute.
SHIFT = """
import ctypes, datetime, gc, sys, time
if "jobs.score" in sys.orig_argv:
    tell_s = time.time
    def shifted(): return tell_s() + SHIFT_S
    shifted.__module__, shifted.__name__, shifted.__qualname__ = "time", "time", "time"
    time.time = shifted
    told = classmethod(lambda cls, tz=None: cls.fromtimestamp(shifted(), tz))
    gc.get_referents(datetime.datetime.__dict__)[0]["now"] = told
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(datetime.datetime))
"""


def _shift_driver(night: Night, shift: timedelta) -> dict[str, str]:
    """Variables of a job whose driver, and no other process, reads another time; it takes its night from the clock."""
    night.day = ""
    folder = night.site.folder / f"clock-{night.name}"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SHIFT.replace("SHIFT_S", str(shift.total_seconds())))
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}


def _note_dates(act: Callable[[], T], shift: timedelta) -> tuple[T, set[date]]:
    """What came of it, and the dates that a clock so far off told meanwhile."""
    begun = datetime.now(UTC) + shift
    done = act()
    return done, {begun.date(), (datetime.now(UTC) + shift).date()}


def _set_right(night: Night, dates: set[date]) -> str:
    """One more night, by the right clock. Raises: ChaosError if it publishes, or a row has a night that is none of
    `dates`.
    """
    last = night.run(0)
    nights = set(read_rows(night.results, latest=False)["night"].to_pylist())
    if last["published"] is not None or len(nights) != 1 or not nights <= dates:
        raise ChaosError(f"published {last['published']} too, the rows' nights are {nights} and not one of {dates}")
    return "all rows are of the night that clock told; by the right one there is nothing new"


class _WrongClock:
    """A store that tells another time than it has."""

    def __init__(self, store: Store, shift: timedelta) -> None:
        self._store, self._shift = store, shift

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def read_clock(self) -> datetime:
        return self._store.read_clock() + self._shift


def _finish_two_plans(night: Night, shift: timedelta) -> str:
    request = NightRequest(open_store(night.archive), open_store(night.model), night.results, ScoreConfig())
    archive, manifest = request.archive, read_manifest(request.model, request.config)
    work = replace(describe_work(request, manifest), device="cpu")
    wrong: Any = _WrongClock(night.results, shift)
    plans = [plan_night(archive, wrong, work, NIGHT, EVERYTHING)]
    plans += [plan_night(archive, night.results, work, NIGHT + DAY, EVERYTHING)]
    planned = {plan.folder.run_id for plan in plans if plan.folder is not None}
    last = night.run(0)
    ended = {run["run_id"]: run["published"] for run in (*last["finished_first"], last)}
    if len(planned) != 2 or ended.keys() != planned or sorted(map(str, ended.values())) != ["1", "None"]:
        raise ChaosError(f"planned were {planned}, ended {ended}")
    if (again := night.run(0)["published"]) is not None:
        raise ChaosError(f"a night later {again}")
    return "one run published, the other found nothing left to publish; a night later there is nothing new"
