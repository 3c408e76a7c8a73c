"""Work in steps that a killed job need not repeat: steps with the file each leaves last enter, what was done leaves."""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from darnet.errors import ObjectMissing, UsageError
from darnet.settings import Settings
from darnet.storage import Store, has_object
from darnet.terminal import print_heading

SETTINGS_FILE = "settings.json"
UNNOTED = {"config", "out", "cache", "mlflow", "score.cache"}  # settings that change nothing in what is made

# What a study may have to change while it has no volumes: a scan that fails every time leaves the table, or gets other
# limits.
BEFORE_VOLUMES = ("cohort", "cohort_sha256", "score.decode")


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


def claim_folder(out: Store, settings: Settings, inputs: Mapping[str, bytes], changeable: Collection[str] = ()) -> None:
    """Note the settings that `out` is made with, and what its input files held, so that a resumed job cannot mix two
    studies. `inputs` are by the setting that names the file. `changeable` are those, as `score.decode` or
    `cohort_sha256`, that nothing complete in `out` rests on yet: another value takes the place of the noted one.

    Raises: UsageError naming what differs if it was begun with others.
    """
    told = _leave_out(settings.model_dump(mode="json"), UNNOTED)
    told |= {f"{name}_sha256": hashlib.sha256(data).hexdigest() for name, data in inputs.items()}
    try:
        begun = _leave_out(json.loads(out.read_bytes(SETTINGS_FILE)), UNNOTED)
    except ObjectMissing:
        begun = None
    if begun is not None:
        fixed, ours = _leave_out(begun, changeable), _leave_out(told, changeable)
        if differs := sorted(name for name in fixed | ours if fixed.get(name) != ours.get(name)):
            raise UsageError(
                f"{out.uri}/{SETTINGS_FILE}: this folder was begun with other settings ({', '.join(differs)}; "
                "_sha256: the content of a file); name another folder, or use those"
            )
    if begun != told:
        out.write_bytes(SETTINGS_FILE, (json.dumps(told, indent=2) + "\n").encode())


def _leave_out(tree: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The tree without these names, each with a dot where it lies deeper."""
    kept = {}
    for name, value in tree.items():
        below = [deeper.removeprefix(f"{name}.") for deeper in names if deeper.startswith(f"{name}.")]
        if name not in names:
            kept[name] = _leave_out(value, below) if below else value
    return kept
