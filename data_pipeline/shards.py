"""Writing shards: tar files in the WebDataset layout, with an index that makes them seekable.

A sample is a run of tar members that share a key (`cat7.png`, `cat7.txt`). The layouts of the three kinds:

- pair: `{key}.{png|jpg|jpeg|webp}` and `{key}.txt`; optionally `{key}.json` with `{"captions": [...]}`,
  alternates of the text, of which one is drawn for each epoch.
- interleaved: `{key}.json` with `{"items": [{"text": "..."}, {"image": "0.png"}, ...]}`, `{key}.0.png` ...
- video: `{key}.{mp4|webm|mkv|mov|avi|webp|gif}` and `{key}.txt` (or `{key}.json` as for pairs).

Any medium may instead be the features of a frozen encoder: `{key}.npy`, in documents `{key}.0.npy`, float16
[F, S, C].

`index.json` is written last, so a folder that has one is complete; each shard has a side file with the byte
offsets of its members. The `webdataset` package reads these shards (a test checks it), but importing it
imports torch, which would cost every reader process memory and seconds; so the few lines that write a tar are
our own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from types import TracebackType
from typing import IO, Any, overload

import fsspec
import numpy as np

INDEX_NAME = "index.json"
INDEX_FORMAT = "flamingo-shards"
INDEX_VERSION = 1
TAR_BLOCK = 512
_REBUILD = "rebuild it with data_pipeline.index.write_index"


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a sample: where its bytes lie in the shard."""

    offset: int
    """First byte of the data (not of the tar header)."""
    size: int
    """Number of bytes."""
    crc32: int | None = field(default=None, compare=False)
    """CRC-32 of the bytes when they were indexed; None where only headers were read, or by an older index."""


@dataclass(frozen=True, slots=True)
class SampleRecord:
    """One sample of a shard: its key and its members by extension (without the leading dot)."""

    key: str
    members: Mapping[str, Member]


def side_name(shard_name: str) -> str:
    """Name of the side file that holds the offsets of a shard: `a.tar` -> `a.idx.json`."""
    return shard_name.removesuffix(".tar") + ".idx.json"


class HeaderDigest:
    """A hash of the tar headers of a shard: names, sizes, times and places of its members, in their order.

    It is the same however the shard was indexed and wherever it lies, and differs when the tar was packed anew with
    other files, though not when bytes of a member were changed in place.
    """

    def __init__(self) -> None:
        """Begin with no header."""
        self._hash = hashlib.sha256()

    def add(self, header: tarfile.TarInfo, offset: int) -> None:
        """Take one header; `offset` is where its data begin."""
        line = f"{header.name}\0{header.size}\0{float(header.mtime)}\0{offset}\n"
        self._hash.update(line.encode("utf-8", "surrogateescape"))

    def hexdigest(self) -> str:
        """Return 16 hexadecimal digits."""
        return self._hash.hexdigest()[:16]


def encode_side(samples: Sequence[SampleRecord], size: int, *, headers: str = "", sha256: str = "") -> bytes:
    """Pack the offsets of one shard into compact JSON; extensions are written once and numbered.

    Args:
        samples: the samples of the shard in their order.
        size: bytes of the whole shard, by which a reader sees that the tar was cut or changed since.
        headers: see `HeaderDigest`; "" where unknown.
        sha256: of the whole shard, hexadecimal; "" where unknown.
    """
    numbers: dict[str, int] = {}
    rows: list[list[Any]] = []
    for sample in samples:
        row: list[Any] = [sample.key]
        for extension, member in sample.members.items():
            row += [numbers.setdefault(extension, len(numbers)), member.offset, member.size]
        rows.append(row)
    document: dict[str, Any] = {"version": INDEX_VERSION, "bytes": size}
    crcs = [member.crc32 for sample in samples for member in sample.members.values()]
    if None not in crcs:
        document["crc32"] = base64.b64encode(np.array(crcs, "<u4").tobytes()).decode()
    document |= {"headers": headers, "sha256": sha256, "extensions": list(numbers), "samples": rows}
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


