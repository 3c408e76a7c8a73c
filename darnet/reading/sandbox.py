"""Runs one importable function again and again in a child process with limits on time and memory.

A crash, a hang or a hunger for memory ends the child, not its owner: it becomes a `ScanError`, and a new child follows.
Hostile bytes may take a decoder over: its owner sends it no secret, and takes of it plain values and stated kinds.
"""

import builtins
import contextlib
import importlib
import io
import math
import os
import pickle
import platform
import re
import resource
import selectors
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np

from darnet.errors import ScanError, Status
from darnet.threads import SLICE_ENVIRONMENT

START_TIMEOUT_S = 120.0  # Source: ours; imports take a second, on a machine with too much to do many more

MAX_ANSWER_BYTES = 1 << 30  # Source: ours; 512 x 512 x 512 voxels and their lungs take a quarter
# What every answer may be made by: what a ScanError is, and arrays of numbers, as pickle's protocol 5 makes them.
KINDS: tuple[Any, ...] = (ScanError, Status, np.dtype, np.zeros(1).__reduce_ex__(5)[0])

# Of the environment, all that a child gets: hostile bytes may take a decoder over, and other names may hold secrets.
GIVEN = re.compile(r"PATH|HOME|LANG|LC_\w+|TMPDIR|LD_LIBRARY_PATH|PYTHON\w*")
_LENGTH = struct.Struct("<Q")
_ENTRY = "import sys; from darnet.reading.sandbox import serve; serve(sys.argv[1], int(sys.argv[2]))"


@dataclass
class Sandbox:
    """Calls `target` ("package.module:function") in a child process, started at the first call and kept.

    A call may take `timeout_s` seconds of a clock and `cpu_s` of processors, of all its threads together. `kinds` are
    the classes that an answer may be made of besides plain values, arrays and exceptions.
    """

    target: str
    memory_bytes: int
    timeout_s: float
    kinds: tuple[type, ...] = ()
    cpu_s: float = math.inf
    _child: "subprocess.Popen[bytes] | None" = field(default=None, init=False)

    def call(self, *arguments: Any) -> Any:
        """The function's return value; arguments and value travel by pickle.

        Raises: ScanError: ERR_TIMEOUT, ERR_DECODER_CRASH, ERR_MEMORY, and ERR_STORAGE where no child can be started;
            OSError; and what the function raises of Python's own exceptions and of `kinds`. Any other answer is
            ERR_DECODER_CRASH too.
        """
        if self._child is not None and self._child.poll() is not None:  # it died between two scans, of neither
            self.close()
        if self._child is None:
            self._child = self._start()
            try:
                self._receive(START_TIMEOUT_S, "starting")
            except ScanError as error:  # which no scan had a part in
                trouble = f"no decoder can be started on the machine {platform.node()}: {error.detail}"
                raise ScanError(Status.ERR_STORAGE, trouble) from None
        try:
            assert self._child.stdin is not None
            _write(self._child.stdin, (arguments, self.timeout_s, self.cpu_s))
        except BrokenPipeError:
            raise self._explain_death() from None
        is_fine, value = self._receive(self.timeout_s, "decoding")
        if is_fine:
            return value
        if isinstance(value, MemoryError):
            self.close()  # what it left behind may starve the next scan
            raise ScanError(Status.ERR_MEMORY, f"decoding needs more than {self.memory_bytes} bytes") from None
        raise value

    def close(self) -> None:
        """End the child, if there is one."""
        if self._child is None:
            return
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self._child = None

    def __del__(self) -> None:
        self.close()

    def _start(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-c", _ENTRY, self.target, str(self.memory_bytes)]
        environment = {name: value for name, value in os.environ.items() if GIVEN.fullmatch(name)}
        environment |= SLICE_ENVIRONMENT
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0)

    def _receive(self, timeout_s: float, doing: str) -> tuple[bool, Any]:
        """The child's next message. Raises: ScanError as `call`."""
        assert self._child is not None
        assert self._child.stdout is not None
        try:
            data = _read_until(self._child.stdout, time.monotonic() + timeout_s)
            message = None if data is None else _Answer(data, self.kinds).unpack()
        except TimeoutError:
            self.close()
            raise ScanError(Status.ERR_TIMEOUT, f"{doing} took more than {timeout_s:g} s") from None
        except EOFError:
            raise self._explain_death() from None
        if message is None:
            self.close()
            raise ScanError(Status.ERR_DECODER_CRASH, "decoder gave an answer that none may give")
        return message

    def _explain_death(self) -> ScanError:
        assert self._child is not None
        code = self._child.wait()
        self.close()
        if code == -signal.SIGKILL:
            return ScanError(Status.ERR_MEMORY, "decoder was killed, most likely for memory")
        if code == -signal.SIGXCPU:
            return ScanError(Status.ERR_TIMEOUT, "decoder used up its processor time")
        name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return ScanError(Status.ERR_DECODER_CRASH, f"decoder died: {name}")


