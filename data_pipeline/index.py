"""Finding shards and what is in them: from `index.json` where there is one, else from the tar headers."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, overload

import fsspec
import numpy as np
from braceexpand import braceexpand

from data_pipeline.batch import Skip
from data_pipeline.errors import MissingShardError
from data_pipeline.scan import scan_tar
from data_pipeline.shards import (
    INDEX_FORMAT,
    INDEX_NAME,
    INDEX_VERSION,
    SampleRecords,
    decode_side,
    encode_index,
    encode_side,
    side_name,
)
from data_pipeline.storage import Storage

__all__ = ["ShardEntries", "ShardEntry", "ShardIndex", "open_index", "scan_tar", "write_index"]

_SCAN_THREADS = 8
_NAMED_IN_ERRORS = 5


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One shard of a data set."""

    url: str
    """Full URL of the tar."""
    samples: int
    """Number of samples."""
    size: int
    """Bytes of the tar when it was indexed."""

    @property
    def name(self) -> str:
        """File name without the folder."""
        return self.url.rsplit("/", 1)[-1]


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
        url = self._folders[self._folder[number]] + bytes(self._names[number]).decode()
        return ShardEntry(url, int(self.samples[number]), int(self.sizes[number]))

    def digest(self) -> str:
        """Hash names, counts and sizes, but no folder."""
        names = b"\0".join(self._names.tolist())
        return hashlib.sha256(names + self.samples.tobytes() + self.sizes.tobytes()).hexdigest()[:16]


class ShardIndex:
    """All shards of a data set, with random access to the offsets of every sample.

    Counts are held for all shards; offsets are loaded shard by shard and the last few kept, so that the index
    of a corpus with 10^5 shards stays small in each reader.
    """

    def __init__(
        self,
        entries: Iterable[ShardEntry],
        *,
        skips: Sequence[Skip] = (),
        scanned: dict[int, bytes] | None = None,
        cache_shards: int = 32,
        storage: Storage | None = None,
    ) -> None:
        """Hold the entries; use `open_index` to make one from URLs.

        Args:
            entries: the shards in their order.
            skips: damage found while indexing.
            scanned: packed offsets (`_pack`) of shards that have no side file.
            cache_shards: shards whose offsets are kept.
            storage: how side files are read.
        """
        self.entries = ShardEntries(entries)
        self.skips = tuple(skips)
        self.storage = storage or Storage()
        self._scanned = scanned or {}
        self._cache: OrderedDict[int, SampleRecords] = OrderedDict()
        self._cache_shards = cache_shards

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict()}

    def damage(self) -> str:
        """Say what was found damaged while indexing, the first few of it; "" where all is whole."""
        named = "; ".join(f"{s.shard}: {s.cause} ({s.detail})" for s in self.skips[:_NAMED_IN_ERRORS])
        more = len(self.skips) - _NAMED_IN_ERRORS
        return f"{named}; and {more} more" if more > 0 else named

    @property
    def counts(self) -> np.ndarray:
        """Samples of each shard, int64 [shards]."""
        return self.entries.samples

    @property
    def num_samples(self) -> int:
        """Samples of all shards."""
        return int(self.counts.sum())

    @property
    def fingerprint(self) -> str:
        """Short hash of what positions depend on: names, counts and sizes of the shards, not their folder."""
        return self.entries.digest()

    def records(self, shard: int) -> SampleRecords:
        """Return the samples of one shard with their offsets.

        Raises:
            OSError: when the side file cannot be read.
            ValueError: when the side file is damaged or of another version.
        """
        if shard not in self._cache:
            if shard in self._scanned:
                blob = zlib.decompress(self._scanned[shard])
            else:
                folder, _, name = self.entries[shard].url.rpartition("/")
                blob = self.storage.read_all(f"{folder}/{side_name(name)}")
            self._cache[shard], _ = decode_side(blob)
            while len(self._cache) > self._cache_shards:
                self._cache.popitem(last=False)
        self._cache.move_to_end(shard)
        return self._cache[shard]


