"""A proxy in front of an S3 server that fails as stores and networks do: always the same way for the same requests.

Whoever starts it gives a policy: what to do with a request, knowing its method, its path and how often it came before.
"""

import random
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

STATUS_OF = {
    "SlowDown": 503,
    "InternalError": 500,
    "AccessDenied": 403,
    "InvalidObjectState": 403,
    "RequestTimeTooSkewed": 403,
    "ExpiredToken": 400,
    "ConditionalRequestConflict": 409,
    "BadDigest": 400,
}
OF_A_CONNECTION = {"connection", "transfer-encoding", "content-length", "expect"}


@dataclass(frozen=True)
class Request:
    """A request on its way: `attempt` counts from 0 those of the same method and target, `span` is its Range."""

    method: str
    path: str
    query: str
    attempt: int
    span: str = ""

    @property
    def is_of_object(self) -> bool:
        """Whether it moves the bytes of one object; listings and the making of buckets do not."""
        return "list-type" not in self.query and self.path.count("/") > 1


@dataclass(frozen=True)
class Fault:
    """What goes wrong: an S3 error code, or

    reset      the connection is closed before anything is done
    lost       the server does it, and the connection is closed before it says so
    slow       the answer comes after `delay_s`
    held       the request waits until the proxy is told to `release`
    truncated  half of the body comes, under the length of the whole
    flipped    one bit of the body's first `within` bytes is another; listings, which have no digest anywhere, come as
               they are
    flipped_upload  one bit of what is put is another when it comes to the server
    cut_upload      half of what is put comes to the server, under the length of the whole, and then a reset
    """

    kind: str
    delay_s: float = 0.0
    within: int = 1 << 40


HOLD_S = 300.0  # nothing waits longer
Policy = Callable[[Request], Fault | None]


def fair_weather(_: Request) -> None:
    """Everything passes."""


@dataclass(frozen=True)
class Weather:
    """Faults drawn by (seed, request), each with its share of all; the bucket, which a test may number, is no part."""

    seed: int
    shares: Mapping[Fault, float]

    def __call__(self, request: Request) -> Fault | None:
        key = request.path.lstrip("/").partition("/")[2]
        drawn = random.Random(f"{self.seed} {request.method} {key} {request.query} {request.attempt}").random()
        for fault, share in self.shares.items():
            if drawn < share:
                return fault
            drawn -= share
        return None


class FaultProxy:
    """The proxy's address, its policy, which may be replaced at any time, and what it has done so far."""

    def __init__(self, server_url: str) -> None:
        self.policy: Policy = fair_weather
        self.url = ""
        self.server = urlsplit(server_url).netloc
        self.done: Counter[str] = Counter()
        self._seen: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self._is_released = threading.Event()

    def hold(self, part: str) -> None:
        """Let every request to a path with this part in it wait, and nothing else happen, until `release`."""
        self._is_released.clear()
        self.policy = lambda request: Fault("held") if part in request.path else None

    def release(self, policy: Policy = fair_weather) -> None:
        """End the waiting; what waits meets the same weather as what comes after it."""
        self.policy = policy
        self._is_released.set()

    def wait_for_release(self) -> None:
        """What a held request does."""
        self._is_released.wait(HOLD_S)

    def judge(self, method: str, target: str, span: str = "") -> Fault | None:
        """Count a request, and decide on it."""
        with self._lock:
            attempt = self._seen[method, target]
            self._seen[method, target] += 1
            parts = urlsplit(target)
            request = Request(method, unquote(parts.path), parts.query, attempt, span)
            fault = self.policy(request)
            if fault is not None and not _can_happen(fault.kind, request):
                fault = None
            self.done["passed" if fault is None else fault.kind] += 1
        return fault


def _can_happen(kind: str, request: Request) -> bool:
    """Listings are not flipped, and only what is put is damaged on its way to the server."""
    if kind.endswith("_upload"):
        return request.method == "PUT" and request.is_of_object
    return kind != "flipped" or request.is_of_object


@contextmanager
def run_fault_proxy(server_url: str) -> Iterator[FaultProxy]:
    """Serve until the block ends."""
    proxy = FaultProxy(server_url)

    class Handler(_Handler):
        pass

    Handler.proxy = proxy
    server = _Server(("127.0.0.1", 0), Handler)
    proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True
    block_on_close = False

    def handle_error(self, *_: Any) -> None:
        """A connection that breaks is what this is about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy

    def _handle(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = self.command, self.path, self.headers.get("Range", "")
        fault = self.proxy.judge(*request)
        while fault is not None and fault.kind == "held":
            self.proxy.wait_for_release()
            fault = self.proxy.judge(*request)
        kind = None if fault is None else fault.kind
        if fault is not None:
            time.sleep(fault.delay_s)
        if kind == "reset":
            return self._hang_up()
        if kind in STATUS_OF:
            return self._answer(STATUS_OF[kind], {"Content-Type": "application/xml"}, _spell_error(kind))
        if kind == "cut_upload":
            self._forward_half(sent)
            return self._hang_up()
        status, headers, body = self._forward(self._flip(sent) if kind == "flipped_upload" else sent)
        if kind == "lost":
            return self._hang_up()
        if fault is not None and kind == "flipped":
            body = self._flip(body, fault.within)
        return self._answer(status, headers, body, is_cut=kind == "truncated")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle  # noqa: N815

    def _flip(self, body: bytes, within: int = 1 << 40) -> bytes:
        """A body with another bit, at a place that depends on the path; nothing is left as it is."""
        if not body:
            return body
        place = zlib.crc32(self.path.encode()) % min(len(body), within)
        return body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]

    def _forward_half(self, sent: bytes) -> None:
        """Begin a request to the server, and close the connection in the middle of its body."""
        connection = HTTPConnection(self.proxy.server, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in OF_A_CONNECTION:
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(sent)))
            connection.endheaders(sent[: len(sent) // 2])
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        finally:
            connection.close()

    def _forward(self, sent: bytes) -> tuple[int, HTTPMessage, bytes]:
        connection = HTTPConnection(self.proxy.server, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in OF_A_CONNECTION}
        try:
            connection.request(self.command, self.path, sent, headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: Mapping[str, str], body: bytes, *, is_cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in OF_A_CONNECTION:
                self.send_header(name, value)
        is_head = self.command == "HEAD"
        self.send_header("Content-Length", headers.get("Content-Length", "0") if is_head else str(len(body)))
        self.end_headers()
        self.wfile.write(b"" if is_head else body[: len(body) // 2] if is_cut else body)
        if is_cut:
            self._hang_up()

    def _hang_up(self) -> None:
        """Close so that the other side is told of a reset, and not of an end."""
        with suppress(OSError):
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        self.close_connection = True

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def _spell_error(code: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>a fault</Message></Error>".encode()
