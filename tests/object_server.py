"""A small object store over HTTP that answers late, cuts its answers short, or gives another object than was asked for.

It knows GET only. Conditions and spans are ignored, as by some stores, unless an answer says otherwise.
"""

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import boto3.session
from botocore.config import Config


@dataclass(frozen=True)
class Answer:
    """What is sent for an object: a body, the length that is declared for it, its tag, and how long to wait before.

    `heeds` names the headers of a request that it does not ignore: Range, If-Match.
    """

    body: bytes
    num_bytes: int
    tag: str = "tag"
    delay_s: float = 0.0
    headers: Mapping[str, str] = field(default_factory=dict)
    heeds: tuple[str, ...] = ()


class Line:
    """What all connections of a server share: so many bytes a second pass. Counts what was sent of each path."""

    def __init__(self, bytes_per_s: float = float("inf")) -> None:
        self.sent: Counter[str] = Counter()
        self._bytes_per_s = bytes_per_s
        self._free_s = 0.0
        self._lock = threading.Lock()

    def send(self, sink: Any, path: str, body: bytes) -> None:
        """Write a body in pieces, each when its turn has come."""
        for start in range(0, len(body), PIECE_BYTES):
            piece = body[start : start + PIECE_BYTES]
            with self._lock:
                self.sent[path] += len(piece)
                self._free_s = max(self._free_s, time.monotonic()) + len(piece) / self._bytes_per_s
                wait_s = self._free_s - time.monotonic()
            time.sleep(max(wait_s, 0))
            sink.write(piece)


PIECE_BYTES = 65_536


@contextmanager
def serve_objects(answer: Callable[[str], Answer | None], line: Line | None = None) -> Iterator[Callable[[], Any]]:
    """Serve until the block ends; yields what makes a boto3 client of this server.

    `answer` is called once a GET; None is an object that is not there.
    """
    line = line or Line()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else a body below 64 KiB waits 40 ms for the acknowledgement of its headers

        def do_GET(self) -> None:
            found = answer(self.path)
            if found is None:
                return self._refuse(404, "NoSuchKey")
            time.sleep(found.delay_s)
            status, body, headers = 200, found.body, {"Content-Length": str(found.num_bytes)}
            asked = {name: self.headers.get(name, "") for name in found.heeds}
            if asked.get("If-Match", "") not in ("", f'"{found.tag}"'):
                return self._refuse(412, "PreconditionFailed")
            if span := re.fullmatch(r"bytes=(\d+)-(\d+)", asked.get("Range", "")):
                first, last = int(span[1]), min(int(span[2]), len(body) - 1)
                if first > last:
                    return self._refuse(416, "InvalidRange")
                status, body = 206, body[first : last + 1]
                headers = {"Content-Length": str(len(body)), "Content-Range": f"bytes {first}-{last}/{len(found.body)}"}
            self.send_response(status)
            for name, value in {**headers, "ETag": f'"{found.tag}"', **found.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            line.send(self.wfile, self.path, body)
            self.close_connection = str(len(body)) != headers["Content-Length"]
            return None

        def _refuse(self, status: int, code: str) -> None:
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 64

        def handle_error(self, *_: Any) -> None:
            """A client that breaks off is what tests are about."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    clients: list[Any] = []

    def connect() -> Any:
        clients.append(
            boto3.session.Session().client(
                "s3",
                region_name="us-east-1",
                endpoint_url=f"http://127.0.0.1:{server.server_address[1]}",
                aws_access_key_id="test",
                aws_secret_access_key="test",
                config=Config(s3={"addressing_style": "path"}, max_pool_connections=16, proxies={}),
            )
        )
        return clients[-1]

    try:
        yield connect
    finally:
        for client in clients:
            client.close()
        server.shutdown()
        server.server_close()
        thread.join()
