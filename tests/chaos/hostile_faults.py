"""All that is malformed, among what is sound, through the real job."""

import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

from darnet.results import read_rows
from tests.chaos.night import ChaosError, Night, collect_facts, count_crashes, keep_ray_logs
from tests.hostile import CASES
from tests.poison_fixtures import write_sound

NUM_SOUND = 200
LIMITS = ("--score.decode.memory-bytes", str(1 << 30), "--score.decode.timeout-s", "60")


def hostile_archive(night: Night) -> str:
    """200 sound scans and every hostile one: each of these in its own status, no worker dead."""
    sound, mixed = (night.site.folder / name for name in ("sound", "mixed"))
    for index in range(NUM_SOUND):
        write_sound(sound, index)
    shutil.copytree(sound, mixed)
    cases = _write_cases(mixed)
    quiet = Night(night.site, f"{night.name}-quiet", is_remote=False, archive=str(sound), mark=night.mark)
    started_s = time.monotonic()
    if (statuses := quiet.run(0, flags=LIMITS)["statuses"]) != {"OK": NUM_SOUND}:
        raise ChaosError(f"the sound scans are {statuses}")
    night.truth, night.guests, night.archive = collect_facts(quiet.results), {*cases}, str(mixed)
    quiet_s, started_s = time.monotonic() - started_s, time.monotonic()
    with keep_ray_logs() as logged:
        summary = night.run(0, flags=LIMITS, **logged)
        num_crashes = count_crashes(logged)
    mixed_s = time.monotonic() - started_s
    _check_cases(night, summary, cases)
    if num_crashes:
        raise ChaosError(f"{num_crashes} workers died")
    return f"{NUM_SOUND} alone {quiet_s:.0f} s, with {len(cases)} others {mixed_s:.0f} s; {summary['statuses']}"


def _write_cases(archive: Path) -> dict[str, str]:
    """The status in which each hostile source must end; a listing has them between the sound ones."""
    expected = {}
    for index, case in enumerate(CASES.values()):
        place = f"sound{index * NUM_SOUND // len(CASES):05d}-{index}"
        case.write(archive / place)
        (source,) = (path for path in archive.iterdir() if path.name.partition(".")[0] == place)
        expected[source.name] = str(case.status)
    return expected


def _check_cases(night: Night, summary: dict[str, Any], cases: dict[str, str]) -> None:
    """Raises: ChaosError unless each hostile source has one row of its status, and all rows are of what was planned."""
    rows = read_rows(night.results, latest=False).select(["source", "status"]).to_pylist()
    found = {row["source"]: row["status"] for row in rows if row["source"] in cases}
    if wrong := {name: (found.get(name), status) for name, status in cases.items() if found.get(name) != status}:
        raise ChaosError(f"{len(wrong)} ended otherwise, such as {next(iter(wrong.items()))}")
    times = Counter(row["source"] for row in rows)
    numbers = (len(rows), len(times), summary["planned_sources"], summary["scans"])
    if set(numbers) != {NUM_SOUND + len(cases)}:
        raise ChaosError(f"rows, sources and scans are {numbers}, in place of {NUM_SOUND + len(cases)}")
