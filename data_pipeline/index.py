"""Finding shards and what is in them: from `index.json` where there is one, else from the tar headers."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any

import fsspec
import numpy as np
from braceexpand import braceexpand

from data_pipeline.batch import Skip
from data_pipeline.errors import MissingShardError
from data_pipeline.shards import (
    INDEX_FORMAT,
    INDEX_NAME,
    INDEX_VERSION,
    TAR_BLOCK,
    Member,
    SampleRecord,
    decode_side,
    encode_index,
    encode_side,
    side_name,
)

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


class ShardIndex:
    """All shards of a data set, with random access to the offsets of every sample.

    Counts are held for all shards; offsets are loaded shard by shard and the last few kept, so that the index
    of a corpus with 10^5 shards stays small in each reader.
    """

    def __init__(
        self,
        entries: Sequence[ShardEntry],
        *,
        skips: Sequence[Skip] = (),
        scanned: dict[int, list[SampleRecord]] | None = None,
        cache_shards: int = 32,
    ) -> None:
        """Hold the entries; use `open_index` to make one from URLs."""
        self.entries = tuple(entries)
        self.skips = tuple(skips)
        self._scanned = scanned or {}
        self._cache: OrderedDict[int, list[SampleRecord]] = OrderedDict()
        self._cache_shards = cache_shards

    @property
    def counts(self) -> np.ndarray:
        """Samples of each shard, int64 [shards]."""
        return np.array([entry.samples for entry in self.entries], np.int64)

    @property
    def num_samples(self) -> int:
        """Samples of all shards."""
        return sum(entry.samples for entry in self.entries)

    @property
    def fingerprint(self) -> str:
        """Short hash of what positions depend on: names, counts and sizes of the shards, not their folder."""
        rows = [[entry.name, entry.samples, entry.size] for entry in self.entries]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]

    def records(self, shard: int) -> list[SampleRecord]:
        """Return the samples of one shard with their offsets.

        Raises:
            OSError: when the side file cannot be read.
        """
        if shard in self._scanned:
            return self._scanned[shard]
        if shard not in self._cache:
            fs, path = fsspec.core.url_to_fs(self.entries[shard].url)
            folder, _, name = path.rpartition("/")
            self._cache[shard], _ = decode_side(fs.cat_file(f"{folder}/{side_name(name)}"))
            while len(self._cache) > self._cache_shards:
                self._cache.popitem(last=False)
        self._cache.move_to_end(shard)
        return self._cache[shard]


def open_index(urls: Sequence[str], *, cache_shards: int = 32) -> ShardIndex:
    """Make the index of a data set.

    Args:
        urls: folders with shards, single `.tar` URLs, brace patterns (`shard-{000000..000009}.tar`) or globs,
            in any mixture; their order is part of the sample order.
        cache_shards: number of shards whose offsets a reader keeps.

    Raises:
        MissingShardError: when a shard that is listed, or any folder, does not exist; names it.
        ValueError: for compressed shards, or when nothing was found.
    """
    if not urls:
        raise ValueError("no urls: give at least one folder, .tar file, brace pattern or glob")
    entries: list[ShardEntry] = []
    skips: list[Skip] = []
    scanned: dict[int, list[SampleRecord]] = {}
    for url in urls:
        found = _open_url(url)
        for entry, records, entry_skips in found:
            if records is not None:
                scanned[len(entries)] = records
            entries.append(entry)
            skips += entry_skips
    index = ShardIndex(entries, skips=skips, scanned=scanned, cache_shards=cache_shards)
    if index.num_samples == 0:
        damage = "; ".join(f"{s.shard}: {s.cause} ({s.detail})" for s in skips[:_NAMED_IN_ERRORS])
        raise ValueError(f"no samples in {list(urls)}{': ' + damage if damage else ''}")
    return index


_Found = tuple[ShardEntry, list[SampleRecord] | None, list[Skip]]


def _open_url(url: str) -> list[_Found]:
    """Index one element of `urls`."""
    if url.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise ValueError(f"{url}: compressed shards have no random access; unpack them to plain .tar")
    if not url.endswith(".tar"):
        return _open_folder(url)
    if any(c in url for c in "*?["):
        fs, path = fsspec.core.url_to_fs(url)
        tars = [fs.unstrip_protocol(p) for p in sorted(fs.glob(path))]
        if not tars:
            raise MissingShardError(f"no shard matches {url}")
    else:
        tars = list(braceexpand(url)) if "{" in url else [url]
    with ThreadPoolExecutor(_SCAN_THREADS) as pool:
        there = list(pool.map(_exists, tars))
        missing = [tar for tar, is_there in zip(tars, there, strict=True) if not is_there]
        _raise_missing(missing, f"of {len(tars)} that {url} stands for")
        return list(pool.map(_open_tar, tars))


def _open_folder(url: str) -> list[_Found]:
    """Index a folder: by its `index.json`, else by its tars in the order of their names."""
    folder = url.rstrip("/")
    fs, path = fsspec.core.url_to_fs(folder)
    fs.invalidate_cache()
    try:
        sizes = {str(i["name"]).rstrip("/").rsplit("/", 1)[-1]: i["size"] for i in fs.ls(path, detail=True)}
    except FileNotFoundError as error:
        raise MissingShardError(f"{url}: no such folder; give a folder that holds .tar shards") from error
    if INDEX_NAME not in sizes:
        tars = [f"{folder}/{name}" for name in sorted(sizes) if name.endswith(".tar")]
        if not tars:
            raise MissingShardError(f"{url}: no .tar shard in this folder")
        with ThreadPoolExecutor(_SCAN_THREADS) as pool:
            return list(pool.map(_open_tar, tars))
    shards = _read_index_json(fs.cat_file(f"{path}/{INDEX_NAME}"), url)
    missing = [f"{folder}/{shard['name']}" for shard in shards if shard["name"] not in sizes]
    _raise_missing(missing, f"of {len(shards)} that {folder}/{INDEX_NAME} lists")
    found: list[_Found] = []
    for shard in shards:
        entry = ShardEntry(f"{folder}/{shard['name']}", shard["samples"], shard["bytes"])
        found.append((entry, None, _compare_size(entry, sizes[shard["name"]])))
    return found


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


def _exists(url: str) -> bool:
    """Whether a file is there."""
    fs, path = fsspec.core.url_to_fs(url)
    return bool(fs.exists(path))


def _open_tar(url: str) -> _Found:
    """Index one tar: by its side file where there is one, else by its headers."""
    fs, path = fsspec.core.url_to_fs(url)
    size = int(fs.size(path))
    folder, _, name = path.rpartition("/")
    side = f"{folder}/{side_name(name)}"
    if fs.exists(side):
        records, indexed_size = decode_side(fs.cat_file(side))
        entry = ShardEntry(url, len(records), indexed_size)
        return entry, records, _compare_size(entry, size)
    with fs.open(path, "rb") as file:
        records, skips = scan_tar(file, size, url)
    return ShardEntry(url, len(records), size), records, skips


def scan_tar(file: IO[bytes], size: int, url: str) -> tuple[list[SampleRecord], list[Skip]]:
    """Read the headers of a tar and group its members into samples.

    Everything complete before a cut is kept. A cut or damaged tar gives one skip that says where.

    Args:
        file: the tar, opened for reading and seekable.
        size: its size in bytes.
        url: its name in the skips.
    """
    groups: list[tuple[str, dict[str, Member]]] = []
    fault, end = "", 0
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  (the caller closes the file)
        while (header := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header for ever
            end = header.offset_data + header.size
            if end > size:
                fault = f"cut inside {header.name} at byte {size}"
                if groups and groups[-1][0] == _split_name(header.name)[0]:
                    groups.pop()
                break
            if header.isfile():
                _add_member(groups, header.name, Member(header.offset_data, header.size))
        else:
            end = int(tar.offset)
            file.seek(end)
            # tarfile ends silently at a damaged header; only a block of zeros is a real end.
            if file.read(TAR_BLOCK) != b"\0" * TAR_BLOCK:
                fault = f"no valid tar header and no end mark at byte {end}"
    except (tarfile.TarError, EOFError) as error:
        fault = f"{error} after byte {end}"
    skips = []
    if fault:
        detail = f"{fault}; the {len(groups)} samples before it are used"
        skips.append(Skip(key="", shard=url, cause="truncated shard", detail=detail))
    return [SampleRecord(key, members) for key, members in groups], skips


def _split_name(name: str) -> tuple[str, str]:
    """Split a member's name as WebDataset does: the key ends at the first dot of the last part."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _add_member(groups: list[tuple[str, dict[str, Member]]], name: str, member: Member) -> None:
    """Put one member into the sample it belongs to; names without an extension are no sample members."""
    key, extension = _split_name(name)
    if not extension or not key.rsplit("/", 1)[-1]:
        return
    if not groups or groups[-1][0] != key or extension in groups[-1][1]:
        groups.append((key, {}))
    groups[-1][1][extension] = member


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
