"""Finding shards and what is in them: from `index.json` where there is one, else from the tar headers."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import IO, Any

import fsspec
import numpy as np
from braceexpand import braceexpand

from data_pipeline.batch import Skip
from data_pipeline.entries import DIGITS, ShardEntries, ShardEntry
from data_pipeline.errors import MissingShardError
from data_pipeline.scan import scan_tar
from data_pipeline.shards import (
    INDEX_FORMAT,
    INDEX_NAME,
    INDEX_VERSION,
    SampleRecord,
    SampleRecords,
    decode_side,
    encode_index,
    encode_side,
    side_name,
)
from data_pipeline.storage import Storage, written_at

__all__ = ["ShardEntries", "ShardEntry", "ShardIndex", "open_index", "scan_tar", "write_index"]

_SCAN_THREADS = 8
_NAMED_IN_ERRORS = 5
_COMPARED_BYTES = 8 << 30
_CHUNK = 1 << 20


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
            ValueError: when the side file is damaged, of another version, or of another shard than the index.
        """
        if shard not in self._cache:
            if shard in self._scanned:
                records, _ = decode_side(zlib.decompress(self._scanned[shard]))
            else:
                records = self._read_side(self.entries[shard])
            self._cache[shard] = records
            while len(self._cache) > self._cache_shards:
                self._cache.popitem(last=False)
        self._cache.move_to_end(shard)
        return self._cache[shard]

    def _read_side(self, entry: ShardEntry) -> SampleRecords:
        """Read a shard's side file and compare it with the index."""
        folder, _, name = entry.url.rpartition("/")
        records, size = decode_side(self.storage.read_all(f"{folder}/{side_name(name)}"))
        known = bool(records.sha256 and entry.sha256)
        if size != entry.size or (known and records.sha256[:DIGITS] != entry.sha256):
            raise ValueError(
                f"{name} was indexed anew since this run opened its data, as another shard; restore it, or start again"
            )
        return records


def open_index(urls: Sequence[str], *, cache_shards: int = 32, storage: Storage | None = None) -> ShardIndex:
    """Make the index of a data set.

    Args:
        urls: folders with shards, single `.tar` URLs, brace patterns (`shard-{000000..000009}.tar`) or globs,
            in any mixture; their order is part of the sample order.
        cache_shards: number of shards whose offsets a reader keeps.
        storage: how files are read; its cache also keeps the offsets of shards that had to be scanned.

    Raises:
        MissingShardError: when a shard that is listed, or any folder, does not exist; names it.
        ValueError: for compressed shards, for one that is another than its index was made of, or when nothing was
            found.
    """
    if not urls:
        raise ValueError("no urls: give at least one folder, .tar file, brace pattern or glob")
    storage = storage or Storage()
    found = [shard for url in urls for shard in _open_url(url, storage)]
    _compare_late([shard for shard in found if shard.is_late and shard.sha256 and not shard.skips], storage)
    skips = [skip for shard in found for skip in shard.skips]
    scanned = {number: shard.packed for number, shard in enumerate(found) if shard.packed is not None}
    entries = (shard.entry for shard in found)
    index = ShardIndex(entries, skips=skips, scanned=scanned, cache_shards=cache_shards, storage=storage)
    if index.num_samples == 0:
        raise ValueError(f"no samples in {list(urls)}{': ' + index.damage() if skips else ''}")
    return index


@dataclass(frozen=True, kw_only=True)
class _Found:
    """One shard, as it was found."""

    entry: ShardEntry
    skips: Sequence[Skip] = ()
    """What is damaged."""
    packed: bytes | None = None
    """Its side file, compressed, where it need not be read later."""
    sha256: str = ""
    """Of the tar, by its index."""
    is_late: bool = False
    """Whether its storage says that it was written after its index."""


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
    rows = _list_folder(folder, url, storage)
    if rows is not None and INDEX_NAME not in rows:
        tars = [f"{folder}/{name}" for name in sorted(rows) if name.endswith(".tar")]
        if not tars:
            raise MissingShardError(f"{url}: no .tar shard in this folder")
        with ThreadPoolExecutor(_SCAN_THREADS) as pool:
            return list(pool.map(lambda tar: _open_tar(tar, storage), tars))
    shards = _read_index_json(storage.read_all(f"{folder}/{INDEX_NAME}"), url)
    if rows is not None:
        missing = [f"{folder}/{shard['name']}" for shard in shards if shard["name"] not in rows]
        _raise_missing(missing, f"of {len(shards)} that {folder}/{INDEX_NAME} lists")
    indexed_at = written_at(rows[INDEX_NAME]) if rows is not None else 0.0
    return [
        _listed(folder, shard, rows[shard["name"]] if rows is not None else None, indexed_at)
        for shard in shards
    ]


