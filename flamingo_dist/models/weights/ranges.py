"""Byte ranges of one file on any fsspec file system, tried again when the storage stumbles."""

import os
import time
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

ATTEMPTS = 6
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError)
LOCAL_GAP = 4096
"""Bytes between two wanted pieces of a local file that are read with them: a page."""
REMOTE_GAP = 1 << 20
"""The same of a remote file: a request costs about as much as a megabyte."""


def join_url(folder: str, name: str) -> str:
    """Return the URL of the file `name` in `folder`."""
    return f"{folder.rstrip('/')}/{name}"


class RangeFile:
    """A file that is read in ranges. Counts what it reads."""

    def __init__(self, url: str) -> None:
        """Take the file at `url`, which may be a plain path; nothing is read yet."""
        self.url = url
        self.bytes_read = 0
        self._fs, self._path = fsspec.core.url_to_fs(url)
        self._local: IO[bytes] | None = None
        self._is_local = isinstance(self._fs, LocalFileSystem)
        self.max_gap = LOCAL_GAP if self._is_local else REMOTE_GAP

    def exists(self) -> bool:
        """Return whether the file is there."""
        try:
            # Asked for existence, fsspec's web file system begins to fetch the whole file.
            self._tried(lambda: self._fs.cat_file(self._path, start=0, end=1))
        except FileNotFoundError:
            return False
        return True

    def read_all(self) -> bytes:
        """Return the whole of a small file.

        Raises:
            FileNotFoundError: there is no such file.
            OSError: it could not be read.
        """
        blob: bytes = self._tried(lambda: self._fs.cat_file(self._path))
        return blob

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill `buffer` with the bytes of the file from `start` on.

        Raises:
            FileNotFoundError: there is no such file.
            OSError: it could not be read, or ends too early.
        """
        size = len(buffer)

        def attempt() -> None:
            if self._is_local:
                got = self._read_local(buffer, start)
            else:
                blob = self._fs.cat_file(self._path, start=start, end=start + size)
                if len(blob) > size:  # a server that knows no ranges sends the whole file
                    blob = blob[start : start + size]
                buffer[: len(blob)] = blob
                got = len(blob)
            if got != size:
                raise OSError(f"{self.url} gave {got} of {size} bytes from byte {start} on; is it cut off?")

        self._tried(attempt)
        self.bytes_read += size

    def _read_local(self, buffer: memoryview, start: int) -> int:
        if self._local is None:
            self._local = open(self._path, "rb", buffering=0)  # noqa: SIM115 - open for as long as this object is
        got = 0
        while got < len(buffer) and (count := os.preadv(self._local.fileno(), [buffer[got:]], start + got)):
            got += count
        return got

    def _tried(self, call: Any) -> Any:
        """Call until it succeeds; network libraries have errors of many kinds."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return call()
            except _FINAL:
                raise
            except Exception as error:
                if attempt == ATTEMPTS:
                    raise OSError(
                        f"{self.url}, {attempt} attempts: {type(error).__name__}: {error}"
                    ) from error
            time.sleep(0.1 * 2 ** (attempt - 1))
        raise AssertionError("unreachable: the last attempt returns or raises")