def open_index(urls: Sequence[str], *, cache_shards: int = 32, storage: Storage | None = None) -> ShardIndex:
    """Make the index of a data set.

    Args:
        urls: folders with shards, single `.tar` URLs, brace patterns (`shard-{000000..000009}.tar`) or globs,
            in any mixture; their order is part of the sample order.
        cache_shards: number of shards whose offsets a reader keeps.
        storage: how files are read; its cache also keeps the offsets of shards that had to be scanned.

    Raises:
        MissingShardError: when a shard that is listed, or any folder, does not exist; names it.
        ValueError: for compressed shards, or when nothing was found.
    """
    if not urls:
        raise ValueError("no urls: give at least one folder, .tar file, brace pattern or glob")
    storage = storage or Storage()
    entries: list[ShardEntry] = []
    skips: list[Skip] = []
    scanned: dict[int, bytes] = {}
    for url in urls:
        for entry, packed, entry_skips in _open_url(url, storage):
            if packed is not None:
                scanned[len(entries)] = packed
            entries.append(entry)
            skips += entry_skips
    index = ShardIndex(entries, skips=skips, scanned=scanned, cache_shards=cache_shards, storage=storage)
    if index.num_samples == 0:
        raise ValueError(f"no samples in {list(urls)}{': ' + index.damage() if skips else ''}")
    return index


_Found = tuple[ShardEntry, bytes | None, list[Skip]]


def _open_url(url: str, storage: Storage) -> list[_Found]:
    """Index one element of `urls`."""
    if url.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise ValueError(f"{url}: compressed shards have no random access; unpack them to plain .tar")
    if not url.endswith(".tar"):
        return _open_folder(url, storage)
    if any(c in url for c in "*?["):
        fs, path = storage.open_fs(url)
        tars = [fs.unstrip_protocol(p) for p in sorted(storage.tried(lambda: fs.glob(path), url))]
        if not tars:
            raise MissingShardError(f"no shard matches {url}")
    else:
        tars = list(braceexpand(url)) if "{" in url else [url]
    with ThreadPoolExecutor(_SCAN_THREADS) as pool:
        there = list(pool.map(storage.exists, tars))
        missing = [tar for tar, is_there in zip(tars, there, strict=True) if not is_there]
        _raise_missing(missing, f"of {len(tars)} that {url} stands for")
        return list(pool.map(lambda tar: _open_tar(tar, storage), tars))


def _open_folder(url: str, storage: Storage) -> list[_Found]:
    """Index a folder: by its `index.json`, else by its tars in the order of their names."""
    folder = url.rstrip("/")
    sizes = _list_folder(folder, url, storage)
    if sizes is not None and INDEX_NAME not in sizes:
        tars = [f"{folder}/{name}" for name in sorted(sizes) if name.endswith(".tar")]
        if not tars:
            raise MissingShardError(f"{url}: no .tar shard in this folder")
        with ThreadPoolExecutor(_SCAN_THREADS) as pool:
            return list(pool.map(lambda tar: _open_tar(tar, storage), tars))
    shards = _read_index_json(storage.read_all(f"{folder}/{INDEX_NAME}"), url)
    if sizes is not None:
        missing = [f"{folder}/{shard['name']}" for shard in shards if shard["name"] not in sizes]
        _raise_missing(missing, f"of {len(shards)} that {folder}/{INDEX_NAME} lists")
    found: list[_Found] = []
    for shard in shards:
        entry = ShardEntry(f"{folder}/{shard['name']}", shard["samples"], shard["bytes"])
        found.append((entry, None, _compare_size(entry, sizes[shard["name"]] if sizes is not None else None)))
    return found


def _list_folder(folder: str, url: str, storage: Storage) -> dict[str, int | None] | None:
    """Return the sizes of a folder's files by name, or None where an index is there and nothing can be listed.

    Web servers need not list folders; where they hold an index, that is enough.
    """
    fs, path = storage.open_fs(folder)
    fs.invalidate_cache()
    if folder.startswith(("http://", "https://")) and storage.exists(f"{folder}/{INDEX_NAME}"):
        return None
    try:
        rows = storage.tried(lambda: fs.ls(path, detail=True), folder)
    except FileNotFoundError as error:
        raise MissingShardError(f"{url}: no such folder; give a folder that holds .tar shards") from error
    return {str(row["name"]).rstrip("/").rsplit("/", 1)[-1]: row["size"] for row in rows}


