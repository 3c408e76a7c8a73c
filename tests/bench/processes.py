"""Where a night's processor time goes, process by process, once its network runs.

    python -m tests.bench.processes BUNDLE ARCHIVE BACKEND PRECISION

A night of `peer_roads` is watched from outside, from when its actor has worked `WARM_S` to its last whole second. So
it tells what `make bench` sums up as "whole" and "idle": how much Ray takes beside reading and the network.
"""

import argparse
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass

import psutil

from darnet.terminal import print_table

WARM_S = 20.0  # of the actor's processor time: compiling and loading are over
WATCH_S = 1.0
ACTOR, READING, DRIVER, OTHERS, NOTHING = "network", "reading", "driver", "Ray's own", "nothing"
KINDS = {
    ACTOR: "the actor that holds the network",
    READING: "workers that read scans, and their decoding children",
    DRIVER: "plan, Ray Data's loop, staging",
    OTHERS: "Ray's actors and daemons",
    NOTHING: "cores without work",
}


@dataclass(frozen=True)
class Look:
    """When we looked, and of each process of the night its kind and its processor seconds so far."""

    at_s: float
    taken_s: dict[int, tuple[str, float]]

    def find_actor_s(self) -> float:
        """Processor seconds of the network's actor so far."""
        return sum(seconds for kind, seconds in self.taken_s.values() if kind == ACTOR)


def watch(command: list[str]) -> list[Look]:
    """Look at a night and all that it starts, every now and then until it ends.

    Raises: subprocess.CalledProcessError if it fails.
    """
    looks = []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as night:
        begun_s = time.monotonic()
        while night.poll() is None:
            looks.append(Look(time.monotonic() - begun_s, look_at(psutil.Process(night.pid))))
            time.sleep(WATCH_S)
    if night.returncode:
        raise subprocess.CalledProcessError(night.returncode, command)
    return looks


def look_at(night: psutil.Process) -> dict[int, tuple[str, float]]:
    """Of each living process of a night its kind and its own processor seconds."""
    found = {}
    for process in [night, *night.children(recursive=True)]:
        try:
            with process.oneshot():
                times, command = process.cpu_times(), " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        kind = DRIVER if process.pid == night.pid else name_kind(command)
        found[process.pid] = kind, times.user + times.system
    return found


def name_kind(command: str) -> str:
    """What a process of a night that is not its driver does, by its command line or the title that Ray gives it."""
    if "ScoringActor" in command:
        return ACTOR
    is_reader = command.startswith(("ray::IDLE", "ray::Map", "ray::Read")) or "darnet.reading" in command
    return READING if is_reader else OTHERS


def share_out(looks: list[Look], num_cores: int) -> dict[str, float]:
    """The share that each kind took of all cores' time between the first look at a warm network and the last at one.

    Raises: ValueError if the night was too short for that.
    """
    warm = [look for look in looks if look.find_actor_s() > WARM_S]
    if len(warm) < 2:
        raise ValueError(f"the network worked less than {WARM_S:g} s: take an archive of more scans")
    first, last = warm[0], warm[-1]
    taken_s = Counter[str]()
    for process, (kind, seconds) in last.taken_s.items():
        taken_s[kind] += seconds - first.taken_s.get(process, (kind, 0.0))[1]
    whole_s = (last.at_s - first.at_s) * num_cores
    taken_s[NOTHING] = whole_s - taken_s.total()
    return {kind: taken_s[kind] / whole_s for kind in KINDS} | {"seconds": last.at_s - first.at_s}


def main(arguments: list[str]) -> int:
    """Print the shares of a night."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("bundle", "archive", "backend", "precision"):
        parser.add_argument(name)
    chosen = parser.parse_args(arguments)
    night = ["road", "ours", chosen.bundle, chosen.archive, chosen.backend, chosen.precision]
    looks = watch([sys.executable, "-m", "tests.bench.peer_roads", *night])
    num_cores = os.cpu_count() or 1
    shares = share_out(looks, num_cores)
    title = f"{chosen.backend} {chosen.precision}: {shares['seconds']:.0f} s of {num_cores} cores"
    print_table(title, ["process", "% of the cores", "what"], [[k, 100 * shares[k], what] for k, what in KINDS.items()])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
