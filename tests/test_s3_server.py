"""The S3 server that other tests trust, where two look for an object at the same moment."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import S3Backend
from moto.s3.responses import S3Response
from werkzeug.test import Client

from tests.s3_server import take_turns

HOST = {"Host": "s3.amazonaws.com"}


@pytest.mark.parametrize(("is_in_turn", "statuses"), [(False, [200, 200]), (True, [200, 412])])
def test_one_of_two_puts_if_absent_wins_as_on_s3_and_not_on_moto(
    is_in_turn: bool, statuses: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("put_object", "delete_object"):
        monkeypatch.setattr(S3Response, name, getattr(S3Response, name))  # put back after the test
    if is_in_turn:
        take_turns()
    client = Client(DomainDispatcherApplication(create_backend_app))
    client.put(f"/racing-{is_in_turn}", headers=HOST)
    both_looked = threading.Barrier(2, timeout=1.0)
    look = S3Backend.get_object

    def look_together(*given: Any, **named: Any) -> Any:
        found = look(*given, **named)
        with suppress(threading.BrokenBarrierError):
            both_looked.wait()
        return found

    monkeypatch.setattr(S3Backend, "get_object", look_together)

    def put(body: bytes) -> int:
        return client.put(f"/racing-{is_in_turn}/slot", data=body, headers=HOST | {"If-None-Match": "*"}).status_code

    with ThreadPoolExecutor(2) as threads:
        assert sorted(threads.map(put, (b"1", b"2"))) == statuses
