"""Reading files on any fsspec file system: tried again when the storage stumbles, and never short by accident.

Object stores reset connections, answer 503 and cut bodies. A read that comes back shorter than asked is only
believed when the file's size says so; else it is tried again. What still fails is an error that stops the run:
losing samples to an outage would thin out the data unseen.
"""

from __future__ import annotations

import io
import json
import random
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from typing import IO, Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from data_pipeline.cache import LocalCache

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_SCAN_BUFFER = 256 << 10
_REMEMBERED_URLS = 4096
_FINAL_ERRORS = (PermissionError, IsADirectoryError, NotADirectoryError)
# Network libraries whose errors are not all OSErrors; told by name, so that none has to be installed.
_NETWORK_PACKAGES = frozenset({"aiohttp", "aiobotocore", "botocore", "gcsfs", "s3fs", "requests", "urllib3"})
_WORTH_TRYING_AGAIN = frozenset({408, 425, 429})
_TIMES = ("mtime", "LastModified", "last_modified", "updated")  # local and SFTP, S3, Azure, Google
_SECRETS = ("secret", "token", "password", "key")
_Value = TypeVar("_Value")


class StorageError(OSError):
    """A file could not be read, however often it was tried."""


def parse_options(options: str) -> dict[str, Any]:
    """Read the options of a file system from JSON.

    Raises:
        ValueError: for anything but an object, or for credentials, which a run's `config.json` would publish.
    """
    try:
        parsed = json.loads(options) if options else {}
    except ValueError as error:
        raise ValueError(f"storage_options {options!r}: not JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"""storage_options {options!r}: give an object, as '{{"endpoint_url": "..."}}'""")
    if secret := [name for name in parsed if name.lower() in _SECRETS]:
        raise ValueError(
            f"storage_options name {secret}: credentials belong in the environment (AWS_ACCESS_KEY_ID, ... "
            "or FSSPEC_S3), not in a run's configuration"
        )
    return parsed


class Storage:
    """Reads of one data set; small and picklable, so that readers receive it with the index."""

    def __init__(self, options: str = "", *, attempts: int = 8, cache: LocalCache | None = None) -> None:
        """Prepare; nothing is opened yet.

        Args:
            options: arguments of the fsspec file system as JSON, as `{"endpoint_url": "http://..."}` for S3.
            attempts: times that a read is tried before it counts as failed.
            cache: local copies of what was read.
        """
        self._options, self._attempts, self.cache = parse_options(options), attempts, cache
        self._opened: dict[str, tuple[Any, str]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}

    def open_fs(self, url: str) -> tuple[Any, str]:
        """Return the file system of a URL and the path in it; equal ones share connections.

        Raises:
            ValueError: the package that reads such URLs is not installed.
        """
        found = self._opened.get(url)
        if found is None:
            if len(self._opened) >= _REMEMBERED_URLS:
                self._opened.clear()
            try:
                found = self._opened[url] = fsspec.core.url_to_fs(url, **self._options)
            except ImportError as error:  # says which one
                raise ValueError(f"{url} cannot be read here: {error}") from error
        return found

    def tried(self, call: Callable[[], _Value], what: str) -> _Value:
        """Call until it succeeds.

        Args:
            call: does one attempt.
            what: name of the thing in errors.

        Raises:
            FileNotFoundError: at once, when there is no such file.
            StorageError: when the last attempt failed.
        """
        for attempt in range(1, self._attempts + 1):
            try:
                return call()
            except Exception as error:
                if not _is_passing(error):
                    raise
                if attempt == self._attempts or _is_refusal(error):
                    detail = f"{what}, {attempt} attempts: {type(error).__name__}: {error}"[:400]
                    raise StorageError(detail) from error
            # Readers that met the same outage do not come back in step.
            time.sleep(min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def read(self, url: str, start: int, stop: int, *, size: int | None = None, version: str = "") -> bytes:
        """Read bytes start ... stop - 1 of a file, through the cache if there is one.

        Args:
            url: the file.
            start: first byte.
            stop: one past the last byte.
            size: bytes of the whole file, where an index knows them; only then the cache is used.
            version: name of the file's content; the cache gives nothing that was read of another.

        Returns:
            The bytes; fewer where the file ends before `stop`.

        Raises:
            FileNotFoundError: when there is no such file.
            StorageError: when it cannot be read.
        """
        if stop <= start:
            return b""
        if self.cache is None or size is None:
            return self._fetch(url, start, stop)
        chunk = self.cache.chunk_bytes
        parts = []
        for number in range(start // chunk, (stop - 1) // chunk + 1):
            first, last = number * chunk, min((number + 1) * chunk, size)
            known_as = f"{url}|{size}|{version}|{chunk}|{number}"
            blob = self.cache.get(known_as)
            if blob is None:
                blob = self._fetch(url, first, last)
                if len(blob) == last - first:  # a file cut since it was indexed may be restored
                    self.cache.put(known_as, blob)
            parts.append(blob[max(0, start - first) : stop - first])
            if len(blob) < last - first:
                break
        return b"".join(parts)

    def read_all(self, url: str) -> bytes:
        """Read a whole small file.

        Raises:
            FileNotFoundError: when there is no such file.
            StorageError: when it cannot be read.
        """
        fs, path = self.open_fs(url)

        def attempt() -> bytes:
            blob: bytes = fs.cat_file(path)
            # A connection that ends early looks like a short file where the server sent no length.
            known = fs.info(path).get("size")
            if known is not None and known != len(blob):
                raise StorageError(f"{len(blob)} bytes of {known}")
            return blob

        return self.tried(attempt, url)

    def stat(self, url: str) -> tuple[int, float]:
        """Return the size of a file in bytes, and when it was written (`written_at`).

        Raises:
            FileNotFoundError: when there is no such file.
            StorageError: when the file system cannot say how large it is.
        """
        fs, path = self.open_fs(url)
        info = self.tried(lambda: fs.info(path), f"size of {url}")
        if info.get("size") is None:
            raise StorageError(f"{url}: the server does not say how large it is, so ranges cannot be read")
        return int(info["size"]), written_at(info)

    def exists(self, url: str) -> bool:
        """Whether a file is there."""
        return self.find(url) is not None

    def find(self, url: str) -> Mapping[str, Any] | None:
        """Return what the file system says of a file, or None where there is none."""
        fs, path = self.open_fs(url)
        try:
            info: Mapping[str, Any] = self.tried(lambda: fs.info(path), url)
        except FileNotFoundError:
            return None
        return info

    def open(self, url: str, size: int) -> IO[bytes]:
        """Open a file of known size for reading and seeking, each range retried by itself."""
        return io.BufferedReader(_RangeFile(self, url, size), _SCAN_BUFFER)

    def _fetch(self, url: str, start: int, stop: int) -> bytes:
        """Read a range from the storage itself."""
        fs, path = self.open_fs(url)
        local = isinstance(fs, LocalFileSystem)

        def attempt() -> bytes:
            blob: bytes = (
                _read_local(path, start, stop) if local else fs.cat_file(path, start=start, end=stop)
            )
            if len(blob) == stop - start:
                return blob
            if len(blob) > stop - start:  # a server that knows no ranges sends the whole file
                if len(blob) < stop:
                    raise StorageError(f"{len(blob)} bytes came where {stop - start} were asked for")
                return blob[start:stop]
            fs.invalidate_cache()
            known = fs.info(path).get("size")
            if known is None or len(blob) != max(0, min(stop, known) - start):
                raise StorageError(f"{len(blob)} of {stop - start} bytes came")
            return blob

        return self.tried(attempt, f"{url} bytes {start}-{stop}")


def written_at(info: Mapping[str, Any]) -> float:
    """Return when a file was last written, by what its file system says of it.

    Args:
        info: `fs.info`, or a row of `fs.ls`, of a local folder or an object store.

    Returns:
        Unix seconds; 0 where it does not say, as web servers do not in a listing.
    """
    when = next((info[name] for name in _TIMES if info.get(name) is not None), 0)
    if isinstance(when, str):
        with suppress(ValueError):
            when = datetime.fromisoformat(when)
    if isinstance(when, datetime):
        return when.timestamp()
    return float(when) if isinstance(when, int | float) else 0.0


def _read_local(path: str, start: int, stop: int) -> bytes:
    """Read a range of a file on this machine, without what fsspec adds for those that are not."""
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        blob = file.read(stop - start)
        while len(blob) < stop - start and (more := file.read(stop - start - len(blob))):
            blob += more
        return blob


class _RangeFile(io.RawIOBase):
    """A remote file as Python's own file object."""

    def __init__(self, storage: Storage, url: str, size: int) -> None:
        super().__init__()
        self._storage, self._url, self._size, self._at = storage, url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._size)
        blob = self._storage.read(self._url, self._at, stop)
        buffer[: len(blob)] = blob
        self._at += len(blob)
        return len(blob)


def _is_passing(error: BaseException) -> bool:
    """Whether an error is the storage's, and neither a plain absence nor a fault of ours."""
    if isinstance(error, FileNotFoundError):
        # fsspec's web file system calls whatever went wrong with a size "not found"; the cause says what it was.
        cause = error.__cause__
        web = type(cause).__module__.split(".")[0] == "aiohttp" or isinstance(cause, OSError)
        return (
            web
            and cause is not None
            and getattr(cause, "status", None) not in (404, 410)
            and _is_passing(cause)
        )
    if isinstance(error, _FINAL_ERRORS):
        return False
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in _NETWORK_PACKAGES


def _is_refusal(error: Exception) -> bool:
    """Whether a server said no in a way that asking again does not change (forbidden, not allowed)."""
    status = getattr(error, "status", None)
    return isinstance(status, int) and 400 <= status < 500 and status not in _WORTH_TRYING_AGAIN