def _read_index_json(blob: bytes, url: str) -> list[dict[str, Any]]:
    """Parse `index.json`, with an error that says what to do when it is not ours."""
    try:
        document = json.loads(blob)
        if (document["format"], document["version"]) != (INDEX_FORMAT, INDEX_VERSION):
            raise ValueError(f"format {document['format']}, version {document['version']}")
        return list(document["shards"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{url}/{INDEX_NAME} is not an index of version {INDEX_VERSION} ({error}); "
            "delete it, or make it anew with data_pipeline.index.write_index"
        ) from error


def _compare_size(entry: ShardEntry, size: int | None) -> list[Skip]:
    """Compare a shard's size with the index: a cut shard is a skip, a grown one an error."""
    if size is None or size == entry.size:
        return []
    if size > entry.size:
        raise ValueError(
            f"{entry.url} has {size} bytes but its index says {entry.size}: "
            "it was changed after it was indexed; make the index anew with data_pipeline.index.write_index"
        )
    detail = f"{size} bytes of {entry.size}; samples after the cut are skipped where they are met"
    return [Skip(key="", shard=entry.url, cause="truncated shard", detail=detail)]


def _raise_missing(missing: list[str], among: str) -> None:
    """Raise the error that names missing shards, if there are any."""
    if missing:
        named = ", ".join(missing[:_NAMED_IN_ERRORS]) + (", ..." if len(missing) > _NAMED_IN_ERRORS else "")
        raise MissingShardError(
            f"missing shard: {named} ({len(missing)} {among}); restore it or correct urls"
        )


def _open_tar(url: str, storage: Storage) -> _Found:
    """Index one tar: by its side file where there is one, else by its headers, which the cache then keeps."""
    folder, _, name = url.rpartition("/")
    size = storage.size(url)
    side = f"{folder}/{side_name(name)}"
    if storage.exists(side):
        blob = storage.read_all(side)
        records, indexed_size = decode_side(blob)
        entry = ShardEntry(url, len(records), indexed_size)
        return entry, zlib.compress(blob, 1), _compare_size(entry, size)
    fs, path = storage.open_fs(url)
    known_as = f"scan|{url}|{size}|{fs.ukey(path)}"
    packed = storage.cache.get(known_as) if storage.cache is not None else None
    if packed is not None:
        records, _ = decode_side(zlib.decompress(packed))
        return ShardEntry(url, len(records), size), packed, []
    with storage.open(url, size) as file:
        scanned, skips = scan_tar(file, size, url)
    packed = zlib.compress(encode_side(scanned, size), 1)
    if storage.cache is not None and not skips:  # damage must be told again at every start
        storage.cache.put(known_as, packed)
    return ShardEntry(url, len(scanned), size), packed, skips


def write_index(folder_url: str) -> ShardIndex:
    """Index a folder of tars made by any WebDataset writer: write `index.json` and side files into it.

    Raises:
        MissingShardError: when the folder or its shards do not exist.
        ValueError: when a shard is cut or damaged: such a corpus must not look complete.
    """
    folder = folder_url.rstrip("/")
    fs, path = fsspec.core.url_to_fs(folder)
    names = sorted(str(p).rsplit("/", 1)[-1] for p in fs.ls(path, detail=False) if str(p).endswith(".tar"))
    if not names:
        raise MissingShardError(f"{folder_url}: no .tar shard in this folder")
    shards = []
    for name in names:
        size = int(fs.size(f"{path}/{name}"))
        with fs.open(f"{path}/{name}", "rb") as file:
            records, skips = scan_tar(file, size, f"{folder}/{name}")
            if skips:
                raise ValueError(
                    f"{skips[0].shard}: {skips[0].cause}, {skips[0].detail}; repair or remove it"
                )
            file.seek(0)
            digest = hashlib.sha256()
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        fs.pipe_file(f"{path}/{side_name(name)}", encode_side(records, size))
        shards.append({"name": name, "samples": len(records), "bytes": size, "sha256": digest.hexdigest()})
    fs.pipe_file(f"{path}/{INDEX_NAME}", encode_index(shards))
    return open_index([folder_url])