class SampleRecords(Sequence[SampleRecord]):
    """The samples of one shard as a side file holds them; a record is made when it is asked for.

    A shard of 10^4 samples then costs a reader a third of the memory, and no time for those that it skips.
    """

    def __init__(self, document: Mapping[str, Any]) -> None:
        """Hold a side file. A row of it: key, then number of the extension, offset and size of each member.

        Raises:
            KeyError: what every side file has is missing.
            ValueError: there are more or fewer checksums than members.
        """
        self._extensions, self._rows = document["extensions"], document["samples"]
        self.headers: str = document.get("headers", "")
        """See `HeaderDigest`; "" in older files."""
        self.sha256: str = document.get("sha256", "")
        """SHA-256 of the shard, hexadecimal; "" in older files, and where only headers were read."""
        self._crc32: np.ndarray | None = None
        if "crc32" in document:
            self._crc32 = np.frombuffer(base64.b64decode(document["crc32"]), "<u4")
            # A row of m members has 1 + 3 m fields.
            self._first = np.cumsum([0, *(len(row) // 3 for row in self._rows)])
            if len(self._crc32) != self._first[-1]:
                raise ValueError(f"{len(self._crc32)} checksums of {self._first[-1]} members")

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, number: int) -> SampleRecord: ...
    @overload
    def __getitem__(self, number: slice) -> list[SampleRecord]: ...
    def __getitem__(self, number: int | slice) -> SampleRecord | list[SampleRecord]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        key, *flat = self._rows[number]
        crcs: list[int | None] = [None] * (len(flat) // 3)
        if self._crc32 is not None:
            first = self._first[range(len(self))[number]]
            crcs = self._crc32[first : first + len(crcs)].tolist()
        fields = zip(flat[0::3], flat[1::3], flat[2::3], crcs, strict=True)
        return SampleRecord(key, {self._extensions[e]: Member(*place) for e, *place in fields})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def decode_side(blob: bytes) -> tuple[SampleRecords, int]:
    """Unpack what `encode_side` wrote: the samples and the size of the shard in bytes.

    Raises:
        ValueError: when it is damaged, or its version is not one that this code reads.
    """
    try:
        document = json.loads(blob)
        version = document["version"]
        if version == INDEX_VERSION:
            return SampleRecords(document), int(document["bytes"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"damaged side file ({type(error).__name__}: {error}); {_REBUILD}") from error
    raise ValueError(f"side file of version {version}, this code reads version {INDEX_VERSION}; {_REBUILD}")


def encode_index(shards: list[dict[str, Any]]) -> bytes:
    """Pack `index.json`: one entry a shard with `name`, `samples`, `bytes`, `sha256`, `headers` (`HeaderDigest`)."""
    document = {
        "format": INDEX_FORMAT,
        "version": INDEX_VERSION,
        "samples": sum(shard["samples"] for shard in shards),
        "shards": shards,
    }
    return json.dumps(document, indent=1).encode()


def npy_bytes(features_FSC: np.ndarray) -> bytes:
    """Pack encoder features as an `.npy` member.

    Args:
        features_FSC: features of one medium, any float dtype, [F, S, C]: frames, spatial positions, channels.

    Returns:
        Bytes of a float16 array of the same shape.

    Raises:
        ValueError: when the array is not three-dimensional.
    """
    if features_FSC.ndim != 3:
        raise ValueError(
            f"features of shape {features_FSC.shape}; give [F, S, C]: frames, spatial positions, channels"
        )
    buffer = BytesIO()
    np.save(buffer, np.ascontiguousarray(features_FSC, dtype=np.float16), allow_pickle=False)
    return buffer.getvalue()


class ShardWriter:
    """Packs samples into numbered tar shards under one folder of any fsspec file system.

    The bytes depend on the samples and their order alone: times, users and modes in tar headers are fixed.
    Use it as a context manager; if the block fails, no `index.json` is written, so the folder never looks
    complete.

    Example:
        >>> with ShardWriter("memory://pets", max_samples=1000) as writer:
        ...     writer.write("cat7", {"png": png_bytes, "txt": b"A cat."})
    """

    def __init__(
        self,
        folder_url: str,
        pattern: str = "shard-%06d.tar",
        *,
        max_samples: int = 10_000,
        max_bytes: int = 1 << 30,
        overwrite: bool = False,
    ) -> None:
        """Open the folder.

        Args:
            folder_url: folder to write to, created when absent; any fsspec URL.
            pattern: file name of a shard, with one `%d` for its number and the ending `.tar`.
            max_samples: samples after which a new shard begins.
            max_bytes: size in bytes that a shard does not pass, unless one sample alone is larger.
            overwrite: removes the shards and index of a finished corpus in that folder first.

        Raises:
            ValueError: for a pattern or a limit that cannot work.
            FileExistsError: when the folder holds a finished corpus and `overwrite` is False.
        """
        if not pattern.endswith(".tar") or not re.fullmatch(r"[^%]*%0?\d*d[^%]*", pattern):
            raise ValueError(
                f'pattern {pattern!r}: give a name with %d that ends in .tar, as "shard-%06d.tar"'
            )
        if max_samples < 1 or max_bytes < 1:
            raise ValueError(f"max_samples {max_samples}, max_bytes {max_bytes}: both must be at least 1")
        self._fs, path = fsspec.core.url_to_fs(folder_url)
        self._folder: str = path.rstrip("/")
        self._pattern, self._max_samples, self._max_bytes = pattern, max_samples, max_bytes
        self._shards: list[dict[str, Any]] = []
        self._samples: list[SampleRecord] = []
        self._file: IO[bytes] | None = None
        self._sha, self._headers = hashlib.sha256(), HeaderDigest()
        self._offset = 0
        self._closed = False
        self._prepare(folder_url, overwrite)

    def _prepare(self, folder_url: str, overwrite: bool) -> None:
        """Make the folder, and clear or refuse what is in it."""
        index = f"{self._folder}/{INDEX_NAME}"
        if self._fs.exists(index):
            if not overwrite:
                raise FileExistsError(
                    f"{folder_url} holds a finished corpus ({INDEX_NAME}); "
                    "choose another folder or pass overwrite=True"
                )
            # The index goes first: from here on the folder does not look complete.
            self._fs.rm(index)
            self._fs.invalidate_cache()
            for path in self._fs.ls(self._folder, detail=False):
                if str(path).endswith((".tar", ".idx.json")):
                    self._fs.rm(path)
        self._fs.makedirs(self._folder, exist_ok=True)

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append one sample.

        Args:
            key: name of the sample; no dot in its last part, since WebDataset ends a key at the first dot.
            members: bytes by extension without the leading dot, as `{"png": ..., "txt": ...}`.

        Raises:
            ValueError: for a key that readers would split differently, or for a sample without members.
            RuntimeError: after `close`.
        """
        if self._closed:
            raise RuntimeError("the writer is closed; open a new ShardWriter in another folder")
        if not key or "." in key.rsplit("/", 1)[-1] or key.startswith("/") or key.endswith("/"):
            raise ValueError(
                f"key {key!r}: give a relative name without a dot in its last part, as 'animals/cat7'"
            )
        if not members or any(not e or e.startswith(".") or "/" in e or e != e.lower() for e in members):
            raise ValueError(
                f"sample {key!r} with members {list(members)}: give extensions such as 'png', 'txt'"
            )
        if self._samples and self._samples[-1].key == key:
            raise ValueError(
                f"key {key!r} twice in a row: readers would join the two samples; make keys unique"
            )
        # Header, data rounded up to blocks, and the two blocks that end a tar: never more than this.
        size = sum(len(blob) + 2 * TAR_BLOCK for blob in members.values()) + 2 * TAR_BLOCK
        if self._samples and (
            len(self._samples) >= self._max_samples or self._offset + size > self._max_bytes
        ):
            self._finish_shard()
        places = {extension: self._append(f"{key}.{extension}", blob) for extension, blob in members.items()}
        self._samples.append(SampleRecord(key, places))

    def close(self) -> None:
        """Finish the last shard and write `index.json`. Calling it again does nothing."""
        if self._closed:
            return
        self._finish_shard()
        self._fs.pipe_file(f"{self._folder}/{INDEX_NAME}", encode_index(self._shards))
        self._closed = True

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._file is not None:
            self._file.close()
            self._closed = True

    def _append(self, name: str, blob: bytes) -> Member:
        """Write one tar member and return where its data lie."""
        header = tarfile.TarInfo(name)
        header.size, header.mtime, header.mode = len(blob), 0, 0o644
        # PAX falls back on extra headers only for names that plain ustar cannot hold.
        head = header.tobuf(tarfile.PAX_FORMAT, "utf-8")
        offset = self._offset + len(head)
        self._headers.add(header, offset)
        self._put(head + blob + b"\0" * (-len(blob) % TAR_BLOCK))
        return Member(offset, len(blob), zlib.crc32(blob))

    def _put(self, data: bytes) -> None:
        """Write raw bytes to the open shard, opening the next one when none is open."""
        if self._file is None:
            self._file = self._fs.open(f"{self._folder}/{self._pattern % len(self._shards)}", "wb")
        self._file.write(data)
        self._sha.update(data)
        self._offset += len(data)

    def _finish_shard(self) -> None:
        """End the open shard: tar end marker, side file, entry for the index."""
        if self._file is None:
            return
        self._put(b"\0" * (2 * TAR_BLOCK))
        self._file.close()
        name = self._pattern % len(self._shards)
        digests = {"sha256": self._sha.hexdigest(), "headers": self._headers.hexdigest()}
        side = encode_side(self._samples, self._offset, **digests)
        self._fs.pipe_file(f"{self._folder}/{side_name(name)}", side)
        self._shards.append({"name": name, "samples": len(self._samples), "bytes": self._offset, **digests})
        self._file, self._samples, self._offset = None, [], 0
        self._sha, self._headers = hashlib.sha256(), HeaderDigest()
