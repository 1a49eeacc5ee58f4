"""Byte ranges of one file on any fsspec file system, tried again when the storage stumbles."""

import io
import os
import shutil
import time
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

ATTEMPTS = 6
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError)
LOCAL_GAP = 4096
"""Bytes between two wanted pieces of a local file that are read with them: a page."""
REMOTE_GAP = 1 << 20
"""The same of a remote file: a request costs about as much as a megabyte."""
STREAM_BYTES = 8 << 20
"""What is asked for at once of a file that is read from its beginning to its end."""


def join_url(folder: str, name: str) -> str:
    """Return the URL of the file `name` in `folder`."""
    return f"{folder.rstrip('/')}/{name}"


def inside(folder: str, place: str) -> str:
    """Return the URL of what a file in `folder` calls `place`: a path inside it, one from the root, or a URL."""
    return place if os.path.isabs(place) or "://" in place else join_url(folder, place)


def absolute(url: str) -> str:
    """Return a URL as it is, and a local path from the root, so that it means the same in any working directory."""
    # Links stay: the files of Hugging Face's cache are links from names with endings to names without.
    return url if "://" in url else os.path.abspath(url)


def list_names(folder: str, ending: str) -> list[str]:
    """Return the names in `folder`, any fsspec URL, that end in `ending`; none where the storage cannot list."""
    fs, path = fsspec.core.url_to_fs(folder)
    try:
        found = fs.ls(path, detail=False)
    except Exception:  # web servers and their library have errors of many kinds
        return []
    return sorted({name.rsplit("/", 1)[-1] for name in found if name.endswith(ending)})


class RangeFile:
    """A file that is read in ranges. Counts what it reads."""

    def __init__(self, url: str, *, attempts: int | None = None) -> None:
        """Take a file; nothing is read yet.

        Args:
            url: any fsspec URL, or a plain path.
            attempts: times that a read is tried; None is `ATTEMPTS`.

        Raises:
            ValueError: nothing here reads such URLs.
        """
        self.url = url
        self.bytes_read = 0
        self.attempts = ATTEMPTS if attempts is None else attempts
        try:
            self._fs, self._path = fsspec.core.url_to_fs(url)
        except (
            ImportError,
            ValueError,
        ) as error:  # fsspec says which package is missing, or which protocols it knows
            raise ValueError(f"{url} cannot be read here: {error}") from error
        self._local: IO[bytes] | None = None
        self.is_local = isinstance(self._fs, LocalFileSystem)
        self.max_gap = LOCAL_GAP if self.is_local else REMOTE_GAP

    def exists(self) -> bool:
        """Return whether the file is there."""
        try:
            # Asked for existence, fsspec's web file system begins to fetch the whole file.
            self._tried(lambda: self._fs.cat_file(self._path, start=0, end=1))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return False
        return True

    def size(self) -> int:
        """Return the file's size in bytes.

        Raises:
            FileNotFoundError: there is no such file.
            OSError: the storage does not say.
        """
        size = self._tried(lambda: self._fs.size(self._path))
        if size is None:
            raise OSError(f"{self.url}: the storage does not say how large it is.")
        return int(size)

    def opened(self) -> io.BufferedReader:
        """Return the file for reading and seeking; what is asked for comes in ranges, each tried again by itself.

        Raises:
            FileNotFoundError: there is no such file.
        """
        return io.BufferedReader(_Stream(self, self.size()), STREAM_BYTES)

    def copy_to(self, path: Path) -> None:
        """Copy the file to a local path, piece by piece; where it does not exist, nothing is made.

        Raises:
            FileNotFoundError: there is no such file.
        """
        with self.opened() as source, path.open("wb") as target:
            shutil.copyfileobj(source, target, STREAM_BYTES)

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
            if self.is_local:
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
        for attempt in range(1, self.attempts + 1):
            try:
                return call()
            except Exception as error:
                if isinstance(error, PermissionError) and self.url not in str(error):
                    raise PermissionError(
                        f"{self.url}: {error or 'no permission'}; are there credentials for it?"
                    ) from error
                if isinstance(error, _FINAL) and not _is_busy_server(error):
                    raise
                if attempt == self.attempts:
                    raise OSError(
                        f"{self.url}, {attempt} attempts: {type(error).__name__}: {error}"
                    ) from error
            time.sleep(0.1 * 2 ** (attempt - 1))
        raise AssertionError("unreachable: the last attempt returns or raises")


def _is_busy_server(error: Exception) -> bool:
    """Return whether fsspec's web file system calls "not found" what its cause says is something else."""
    cause = error.__cause__
    return type(cause).__module__.startswith("aiohttp") and getattr(cause, "status", None) not in (404, 410)


class _Stream(io.RawIOBase):
    """A `RangeFile` with a position."""

    def __init__(self, file: RangeFile, size: int) -> None:
        self._file, self._size, self._at = file, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self._size - self._at))
        # In pieces, so that what a remote read returns is never large.
        for start in range(0, wanted, STREAM_BYTES):
            piece = view[start : min(start + STREAM_BYTES, wanted)]
            self._file.read_into(piece, self._at + start)
        self._at += wanted
        return wanted
