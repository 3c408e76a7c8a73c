"""A staged file in; its bytes out, or an error where they were asked for and only an excerpt of the file is there."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, cast

from darnet.scan import StagedFile


class MissingBytes(Exception):  # noqa: N818
    """Bytes were read that an excerpt does not hold."""


class ExcerptsTooShort(Exception):  # noqa: N818
    """Files, by their paths, that must be whole before anything can be said of their source."""

    def __init__(self, paths: Iterable[Path]) -> None:
        super().__init__(frozenset(paths))
        self.paths = frozenset(paths)


def open_staged(file: StagedFile) -> BinaryIO:
    """The file, to be read from its beginning; of an excerpt only what is there.

    Raises: MissingBytes, when it is read.
    """
    if file.spans is None:
        return file.path.open("rb")
    return cast(BinaryIO, io.BufferedReader(_Excerpt(file)))


class _Excerpt(io.RawIOBase):
    """A file as long as the whole one, which gives the bytes of its spans and refuses all others."""

    def __init__(self, file: StagedFile) -> None:
        assert file.spans is not None
        self._spans = file.spans
        self._body = file.header_path.open("rb", buffering=0)
        self._num_bytes = file.header_path.stat().st_size
        self.name = str(file.header_path)  # pydicom asks for it

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._body.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._body.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        place = self._body.tell()
        if place >= self._num_bytes:
            return 0
        for span in self._spans:
            if place in span:
                return self._body.readinto(memoryview(buffer)[: span.stop - place]) or 0
        raise MissingBytes

    def close(self) -> None:
        self._body.close()
        super().close()
