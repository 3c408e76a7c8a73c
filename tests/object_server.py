"""A small object store over HTTP that answers late, cuts its answers short, or gives another object than was asked for.

It knows GET only and ignores conditions, as some stores do.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import boto3.session
from botocore.config import Config


@dataclass(frozen=True)
class Answer:
    """What is sent for an object: a body, the length that is declared for it, its tag, and how long to wait before."""

    body: bytes
    num_bytes: int
    tag: str = "tag"
    delay_s: float = 0.0
    headers: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def serve_objects(answer: Callable[[str], Answer]) -> Iterator[Callable[[], Any]]:
    """Serve until the block ends; yields what makes a boto3 client of this server. `answer` is called once a GET."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            found = answer(self.path)
            time.sleep(found.delay_s)
            self.send_response(200)
            self.send_header("Content-Length", str(found.num_bytes))
            self.send_header("ETag", f'"{found.tag}"')
            for name, value in found.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(found.body)
            self.close_connection = len(found.body) != found.num_bytes

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
