"""Work in steps that a killed job need not repeat: steps with the file each leaves last enter, what was done leaves."""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from darnet.errors import UsageError
from darnet.settings import Settings
from darnet.storage import Store, has_object
from darnet.terminal import print_heading

SETTINGS_FILE = "settings.json"
UNNOTED = {"config", "out", "cache", "mlflow", "score.cache"}  # settings that change nothing in what is made


@dataclass(frozen=True, slots=True)
class Step:
    """A piece of work that is complete when the small object `proof` is in `out`, which it writes last.

    `settings` are those it is made with, such as `score.decode`, `train` for all below it, or `cohort_sha256` for what
    the file held that `cohort` names: they are fixed once anything is there whose key begins with `first`.
    """

    title: str
    out: Store
    proof: str
    work: Callable[[], Mapping[str, Any]]
    settings: Collection[str] = ()
    first: str = ""

    @property
    def has_begun(self) -> bool:
        """Whether something is there that its settings are part of."""
        return any(True for _ in self.out.list_objects(self.first or self.proof))


def run_steps(steps: Sequence[Step], claim: bytes | None = None) -> dict[str, Mapping[str, Any]]:
    """Do what is not complete, in order; returns what each said that was done, by title.

    `claim` is what `claim_folder` noted.
    Raises: UsageError if another job has claimed the place with other settings meanwhile.
    """
    done = {}
    for number, step in enumerate(steps, 1):
        if claim is not None and step.out.read_bytes(SETTINGS_FILE) != claim:
            raise UsageError(
                f"{step.out.uri}/{SETTINGS_FILE}: another job has begun here with other settings since; let one "
                "of them end, or give each a folder of its own"
            )
        if has_object(step.out, step.proof):
            print_heading(f"{number}  {step.title}: complete already ({step.out.uri}/{step.proof})")
            continue
        print_heading(f"{number}  {step.title}")
        done[step.title] = step.work()
    return done


def claim_folder(out: Store, settings: Settings, inputs: Mapping[str, bytes], steps: Sequence[Step]) -> bytes:
    """Note the settings that `out` is made with, and what its input files held, so that a resumed job cannot mix two
    studies; returns the note. `inputs` are by the setting that names the file. Until a step that rests on it has begun,
    another value takes a setting's noted place: every step rests on its own settings and on those of the steps before.

    Raises: UsageError naming what differs, and the step that is begun with it.
    """
    told = _flatten(settings.model_dump(mode="json"))
    told |= {f"{name}_sha256": hashlib.sha256(data).hexdigest() for name, data in inputs.items()}
    told = {name: value for name, value in told.items() if not _is_below(name, UNNOTED)}
    data = (json.dumps(told, indent=2) + "\n").encode()
    if out.put_if_absent(SETTINGS_FILE, data):
        return data
    noted = out.read_bytes(SETTINGS_FILE)
    begun = _flatten(json.loads(noted))
    differs = [name for name in sorted(begun | told) if begun.get(name) != told.get(name)]
    fixed: list[str] = []
    for step in steps:
        fixed += [name for name in differs if _is_below(name, step.settings) and name not in fixed]
        if fixed and step.has_begun:
            later = ", ".join(each.first or each.proof for each in steps[steps.index(step) :] if each.has_begun)
            raise UsageError(
                f"{out.uri}/{SETTINGS_FILE}: {step.title} began with other settings ({', '.join(fixed)}; _sha256: the "
                f"content of a file); name another folder, use those, or delete what rests on them: all there that "
                f"begins with {later}"
            )
    if noted != data:
        out.write_bytes(SETTINGS_FILE, data)
    return data


def _flatten(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """The leaves of a tree by their names, each with a dot where it lies deeper."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= _flatten(value, f"{above}{name}.") if isinstance(value, Mapping) else {above + name: value}
    return leaves


def _is_below(name: str, places: Collection[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)
