"""From a command line to an exit code: settings in, the work's summary out as one JSON line, errors in plain words."""

import gc
import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

from darnet.errors import ExitCode, RunError, print_defect
from darnet.settings import Settings, read_settings

SettingsT = TypeVar("SettingsT", bound=Settings)


def run_job(
    name: str, settings_class: type[SettingsT], work: Callable[[SettingsT], Mapping[str, Any]], arguments: list[str]
) -> int:
    """Read the settings, do the work, print the summary as the last line of stdout, and return the exit code.

    A `RunError` ends the job with its own code and a sentence on stderr; anything else is a defect, with its traceback
    there, but not its text, which may hold a header's words. Either comes before the summary: `ray job submit` makes
    one stream of both.
    """
    started_s = time.monotonic()
    summary: dict[str, Any] = {"job": name}
    try:
        summary |= work(read_settings(settings_class, arguments, f"python -m jobs.{name}"))
        code = ExitCode.DONE
    except RunError as error:
        code = error.exit_code
        summary |= {**error.facts, "error": str(error)}
        print(f"jobs.{name}: {error}", file=sys.stderr)
    except Exception as error:  # a defect: the developer gets the traceback, the scheduler still its line
        code = ExitCode.FAILED
        summary["error"] = f"unexpected {type(error).__name__}"
        print_defect(error)
    _print_summary(summary, started_s, code)
    return int(code)


def leave(code: int) -> NoReturn:
    """End the process with a job's exit code, without a last look for garbage.

    That would go through all libraries, for a second or two. Files are closed by now: of one that only a cycle of
    objects holds, nobody writes the rest any more.
    """
    gc.freeze()
    sys.exit(code)


def _print_summary(summary: dict[str, Any], started_s: float, code: ExitCode) -> None:
    summary |= {"seconds": round(time.monotonic() - started_s, 1), "exit_code": int(code)}
    print(json.dumps(summary, default=str), flush=True)
