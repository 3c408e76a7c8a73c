"""moto's S3 server with puts and deletes of objects one at a time: `python -m tests.s3_server -p PORT`.

moto looks whether a condition holds and then writes, in threads: of two racing puts if absent both may win. S3 promises
that one does. Source: the S3 documentation of conditional writes; `S3Response.put_object` of moto 5.2.5.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

from moto.s3.responses import S3Response
from moto.server import main


def take_turns() -> None:
    """Let this process's S3 change one object at a time, conditions included."""
    turn = threading.Lock()

    def in_turn(change: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(change)
        def take(response: S3Response) -> Any:
            with turn:
                return change(response)

        return take

    for name in ("put_object", "delete_object"):
        setattr(S3Response, name, in_turn(getattr(S3Response, name)))


if __name__ == "__main__":
    take_turns()
    main()
