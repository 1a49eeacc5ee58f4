"""Folders: room for what the run writes, and whether all nodes see the same run folder."""

import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from flamingo_dist.planning.hardware import GIB
from jobs.doctor.findings import Finding, fail, ok, warn

RAY_FULL = 0.95
"""Share of the disk below its temporary folder from which Ray refuses new objects."""
MARK = ".doctor-{}"
"""File in the run folder that every node has to see; {} is random."""


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that is there."""
    return next(each for each in (folder, *folder.parents) if each.is_dir())


def free_bytes(folder: Path) -> int:
    """Return what may still be written below a folder, which need not be there yet."""
    stat = os.statvfs(existing(folder))
    return stat.f_bavail * stat.f_frsize


def check_run_folder(folder: Path, checkpoint: int, keep: int, present: int) -> list[Finding]:
    """Check that the run folder can be written to and holds the checkpoints.

    Args:
        folder: the run folder.
        checkpoint: predicted bytes of one.
        keep: how many stay.
        present: bytes of those that are there already, which the run will replace.
    """
    remedy = "set --runs-dir to a folder that you may write to and all nodes see"
    # A link that leads nowhere cannot be made a folder either.
    there = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
    if not there.is_dir():
        return [fail("run folder", f"{there} is no folder, so {folder} cannot be made", remedy)]
    try:
        with tempfile.TemporaryFile(dir=existing(folder)):
            pass
    except OSError as error:
        return [fail("run folder", f"{existing(folder)} cannot be written to ({error.strerror})", remedy)]
    # One more than is kept: the new one is complete before the oldest goes.
    free, needed = free_bytes(folder), (keep + 1) * checkpoint - present
    says = (
        f"{free / GIB:.1f} GiB are free; {keep + 1} checkpoints of {checkpoint / GIB:.3f} GiB are predicted"
    )
    says += f", {present / GIB:.1f} GiB of them are there" if present else ""
    if free < needed:
        remedy = f"free {(needed - free) / GIB:.1f} GiB, lower --train.keep-checkpoints, or move --runs-dir"
        return [fail("disk of the run folder", says, remedy)]
    if free < 1.2 * needed:
        remedy = "leave more room: metrics, reports and other users write there too"
        return [warn("disk of the run folder", says, remedy)]
    return [ok("disk of the run folder", says)]


def bytes_below(folder: Path) -> int:
    """Return the bytes of all files below a folder; 0 if it is not there."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def check_paths(paths: Sequence[str]) -> list[Finding]:
    """Check that this node sees the local files and folders that the run reads."""
    if not paths:
        return []
    lacking = [path for path in paths if not os.access(path, os.R_OK)]
    if lacking:
        remedy = "put them on a file system that all nodes share, or copy them to each node"
        return [fail("files", f"cannot be read here: {', '.join(lacking)}", remedy)]
    return [ok("files", f"{len(paths)} local files and folders can be read")]


def check_caches(caches: Mapping[str, int]) -> list[Finding]:
    """Check that a node's disk holds the caches: folder and the bytes that it may grow to."""
    found = []
    for name, most in caches.items():
        free, there = free_bytes(Path(name)), bytes_below(Path(name))
        says = f"{name} may grow to {most / GIB:.1f} GiB, {(free + there) / GIB:.1f} GiB are free or in it"
        if free + there < most:
            found.append(
                warn("cache", says, "lower cache_bytes of the data sets, or set cache_folder to another disk")
            )
        else:
            found.append(ok("cache", says))
    return found


def check_temporary(folder: Path) -> Finding:
    """Check that Ray's temporary folder is not on a disk that Ray takes for full."""
    stat = os.statvfs(existing(folder))
    used = 1 - stat.f_bavail / stat.f_blocks if stat.f_blocks else 1.0
    says = f"the disk of {folder} is {used:.0%} full"
    if used > RAY_FULL:
        remedy = (
            "set FLAMINGO_RAY_TMP to a node-local folder with room, or delete what is left of old runs there"
        )
        return fail("temporary folder", f"{says}: Ray stops to spill objects at {RAY_FULL:.0%}", remedy)
    return ok("temporary folder", says)


@contextmanager
def marked(folder: Path) -> Iterator[str]:
    """Leave a mark in the run folder for the time of the block and yield its name."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / MARK.format(secrets.token_hex(8))
    mark.touch()
    try:
        yield mark.name
    finally:
        mark.unlink(missing_ok=True)
        for each in made:
            with suppress(OSError):  # somebody else uses it by now
                each.rmdir()


def check_shared(folder: Path, mark: str) -> Finding:
    """Check that this node sees the mark that the first one left in the run folder, and may write beside it."""
    remedy = "set --runs-dir to a file system that all nodes share"
    if not (folder / mark).exists():
        return fail(
            "shared run folder", f"{folder} is not the first node's: checkpoints would be torn apart", remedy
        )
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return fail(
            "shared run folder", f"{folder} cannot be written to from here ({error.strerror})", remedy
        )
    return ok("shared run folder", f"{folder} is seen and can be written to")
