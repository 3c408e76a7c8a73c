"""A file that fetches what is read, held against one in memory."""

import io
from random import Random

from darnet.range_reader import RangeReader

DATA = Random(0).randbytes(300)
STEPS = ((0, 0, 10), (-8, 2, 8), (-8, 2, 100), (17, 0, 0), (200, 0, -1), (-90, 1, 5), (400, 0, 3))


def walk(reader: io.RawIOBase | io.BytesIO) -> list[tuple[int, bytes | None, int]]:
    """Seek and read; where each step led and what it gave."""
    return [(reader.seek(offset, whence), reader.read(size), reader.tell()) for offset, whence, size in STEPS]


def test_each_read_fetches_its_own_bytes_and_no_others() -> None:
    asked: list[range] = []

    def read_span(span: range) -> tuple[bytes, bool]:
        asked.append(span)
        return DATA[span.start : span.stop], False

    assert walk(RangeReader(len(DATA), read_span)) == walk(io.BytesIO(DATA))
    assert asked == [range(10), range(292, 300), range(292, 300), range(200, 300), range(210, 215)]


def test_a_whole_that_came_in_place_of_a_span_is_kept() -> None:
    asked: list[range] = []

    def read_span(span: range) -> tuple[bytes, bool]:
        asked.append(span)
        return DATA, True

    assert walk(RangeReader(len(DATA), read_span)) == walk(io.BytesIO(DATA))
    assert asked == [range(10)]
