"""What happens to the processes of a night: killed, or stopped for so long that others take their place."""

import contextlib
import os
import signal
import time

from tests.chaos.night import ChaosError, Night, count_crashes, end_group, keep_ray_logs

CHILD = "darnet.reading.sandbox"
CHILD_LIMIT_S = 15.0  # a sound source of this archive takes a second, and on a busy machine a few


def kill_driver(night: Night) -> str:
    """SIGKILL to the driver and all in its process group, with parts staged; started again."""
    end_group(night.start_and_hold())
    night.site.proxy.release()
    return f"{night.resume()} sources resumed"


def kill_workers(night: Night) -> str:
    """SIGKILL to a network's actor and a decoding worker; others take their place."""
    with keep_ray_logs() as logged:
        job = night.start_and_hold(**logged)
        for title in ("ScoringActor", "FlatMap"):
            os.kill(night.find_processes(title)[0], signal.SIGKILL)
        night.site.proxy.release()
        summary = night.finish(job, 0)
        num_crashes = count_crashes(logged)
    if num_crashes < 2 or [status for status in summary["statuses"] if status.startswith("ERR_")]:
        raise ChaosError(f"{num_crashes} workers died, {summary['statuses']}")
    return f"{num_crashes} workers died; {summary['statuses']}"


def kill_child(night: Night) -> str:
    """SIGKILL to a child that has been given a scan, as the system does where memory ends: an ERR row, then scored.

    It is stopped first: one that is killed before it has a scan costs none.
    """
    return _hit_child(night, signal.SIGKILL, "ERR_MEMORY")


def stop_child(night: Night) -> str:
    """SIGSTOP to a decoding child: the time limit replaces it, its source is an ERR row, then scored."""
    return _hit_child(night, signal.SIGSTOP, "ERR_TIMEOUT")


def _hit_child(night: Night, blow: signal.Signals, status: str) -> str:
    flags = ("--score.decode.timeout-s", str(CHILD_LIMIT_S))
    job = night.start_and_hold(*flags)
    children = night.find_processes(CHILD)  # an idle worker's too
    for pid in children:
        os.kill(pid, signal.SIGSTOP)
    night.site.proxy.release()
    if blow != signal.SIGSTOP:
        time.sleep(CHILD_LIMIT_S / 2)
        for pid in children:
            os.kill(pid, blow)
    statuses = night.finish(job, 0)["statuses"]
    if {name: number for name, number in statuses.items() if name.startswith("ERR_")} != {status: 1}:
        raise ChaosError(f"{statuses} in place of one {status}")
    night.run(0, flags=flags)
    return f"{statuses}, then fair"


def stop_driver(night: Night) -> str:
    """SIGSTOP to a driver until a second one has published its night, then SIGCONT."""
    job = night.start_and_hold()
    os.kill(job.pid, signal.SIGSTOP)
    night.site.proxy.release()
    second = night.run(0)
    os.kill(job.pid, signal.SIGCONT)
    first = night.finish(job, 0)
    if (second["published"], first["published"]) != (1, 1) or second["run_id"] != first["run_id"]:
        raise ChaosError(f"published {second['published']} and {first['published']}")
    return f"the second resumed {second['resumed_sources']} sources and published; the first woke up to its number"


def stop_everything(night: Night) -> str:
    """The same to the driver and all its processes, as where a machine sleeps."""
    job = night.start_and_hold()
    asleep: set[int] = set()
    while fresh := set(night.find_processes()) - asleep:  # one may start another before it is stopped
        for pid in fresh:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        asleep |= fresh
    night.site.proxy.release()
    second = night.run(0)
    for pid in asleep:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    first = night.finish(job, 0, 1)  # 1: its cluster may take some of its own for dead
    return f"the second published {second['published']}; the first woke up and ended with {first['exit_code']}"
