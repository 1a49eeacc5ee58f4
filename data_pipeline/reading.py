"""Range reads of single samples from shards on any file system."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import fsspec

from data_pipeline.errors import BadSampleError
from data_pipeline.shards import Member, SampleRecord

_ATTEMPTS = 3
_FIRST_PAUSE_S = 0.2
_WHOLE_SAMPLE = 4 << 20
_Value = TypeVar("_Value")


def with_retries(read: Callable[[], _Value], url: str) -> _Value:
    """Call `read`, again after short pauses when the storage stumbles.

    Raises:
        BadSampleError: fatal "missing shard" or "unreadable shard": losing samples to an outage of the
            storage must stop the run, not thin out its data.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return read()
        except FileNotFoundError as error:
            detail = f"{url} vanished; restore it or correct urls"
            raise BadSampleError("missing shard", detail, fatal=True) from error
        except OSError as error:
            if attempt == _ATTEMPTS:
                detail = f"{url}, {attempt} attempts: {type(error).__name__}: {error}"[:300]
                raise BadSampleError("unreadable shard", detail, fatal=True) from error
            time.sleep(_FIRST_PAUSE_S * 2 ** (attempt - 1))
    raise AssertionError("unreachable: the last attempt returns or raises")


class SampleReader:
    """Members of one sample; a small one is fetched in one request, of a large one only what is asked."""

    def __init__(self, url: str, record: SampleRecord, *, max_bytes: int) -> None:
        """Prepare; nothing is read yet.

        Args:
            url: URL of the shard.
            record: the sample's key and offsets.
            max_bytes: largest member that is read.
        """
        self.url, self.record = url, record
        self._max_bytes = max_bytes
        self._fs, self._path = fsspec.core.url_to_fs(url)
        self._first = min(member.offset for member in record.members.values())
        self._end = max(member.offset + member.size for member in record.members.values())
        self._whole: bytes | None = None

    def has(self, extension: str) -> bool:
        """Whether the sample has such a member."""
        return extension in self.record.members

    def get(self, extension: str) -> bytes:
        """Read one member.

        Raises:
            BadSampleError: "missing member", "too large", "truncated shard"; fatal ones when the shard is
                gone.
        """
        member = self.record.members.get(extension)
        if member is None:
            raise BadSampleError("missing member", f"no .{extension} among {sorted(self.record.members)}")
        if member.size > self._max_bytes:
            raise BadSampleError(
                "too large", f".{extension} has {member.size} bytes, at most {self._max_bytes}"
            )
        if self._end - self._first > _WHOLE_SAMPLE:
            return self._range(member)
        if self._whole is None:
            self._whole = self._range(Member(self._first, self._end - self._first), allow_short=True)
        blob = self._whole[member.offset - self._first :][: member.size]
        if len(blob) < member.size:
            raise self._cut(extension, member, len(blob))
        return blob

    def _range(self, member: Member, *, allow_short: bool = False) -> bytes:
        """Read a range of the shard."""
        stop = member.offset + member.size
        if not member.size:
            return b""
        blob: bytes = with_retries(
            lambda: self._fs.cat_file(self._path, start=member.offset, end=stop), self.url
        )
        if len(blob) < member.size and not allow_short:
            raise self._cut("member", member, len(blob))
        return blob

    def _cut(self, name: str, member: Member, got: int) -> BadSampleError:
        """Make the error for a shard that ends inside a sample."""
        return BadSampleError("truncated shard", f"{name}: {got} of {member.size} bytes at {member.offset}")
