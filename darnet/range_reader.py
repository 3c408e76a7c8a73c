"""An object that is read span by span, as a file: what fetches a span enters, a file without memory leaves."""

import io
from collections.abc import Callable


class RangeReader(io.RawIOBase):
    """A file of so many bytes, of which each read fetches its own.

    `read_span` gives a span's bytes and False; or all bytes and True, if only the whole can be had: that is kept.
    """

    def __init__(self, num_bytes: int, read_span: Callable[[range], tuple[bytes, bool]]) -> None:
        self._num_bytes, self._read_span = num_bytes, read_span
        self._place = 0
        self._whole: bytes | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._num_bytes}[whence]
        self._place = start + offset
        return self._place

    def read(self, size: int = -1) -> bytes:
        end = self._num_bytes if size < 0 else min(self._place + size, self._num_bytes)
        if end <= self._place:
            return b""
        data = self._fetch(range(self._place, end))
        self._place += len(data)
        return data

    def _fetch(self, span: range) -> bytes:
        if self._whole is None:
            data, is_whole = self._read_span(span)
            if not is_whole:
                return data
            self._whole = data
        return self._whole[span.start : span.stop]