def _listed(
    folder: str, shard: Mapping[str, Any], row: Mapping[str, Any] | None, indexed_at: float
) -> _Found:
    """Take one shard of an `index.json`; `row` is what the folder's listing says of it, if there is one."""
    entry = ShardEntry(
        url=f"{folder}/{shard['name']}",
        samples=shard["samples"],
        size=shard["bytes"],
        headers=shard.get("headers", ""),
        sha256=shard.get("sha256", "")[:DIGITS],
        written=written_at(row) if row is not None else 0.0,
    )
    return _Found(
        entry=entry,
        skips=_compare_size(entry, row["size"] if row is not None else None),
        sha256=shard.get("sha256", ""),
        is_late=entry.written > indexed_at > 0,
    )


def _list_folder(folder: str, url: str, storage: Storage) -> dict[str, Mapping[str, Any]] | None:
    """Return what is said of a folder's files by name, or None where an index is there and nothing can be listed.

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
    return {str(row["name"]).rstrip("/").rsplit("/", 1)[-1]: row for row in rows}


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


def _compare_late(late: Sequence[_Found], storage: Storage) -> None:
    """Compare shards that were written after their index with it, byte for byte.

    A few were edited in place; many are a corpus that was copied without its times, which is not read for that.
    """
    if sum(shard.entry.size for shard in late) > _COMPARED_BYTES:
        return

    def digest(shard: _Found) -> str:
        with storage.open(shard.entry.url, shard.entry.size) as file:
            return _copy_digest(file, [])[0]

    with ThreadPoolExecutor(_SCAN_THREADS) as pool:
        for shard, now in zip(late, pool.map(digest, late), strict=True):
            if now != shard.sha256:
                raise ValueError(
                    f"{shard.entry.url} holds other bytes than its index says (SHA-256 {now}, not {shard.sha256}): it "
                    "was changed after it was indexed; restore it, or make the index anew with "
                    "data_pipeline.index.write_index"
                )


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
    size, written = storage.stat(url)
    side = f"{folder}/{side_name(name)}"
    if (side_info := storage.find(side)) is not None:
        blob = storage.read_all(side)
        records, indexed_size = decode_side(blob)
        entry = _entry(url, records, indexed_size, written)
        return _Found(
            entry=entry,
            skips=_compare_size(entry, size),
            packed=zlib.compress(blob, 1),
            sha256=records.sha256,
            is_late=written > written_at(side_info) > 0,
        )
    fs, path = storage.open_fs(url)
    known_as = f"scan|{url}|{size}|{fs.ukey(path)}"
    packed = storage.cache.get(known_as) if storage.cache is not None else None
    if packed is not None:
        records, _ = decode_side(zlib.decompress(packed))
        return _Found(entry=_entry(url, records, size, written), packed=packed)
    with storage.open(url, size) as file:
        scanned, skips, headers = scan_tar(file, size, url)
    blob = encode_side(scanned, size, headers=headers)
    packed = zlib.compress(blob, 1)
    if storage.cache is not None and not skips:  # damage must be told again at every start
        storage.cache.put(known_as, packed)
    return _Found(entry=_entry(url, decode_side(blob)[0], size, written), skips=skips, packed=packed)


def _entry(url: str, records: SampleRecords, size: int, written: float) -> ShardEntry:
    """Make the entry of a shard whose samples are known."""
    return ShardEntry(
        url=url,
        samples=len(records),
        size=size,
        headers=records.headers,
        sha256=records.sha256[:DIGITS],
        written=written,
    )


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
            scanned, skips, headers = scan_tar(file, size, f"{folder}/{name}")
            if skips:
                raise ValueError(
                    f"{skips[0].shard}: {skips[0].cause}, {skips[0].detail}; repair or remove it"
                )
            file.seek(0)
            sha256, records = _copy_digest(file, scanned)
        digests = {"sha256": sha256, "headers": headers}
        fs.pipe_file(f"{path}/{side_name(name)}", encode_side(records, size, **digests))
        shards.append({"name": name, "samples": len(records), "bytes": size, **digests})
    fs.pipe_file(f"{path}/{INDEX_NAME}", encode_index(shards))
    return open_index([folder_url])


def _copy_digest(file: IO[bytes], samples: Sequence[SampleRecord]) -> tuple[str, list[SampleRecord]]:
    """Read a shard once from its start, for its SHA-256 and the CRC-32 of the members of its samples."""
    digest = hashlib.sha256()
    crcs: dict[int, int] = {}

    def take(count: int) -> Iterator[bytes]:
        while count > 0 and (chunk := file.read(min(count, _CHUNK))):
            digest.update(chunk)
            count -= len(chunk)
            yield chunk

    at = 0
    members = (member for sample in samples for member in sample.members.values())
    for offset, size in sorted((member.offset, member.size) for member in members):
        deque(take(offset - at), maxlen=0)
        crc = 0
        for chunk in take(size):
            crc = zlib.crc32(chunk, crc)
        crcs[offset], at = crc, offset + size
    while deque(take(_CHUNK), maxlen=1):
        pass
    return digest.hexdigest(), [
        SampleRecord(s.key, {e: replace(m, crc32=crcs[m.offset]) for e, m in s.members.items()})
        for s in samples
    ]
