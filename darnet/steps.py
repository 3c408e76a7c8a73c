"""Work in steps that a killed job need not repeat: steps with the file each leaves last enter, what was done leaves."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from darnet.errors import ObjectMissing, UsageError
from darnet.settings import Settings
from darnet.storage import Store, has_object
from darnet.terminal import print_heading

SETTINGS_FILE = "settings.json"
UNNOTED = {"config", "out", "cache", "mlflow"}  # settings that change nothing in what is made


@dataclass(frozen=True, slots=True)
class Step:
    """A piece of work that is complete when the small object `proof` is in `out`, which it writes last."""

    title: str
    out: Store
    proof: str
    work: Callable[[], Mapping[str, Any]]


def run_steps(steps: Sequence[Step]) -> list[str]:
    """Do what is not complete, in order; returns the titles of what was done."""
    done = []
    for number, step in enumerate(steps, 1):
        if has_object(step.out, step.proof):
            print_heading(f"{number}  {step.title}: complete already ({step.out.uri}/{step.proof})")
            continue
        print_heading(f"{number}  {step.title}")
        step.work()
        done.append(step.title)
    return done


def claim_folder(out: Store, settings: Settings, inputs: Mapping[str, bytes]) -> None:
    """Note the settings that `out` is made with, and what its input files held, so that a resumed job cannot mix two
    studies. `inputs` are by the setting that names the file.

    Raises: UsageError naming what differs if it was begun with others.
    """
    told = settings.model_dump(mode="json", exclude=UNNOTED)
    told |= {f"{name}_sha256": hashlib.sha256(data).hexdigest() for name, data in inputs.items()}
    try:
        noted = json.loads(out.read_bytes(SETTINGS_FILE))
    except ObjectMissing:
        out.write_bytes(SETTINGS_FILE, (json.dumps(told, indent=2) + "\n").encode())
        return
    begun = {name: value for name, value in noted.items() if name not in UNNOTED}
    differs = sorted(name for name in begun | told if begun.get(name) != told.get(name))
    if differs:
        raise UsageError(
            f"{out.uri}/{SETTINGS_FILE}: this folder was begun with other settings ({', '.join(differs)}; "
            "_sha256: the content of a file); name another folder, or use those"
        )
