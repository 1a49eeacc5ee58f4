"""The shards of a data set as an index lists them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from data_pipeline.evidence import summarise

DIGITS = 16
"""Hexadecimal digits that are kept of a digest."""


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One shard of a data set."""

    url: str
    """Full URL of the tar."""
    samples: int
    """Number of samples."""
    size: int
    """Bytes of the tar when it was indexed."""
    headers: str = ""
    """Digest of its tar headers (`data_pipeline.shards.HeaderDigest`), 16 digits; "" where an older index has none."""
    sha256: str = ""
    """First 16 digits of the SHA-256 of the whole tar, by its index; "" without one."""
    written: float = 0.0
    """When it was last written, by its storage: Unix seconds; 0 where the storage does not say."""

    @property
    def name(self) -> str:
        """File name without the folder."""
        return self.url.rsplit("/", 1)[-1]

    @property
    def version(self) -> str:
        """Name of what the shard holds, as far as it is known: another one, another content."""
        return f"{self.headers}|{self.sha256}|{self.written}"


class ShardEntries(Sequence[ShardEntry]):
    """The shards of an index, held as arrays: Ray then shares one copy among all readers of a node."""

    def __init__(self, entries: Iterable[ShardEntry]) -> None:
        """Take the entries apart into columns."""
        rows = tuple(entries)
        numbers: dict[str, int] = {}
        parts = [entry.url.rpartition("/") for entry in rows]
        folders = [numbers.setdefault(folder + slash, len(numbers)) for folder, slash, _ in parts]
        self._folders = tuple(numbers)
        self._folder = np.array(folders, np.int32)
        self._names = np.array([name.encode() for _, _, name in parts] or [b""], np.bytes_)[: len(rows)]
        self._headers = np.array([entry.headers for entry in rows], f"S{DIGITS}")
        self._sha256 = np.array([entry.sha256 for entry in rows], f"S{DIGITS}")
        self._written = np.array([entry.written for entry in rows], np.float64)
        self.samples = np.array([entry.samples for entry in rows], np.int64)
        """Samples of each shard, int64 [shards]."""
        self.sizes = np.array([entry.size for entry in rows], np.int64)
        """Bytes of each shard, int64 [shards]."""

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, number: int) -> ShardEntry: ...
    @overload
    def __getitem__(self, number: slice) -> tuple[ShardEntry, ...]: ...
    def __getitem__(self, number: int | slice) -> ShardEntry | tuple[ShardEntry, ...]:
        if isinstance(number, slice):
            return tuple(self[i] for i in range(*number.indices(len(self))))
        return ShardEntry(
            url=self._folders[self._folder[number]] + bytes(self._names[number]).decode(),
            samples=int(self.samples[number]),
            size=int(self.sizes[number]),
            headers=bytes(self._headers[number]).decode(),
            sha256=bytes(self._sha256[number]).decode(),
            written=float(self._written[number]),
        )

    def digest(self) -> str:
        """Hash names, counts and sizes, but no folder."""
        names = b"\0".join(self._names.tolist())
        return hashlib.sha256(names + self.samples.tobytes() + self.sizes.tobytes()).hexdigest()[:DIGITS]

    def evidence(self) -> dict[str, dict[str, list[int]]]:
        """Sum up what is known of the contents, by kind of digest; see `data_pipeline.evidence`."""
        columns = {"headers": self._headers, "sha256": self._sha256}
        return {kind: summarise([d.decode() for d in column.tolist()]) for kind, column in columns.items()}
