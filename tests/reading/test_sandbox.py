"""The decoding child: what it survives, and that its owner survives everything."""

import ctypes
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from darnet.errors import NEVER_GIVEN_UP, ScanError, Status
from darnet.reading import sandbox as sandbox_module
from darnet.reading.sandbox import Sandbox
from tests.places import ROOT

MEMORY_BYTES = 1 << 30


class Forged:
    """Where it is unpacked, `note` runs there."""

    def __reduce__(self) -> tuple[object, ...]:
        return note, ("unpacked by the owner",)


class ForgedError(Exception):
    """The same, raised."""

    def __reduce__(self) -> tuple[object, ...]:
        return note, ("raised in the owner",)


NOTES: list[str] = []


def note(text: str) -> str:
    NOTES.append(text)
    return text


def act(order: str) -> object:
    """What the tests have the child do."""
    if order == "crash":
        ctypes.string_at(0)
    if order == "exit":
        os._exit(3)
    if order == "hang":
        time.sleep(60)
    while order == "spin":
        pass
    if order == "eat":
        return bytearray(4 * MEMORY_BYTES)[0]
    if order == "scan error":
        raise ScanError(Status.BAD_PIXELS, "said so")
    if order == "environment":
        return dict(os.environ)
    if order == "forge":
        return [Forged()]
    if order == "forge an error":
        raise ForgedError
    if order == "lie":
        sandbox_module._write = lambda pipe, _: pipe.write(struct.pack("<Q", 1 << 62))  # type: ignore[assignment]
    if order == "print":
        print("decoders print what they like", flush=True)
    return order, os.getpid()


@pytest.fixture
def sandbox():  # type: ignore[no-untyped-def]
    sandbox = Sandbox("tests.reading.test_sandbox:act", MEMORY_BYTES, timeout_s=20)
    yield sandbox
    sandbox.close()


def test_one_child_serves_many_calls(sandbox: Sandbox) -> None:
    answers = {sandbox.call("fine") for _ in range(3)}
    assert len(answers) == 1
    assert answers.pop()[1] != os.getpid()


def test_what_a_decoder_prints_does_not_enter_the_answer(sandbox: Sandbox) -> None:
    assert sandbox.call("print")[0] == "print"


@pytest.mark.parametrize(
    ("order", "status"),
    [
        ("crash", Status.ERR_DECODER_CRASH),
        ("exit", Status.ERR_DECODER_CRASH),
        ("eat", Status.ERR_MEMORY),
        ("scan error", Status.BAD_PIXELS),
    ],
)
def test_a_bad_scan_is_an_error_and_the_next_one_is_served(sandbox: Sandbox, order: str, status: Status) -> None:
    with pytest.raises(ScanError) as caught:
        sandbox.call(order)
    assert caught.value.status is status
    assert sandbox.call("fine")[0] == "fine"


def test_the_time_to_start_a_child_is_no_scans() -> None:
    """Else a scan that follows a crash on a busy machine would pay for it; imports take longer than this limit."""
    sandbox = Sandbox("tests.reading.test_sandbox:act", MEMORY_BYTES, timeout_s=0.05)
    assert sandbox.call("fine")[0] == "fine"
    with pytest.raises(ScanError):
        sandbox.call("crash")
    assert sandbox.call("fine")[0] == "fine"
    sandbox.close()


@pytest.mark.parametrize(
    ("function", "limit_s", "told"),
    [("no_such_function", 60, "decoder died: exit status 1"), ("act", 0.001, "starting took more than 0.001 s")],
)
def test_a_child_that_cannot_start_is_trouble_of_the_machine_and_never_the_scans(
    function: str, limit_s: float, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a broken node would make good scans final after three nights."""
    monkeypatch.setattr(sandbox_module, "START_TIMEOUT_S", limit_s)
    sandbox = Sandbox(f"tests.reading.test_sandbox:{function}", MEMORY_BYTES, timeout_s=20)
    with pytest.raises(ScanError, match=f"no decoder can be started on the machine .*: {told}") as caught:
        sandbox.call("fine")
    assert caught.value.status in NEVER_GIVEN_UP


def test_a_child_that_died_between_two_scans_costs_neither(sandbox: Sandbox) -> None:
    child = sandbox.call("fine")[1]
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # with all its threads
    assert sandbox.call("fine")[1] != child


def test_a_child_that_hangs_does_not_outlive_its_owner_for_long() -> None:
    """Killed outright, the owner can end nobody: a child that waits for ever would hold its memory for ever."""
    code = (
        "from tests.reading.test_sandbox import MEMORY_BYTES, Sandbox\n"
        "sandbox = Sandbox('tests.reading.test_sandbox:act', MEMORY_BYTES, timeout_s=3)\n"
        "print(sandbox.call('fine')[1], flush=True)\n"
        "sandbox.call('hang')\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    assert owner.stdout is not None
    child = int(owner.stdout.readline())
    time.sleep(0.5)  # into the hang
    owner.kill()
    owner.communicate()
    for _ in range(300):
        if not Path(f"/proc/{child}").exists():
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child outlived its owner")


def test_a_hang_ends_at_the_time_limit_and_leaves_no_child() -> None:
    sandbox = Sandbox("tests.reading.test_sandbox:act", MEMORY_BYTES, timeout_s=20)
    _, child = sandbox.call("fine")
    sandbox.timeout_s = 0.2
    with pytest.raises(ScanError) as caught:
        sandbox.call("hang")
    assert caught.value.status is Status.ERR_TIMEOUT
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_what_takes_too_much_of_processors_is_ended_by_the_system(sandbox: Sandbox) -> None:
    """Long before the clock's limit; each call has its own."""
    sandbox.cpu_s = 0.3
    for _ in range(2):
        assert sandbox.call("fine")[0] == "fine"
    with pytest.raises(ScanError, match="decoder used up its processor time") as caught:
        sandbox.call("spin")
    assert caught.value.status is Status.ERR_TIMEOUT
    assert sandbox.call("fine")[0] == "fine"


def test_the_child_knows_none_of_its_owners_secrets(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = "AWS_SECRET_ACCESS_KEY DARNET_PSEUDONYM_KEY RAY_AUTH_TOKEN HTTPS_PROXY HF_TOKEN PATH_TOKEN DSN".split()
    for name in (*secrets, "LANG", "LC_ALL", "PYTHONHASHSEED"):
        monkeypatch.setenv(name, "1")
    for library in ("OMP", "OPENBLAS", "MKL"):
        monkeypatch.setenv(f"{library}_NUM_THREADS", "7")
    names = sandbox.call("environment")
    threads = {name: names.pop(name) for name in sorted(names) if name.endswith("_NUM_THREADS")}
    assert threads == {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    assert {"PATH", "LANG", "LC_ALL", "PYTHONHASHSEED", "PYTHONPATH"} <= set(names)
    others = [name for name in names if not name.startswith(("LC_", "PYTHON"))]
    assert set(others) <= {"PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH"}


@pytest.mark.parametrize("order", ["forge", "forge an error", "lie"])
def test_a_child_that_was_taken_over_makes_its_owner_run_and_hold_nothing(sandbox: Sandbox, order: str) -> None:
    with pytest.raises(ScanError, match="an answer that none may give") as caught:
        sandbox.call(order)
    assert caught.value.status is Status.ERR_DECODER_CRASH
    assert NOTES == []
    assert sandbox.call("fine")[0] == "fine"