class _Answer(pickle.Unpickler):
    """A child's message, in which nothing can be called but exceptions, KINDS and `kinds`."""

    def __init__(self, data: bytearray, kinds: tuple[type, ...]) -> None:
        super().__init__(io.BytesIO(data))
        self._kinds = {(kind.__module__, kind.__qualname__): kind for kind in (*KINDS, *kinds)}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._kinds:
            return self._kinds[module, name]
        found = getattr(builtins, name, None) if module == "builtins" else None
        if isinstance(found, type) and issubclass(found, Exception):
            return found
        raise pickle.UnpicklingError(f"{module}.{name}")

    def unpack(self) -> tuple[bool, Any] | None:
        """The message, or None of bytes that are none."""
        try:
            is_fine, value = self.load()
        except Exception:  # hostile bytes end in whatever there is
            return None
        return (is_fine, value) if is_fine is True or isinstance(value, Exception) else None


def serve(target: str, memory_bytes: int) -> None:
    """The child's loop: read arguments, call, write (True, value) or (False, exception), until the pipe closes.

    The first message says that all is imported.
    """
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever a decoder prints must not enter the answers
    module, name = target.split(":")
    function = getattr(importlib.import_module(module), name)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _write(answers, (True, None))
    while head := requests.read(_LENGTH.size):
        arguments, timeout_s, cpu_s = pickle.loads(requests.read(_LENGTH.unpack(head)[0]))
        _limit_time(timeout_s, cpu_s)
        try:
            answer = True, function(*arguments)
        except Exception as error:  # travels to the owner, who raises it there
            error.__cause__ = error.__context__ = None  # a cause may not pickle, and may hold DICOM text
            answer = False, error.with_traceback(None)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _write(answers, answer)


def _limit_time(timeout_s: float, cpu_s: float) -> None:
    """A hang must end even if the owner is gone, which would end it earlier; in native code only the system can.

    So must what takes more processors than it may, of which a clock says nothing.
    """
    signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s)
    if cpu_s < math.inf:
        used = resource.getrusage(resource.RUSAGE_SELF)
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used.ru_utime + used.ru_stime + cpu_s), hard))


def _write(pipe: IO[bytes], value: Any) -> None:
    data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    view = memoryview(_LENGTH.pack(len(data)) + data)
    while view:
        view = view[pipe.write(view) :]


def _read_until(pipe: IO[bytes], deadline_s: float) -> bytearray | None:
    """One message, None of one that is too long; TimeoutError at the deadline, EOFError where the other side ended."""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        (length,) = _LENGTH.unpack(_read_exactly(pipe, _LENGTH.size, selector, deadline_s))
        return _read_exactly(pipe, length, selector, deadline_s) if length <= MAX_ANSWER_BYTES else None


def _read_exactly(pipe: IO[bytes], count: int, selector: selectors.BaseSelector, deadline_s: float) -> bytearray:
    parts = bytearray()
    while len(parts) < count:
        if not selector.select(max(deadline_s - time.monotonic(), 0)):
            raise TimeoutError
        part = os.read(pipe.fileno(), min(count - len(parts), 1 << 20))
        if not part:
            raise EOFError
        parts += part
    return parts
