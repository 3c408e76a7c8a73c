"""What happens to the nodes of a cluster of several while a night is scored there."""

import contextlib
import functools
import os
import signal
from pathlib import Path

from tests.chaos.night import ChaosError, Night, mark_processes, name_process, wait_for_end, wait_until
from tests.conftest import run_cluster

# Ray's own patience is a minute. Source: Ray 2.60, ray_config_def.h
IMPATIENCE = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "1000"}


def stop_node(night: Night) -> str:
    """SIGSTOP to the node with the networks until another has taken its work over, then SIGCONT."""
    told = mark_processes(night.mark) | IMPATIENCE | {"AWS_ENDPOINT_URL": night.site.proxy.url}
    with run_cluster(told) as cluster:
        for _ in range(2):
            cluster.add_node(num_cpus=2)
        job = night.start_and_hold(RAY_ADDRESS=cluster.address)
        actors = night.find_processes("ScoringActor")
        asleep = list_descendants(_find_parent(actors[0]))
        for pid in asleep:
            os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: bool(set(night.find_processes("ScoringActor")) - {*asleep}), job)
        night.site.proxy.release()
        for pid in asleep:
            os.kill(pid, signal.SIGCONT)
        summary = night.finish(job, 0)
        if left := wait_for_end(functools.partial(_find_left, night, asleep)):
            raise ChaosError(f"of the node that was given up live on: {', '.join(map(name_process, left))}")
    return f"{len(asleep)} processes stopped and replaced; {summary['statuses']}"


def list_descendants(ancestor: int) -> list[int]:
    """A process and all below it."""
    found = [ancestor]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").iterdir():
            with contextlib.suppress(OSError):
                found += map(int, (task / "children").read_text().split())
    return found


def _find_left(night: Night, asleep: list[int]) -> list[int]:
    """What lives of the node that was given up, the raylet the first of it."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(asleep[0], os.WNOHANG)  # we are its parent; workers take a zombie that nobody waits for for alive
    return sorted({*asleep} & {*night.find_processes()})


def _find_parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
