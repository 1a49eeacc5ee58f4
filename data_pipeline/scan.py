"""What is in a tar that no index describes: its headers are read, its members grouped into samples."""

from __future__ import annotations

import tarfile
from typing import IO

from data_pipeline.batch import Skip
from data_pipeline.shards import TAR_BLOCK, HeaderDigest, Member, SampleRecord


def scan_tar(file: IO[bytes], size: int, url: str) -> tuple[list[SampleRecord], list[Skip], str]:
    """Read the headers of a tar and group its members into samples.

    Members of a sample may stand apart: they are joined by their key, in the order in which keys first appear.
    Everything complete before a cut is kept. A cut or damaged tar gives one skip that says where; a member that
    is a link, a device or names a place outside the sample's folder gives one each. Nothing is ever unpacked:
    a name is a key, and bytes are read by their offset.

    Args:
        file: the tar, opened for reading and seekable.
        size: its size in bytes.
        url: its name in the skips.

    Returns:
        The samples, the skips, and the digest of the headers (`HeaderDigest`).
    """
    groups, digest = _Groups(), HeaderDigest()
    skips: list[Skip] = []
    fault, end = "", 0
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  (the caller closes the file)
        while (header := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header for ever
            digest.add(header, header.offset_data)
            if header.size < 0 or header.offset_data < end:
                fault = f"{header.name} has an impossible size, {header.size}"
                break  # following it would lead backwards, and round and round
            end = header.offset_data + header.size
            if end > size:
                fault = f"cut inside {header.name} at byte {size}"
                groups.drop(split_name(header.name)[0])
                break
            if cause := _unusable(header):
                skips.append(Skip(key=printable(header.name), shard=url, cause=cause, detail="left out"))
            elif header.isfile():
                groups.add(header.name, Member(header.offset_data, header.size))
        else:
            end = int(tar.offset)
            file.seek(end)
            # tarfile ends silently at a damaged header; only a block of zeros is a real end.
            if file.read(TAR_BLOCK) != b"\0" * TAR_BLOCK:
                fault = f"no valid tar header and no end mark at byte {end}"
    except (tarfile.TarError, EOFError, ValueError) as error:
        fault = f"{error} after byte {end}"
    samples = groups.samples()
    if fault:
        detail = f"{fault}; the {len(samples)} samples before it are used"
        skips.append(Skip(key="", shard=url, cause="truncated shard", detail=detail))
    return samples, skips, digest.hexdigest()


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name as WebDataset does: the key ends at the first dot of the last part."""
    folder, slash, base = printable(name).removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def printable(name: str) -> str:
    """Return a name that is valid Unicode; bytes that are not UTF-8 come out of tarfile as lone surrogates."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _unusable(header: tarfile.TarInfo) -> str:
    """Say why a member must not become part of a sample, or nothing."""
    if header.issym() or header.islnk() or header.isdev() or header.issparse():
        return "unsafe member"
    if header.name.startswith("/") or ".." in header.name.split("/"):
        return "unsafe name"
    return ""


class _Groups:
    """Members by sample, in the order in which the samples begin."""

    def __init__(self) -> None:
        self._groups: list[tuple[str, dict[str, Member]]] = []
        self._newest: dict[str, int] = {}

    def add(self, name: str, member: Member) -> None:
        """Put one member into its sample; names without an extension are no sample members."""
        key, extension = split_name(name)
        if not extension or not key.rsplit("/", 1)[-1]:
            return
        place = self._newest.get(key)
        if place is None or extension in self._groups[place][1]:  # a second sample of the same name
            place = self._newest[key] = len(self._groups)
            self._groups.append((key, {}))
        self._groups[place][1][extension] = member

    def drop(self, key: str) -> None:
        """Forget the sample that a cut went through."""
        if (place := self._newest.pop(key, None)) is not None:
            self._groups[place][1].clear()

    def samples(self) -> list[SampleRecord]:
        """Return the samples that have members."""
        return [SampleRecord(key, members) for key, members in self._groups if members]
