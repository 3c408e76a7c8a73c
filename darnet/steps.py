"""Work in steps that a killed job need not repeat: steps with the file each leaves last enter, what was done leaves."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darnet.config import Settings
from darnet.errors import UsageError
from darnet.terminal import print_heading

SETTINGS_FILE = "settings.json"


@dataclass(frozen=True, slots=True)
class Step:
    """A piece of work that is complete when `proof` exists, which it writes last."""

    title: str
    proof: Path
    work: Callable[[], Mapping[str, Any]]


def run_steps(steps: Sequence[Step]) -> list[str]:
    """Do what is not complete, in order; returns the titles of what was done."""
    done = []
    for number, step in enumerate(steps, 1):
        if step.proof.exists():
            print_heading(f"{number}  {step.title}: complete already ({step.proof})")
            continue
        print_heading(f"{number}  {step.title}")
        step.work()
        done.append(step.title)
    return done


def claim_folder(out: Path, settings: Settings) -> None:
    """Note the settings that `out` is made with, so that a resumed job cannot mix two studies.

    Raises: UsageError naming what differs if it was begun with others.
    """
    out.mkdir(parents=True, exist_ok=True)
    noted, told = out / SETTINGS_FILE, settings.model_dump(mode="json", exclude={"config", "mlflow"})
    if not noted.exists():
        noted.write_text(json.dumps(told, indent=2) + "\n")
        return
    begun = json.loads(noted.read_text())
    differs = sorted(name for name in begun | told if begun.get(name) != told.get(name))
    if differs:
        raise UsageError(
            f"{noted}: this folder was begun with other settings ({', '.join(differs)}); name another folder, or use "
            "those"
        )
