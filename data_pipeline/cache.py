"""A bounded folder of what was read from remote storage, shared by all readers of a node.

Files are read in aligned chunks, so the samples of one chunk cost one request: this is the read-ahead as well.
Entries are whole or absent: written beside, renamed, and checked by a checksum when read.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.files import write_whole

_CHECKSUM_BYTES = 4
_LOCK = ".lock"


@dataclass(frozen=True, kw_only=True)
class LocalCache:
    """A folder with a bound on its bytes; the entries that were not used longest go first."""

    folder: str
    """Where the entries lie; on a disk of this node, since its lock must work among processes."""
    max_bytes: int
    """Bytes of all entries together."""
    chunk_bytes: int = 4 << 20
    """Bytes of a chunk of a shard."""

    def __post_init__(self) -> None:
        if self.max_bytes < 1 or self.chunk_bytes < 1:
            raise ValueError(
                f"cache of {self.max_bytes} bytes in chunks of {self.chunk_bytes}: both must be at least 1"
            )

    def get(self, key: str) -> bytes | None:
        """Return an entry, or None where it is absent or damaged."""
        path = self._path(key)
        try:
            blob = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        body = blob[:-_CHECKSUM_BYTES]
        if zlib.crc32(body).to_bytes(_CHECKSUM_BYTES, "little") != blob[-_CHECKSUM_BYTES:]:
            path.unlink(missing_ok=True)
            return None
        return body

    def put(self, key: str, body: bytes) -> None:
        """Store an entry, after making room for it; what is larger than the whole cache is not stored."""
        size = len(body) + _CHECKSUM_BYTES
        if size > self.max_bytes:
            return
        path = self._path(key)
        # A full or read-only disk makes the cache useless, not the run.
        with suppress(OSError), self._lock():
            self._make_room(size)
            write_whole(path, body + zlib.crc32(body).to_bytes(_CHECKSUM_BYTES, "little"))

    def _make_room(self, wanted: int) -> None:
        """Remove the entries used longest ago until `wanted` bytes fit; the lock is held."""
        with os.scandir(self.folder) as scan:
            found = [(e.stat().st_mtime_ns, e.stat().st_size, e.path) for e in scan if e.name != _LOCK]
        total = sum(size for _, size, _ in found)
        for _, size, name in sorted(found):
            if total + wanted <= self.max_bytes:
                return
            # A reader that has the file open keeps reading it.
            Path(name).unlink(missing_ok=True)
            total -= size

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Hold the folder's lock among processes and threads."""
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        with open(Path(self.folder) / _LOCK, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _path(self, key: str) -> Path:
        return Path(self.folder) / hashlib.sha256(key.encode()).hexdigest()[:32]
