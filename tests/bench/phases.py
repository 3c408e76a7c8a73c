"""Where a night's whole process goes, start and end among it: told by marks, by the times of files, and by rows.

`peer_roads` takes the marks in the process of a night; the files are what the night leaves in a local results folder.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from darnet.terminal import print_table

# What ends each phase: this project's modules are there; Ray answers; the plan is written; a network gets its first
# batch; the last row is made; it is staged, for which Ray Data has ended; the night is published; Ray has ended.
PHASES = ("imports", "ray_starts", "plan", "first_batch", "networks", "staging", "publishing", "ray_ends")
RAYS = ("ray_starts", "ray_ends")  # which are Ray's alone


def find_phases(results: Path, rows: pd.DataFrame, marks: Mapping[str, float], batch_size: int) -> dict[str, float]:
    """Seconds of each phase, named as `PHASES`.

    `marks` are times of the clock: `begun`, `imported`, `ray_up`, `ended`.
    """
    made = rows.sort_values("scored_at")
    made_s = [when.timestamp() for when in made["scored_at"]]
    ends_s = {
        "imports": marks["imported"],
        "ray_starts": marks["ray_up"],
        "plan": _find_newest(results, "_runs/*/plan.parquet"),
        "first_batch": made_s[0] - float(made["model_s"].iloc[:batch_size].sum()),
        "networks": made_s[-1],
        "staging": _find_newest(results, "_runs/*/parts/*.parquet"),
        "publishing": _find_newest(results, "predictions/*.parquet"),
        "ray_ends": marks["ended"],
    }
    begins_s = [marks["begun"], *ends_s.values()]
    return {f"{name}_s": end_s - begin_s for (name, end_s), begin_s in zip(ends_s.items(), begins_s, strict=False)}


def _find_newest(results: Path, glob: str) -> float:
    return max(path.stat().st_mtime for path in results.glob(glob))


def list_phases(rows: Sequence[Mapping[str, Any]], what: str) -> list[dict[str, Any]]:
    """Of each road of ours, its shortest night, whose start and end weigh most: medians of each phase."""
    shortest: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if "imports_s" in row and row["scans"] <= shortest.get(row["road"], row)["scans"]:
            shortest[row["road"]] = row
    found = []
    for row in shortest.values():
        phases = {name: row[f"{name}_s"] for name in PHASES}
        kept = {name: row[name] for name in ("section", "road", "scans", "repeats", "repeat")}
        figures = {"seconds": row["wall_s"], "phases": phases}
        found.append(kept | {"what": what, "goals": {}, "times": {}} | figures)
    return found


def print_phases(rows: Sequence[Mapping[str, Any]]) -> None:
    """The phases of each night, and below them how much of start and end is Ray's alone."""
    table = []
    for row in rows:
        seconds = [*row["phases"].values(), row["seconds"]]
        table.append([f"{row['road'].removeprefix('ours, ')}, {row['scans']:g}", *(f"{each:.3g}" for each in seconds)])
    columns = [*(name.replace("_", " ") for name in PHASES), "whole"]
    print_table("where a night's start and end go: seconds by the clock", ["road, scans", *columns], table)
    print(
        "first batch: until a network gets it, with Ray Data's start, the actor's own and its network's, and the first "
        "scans' decoding beside them. networks: from then to the last row. staging: until that is staged, with Ray "
        "Data's end. publishing: checks, gates, page, put. whole: with the interpreter's start and end, and what this "
        "benchmark does when the night is over. Medians, each of its own.",
        file=sys.stderr,
    )
    for row in rows:
        print(f"{explain_phases(row)}; repeat by `{row['repeat']}`", file=sys.stderr)


def explain_phases(row: Mapping[str, Any]) -> str:
    """How much of what is not networks is Ray's start and end."""
    others_s = sum(seconds for name, seconds in row["phases"].items() if name != "networks")
    rays_s = sum(row["phases"][name] for name in RAYS)
    told = " + ".join(f"{row['phases'][name]:.3g} {name.replace('_', ' ')}" for name in RAYS)
    return f"{row['road']}: {others_s:.3g} s beside its networks, {rays_s / others_s:.0%} of them Ray's alone: {told}"
