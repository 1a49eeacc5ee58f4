"""Range reads of single samples from shards on any file system."""

from __future__ import annotations

import zlib

from data_pipeline.errors import BadSampleError
from data_pipeline.shards import Member, SampleRecord
from data_pipeline.storage import Storage, StorageError

_WHOLE_SAMPLE = 4 << 20
_RESTORE = "restore the shard, or make the index anew with data_pipeline.index.write_index"


class SampleReader:
    """Members of one sample; a small one is fetched in one request, of a large one only what is asked."""

    def __init__(
        self,
        url: str,
        record: SampleRecord,
        *,
        max_bytes: int,
        storage: Storage | None = None,
        shard_bytes: int | None = None,
        version: str = "",
    ) -> None:
        """Prepare; nothing is read yet.

        Args:
            url: URL of the shard.
            record: the sample's key and offsets.
            max_bytes: largest member that is read.
            storage: how the shard is read.
            shard_bytes: size of the whole shard by its index; a local cache needs it.
            version: name of the shard's content (`ShardEntry.version`), for the cache too.
        """
        self.url, self.record = url, record
        self._max_bytes, self._storage = max_bytes, storage or Storage()
        self._shard_bytes, self._version = shard_bytes, version
        self._first = min(member.offset for member in record.members.values())
        self._end = max(member.offset + member.size for member in record.members.values())
        self._whole: bytes | None = None

    def has(self, extension: str) -> bool:
        """Whether the sample has such a member."""
        return extension in self.record.members

    def get(self, extension: str, *, max_bytes: int | None = None) -> bytes:
        """Read one member.

        Args:
            extension: which.
            max_bytes: a smaller limit than the reader's.

        Raises:
            BadSampleError: "missing member", "too large", "truncated shard", "changed sample" when the bytes are
                not those that were indexed; fatal ones when the shard is gone or its storage fails.
        """
        member = self.record.members.get(extension)
        if member is None:
            raise BadSampleError("missing member", f"no .{extension} among {sorted(self.record.members)}")
        most = min(self._max_bytes, max_bytes or self._max_bytes)
        if member.size > most:
            raise BadSampleError("too large", f".{extension} has {member.size} bytes, at most {most}")
        if self._end - self._first > _WHOLE_SAMPLE:
            blob = self._range(member)
        else:
            if self._whole is None:
                self._whole = self._range(Member(self._first, self._end - self._first), allow_short=True)
            blob = self._whole[member.offset - self._first :][: member.size]
            if len(blob) < member.size:
                raise self._cut(extension, member, len(blob))
        if member.crc32 is not None and zlib.crc32(blob) != member.crc32:
            detail = f".{extension} of {self.url} is not what its index was made of; {_RESTORE}"
            raise BadSampleError("changed sample", detail)
        return blob

    def _range(self, member: Member, *, allow_short: bool = False) -> bytes:
        """Read a range of the shard."""
        try:
            blob = self._storage.read(
                self.url,
                member.offset,
                member.offset + member.size,
                size=self._shard_bytes,
                version=self._version,
            )
        except FileNotFoundError as error:
            detail = f"{self.url} vanished; restore it or correct urls"
            raise BadSampleError("missing shard", detail, fatal=True) from error
        except (StorageError, PermissionError) as error:
            raise BadSampleError("unreadable shard", str(error)[:300], fatal=True) from error
        if len(blob) < member.size and not allow_short:
            raise self._cut("member", member, len(blob))
        return blob

    def _cut(self, name: str, member: Member, got: int) -> BadSampleError:
        """Make the error for a shard that ends inside a sample."""
        return BadSampleError("truncated shard", f"{name}: {got} of {member.size} bytes at {member.offset}")
