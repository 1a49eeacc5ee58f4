"""What a checkpoint's folder must hold to be one: names, manifest, sizes and checksums."""

import hashlib
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flamingo_dist.from_json import json_object

MANIFEST = "manifest.json"
"""Written last: a folder without it is not a checkpoint."""
STATE = "state"
"""Folder of the tensors, as torch.distributed.checkpoint writes them."""
FORMAT = 2
"""Version of what a checkpoint holds; 1 were DeepSpeed's own files, which only their layout could read."""
CHANGEABLE = ("train.optimizer.", "weights.")
"""Beginnings of the settings that a resume may change when it is told to, by their names below `run`."""

_STEP = re.compile(r"step-\d{8,}")


class CheckpointError(ValueError):
    """A checkpoint is incomplete, damaged, or of another run; or it could not be written."""


def step_folder(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return folder / f"step-{step:08d}"


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def partial_folder(final: Path) -> Path:
    """Return the hidden folder that a checkpoint is written in until it is complete."""
    return final.parent / f".partial-{final.name}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, oldest first; copies under names of their own are none of them."""
    there = (p.parent for p in folder.glob(f"step-*/{MANIFEST}"))
    return sorted((path for path in there if _STEP.fullmatch(path.name)), key=_step_of)


def find_checkpoint(folder: Path, wanted: str) -> Path | None:
    """Return the checkpoint that `--resume wanted` names.

    Args:
        folder: the run's checkpoint folder.
        wanted: "auto" (the newest, or none), "latest" (the newest, which must exist), or a step or a path.

    Raises:
        CheckpointError: there is none, with what there is.
    """
    there = list_checkpoints(folder)
    if wanted in ("auto", "latest"):
        if not there and wanted == "latest":
            raise CheckpointError(
                f"--resume latest: no complete checkpoint in {folder}; use --resume auto to start."
            )
        return there[-1] if there else None
    path = step_folder(folder, int(wanted)) if wanted.isdigit() else Path(wanted)
    if not (path / MANIFEST).is_file():
        raise CheckpointError(
            f"--resume {wanted}: {path} has no {MANIFEST}; complete checkpoints here: {[p.name for p in there]}."
        )
    return path


def await_checkpoint(path: Path, *, seconds: float = 60.0) -> None:
    """Wait until a checkpoint that another rank has found is seen here: shared file systems keep listings for a while.

    Raises:
        CheckpointError: it is still not there after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not (path / MANIFEST).is_file():
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{path} is not seen here {seconds:.0f} s after the first rank found it; all ranks must share the "
                "run's folder."
            )
        time.sleep(0.5)
        if path.parent.exists():
            os.listdir(path.parent)  # refreshes what a client of a shared file system keeps


def set_aside_newer(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step` steps, which a run that goes on from there abandons; return their new places.

    Left where they are, they would be the newest: kept in the place of the run's own, and taken by `auto`.
    """
    moved = []
    for path in list_checkpoints(folder):
        if _step_of(path) > step:
            place = path.with_name(f"abandoned-{path.name}")
            shutil.rmtree(place, ignore_errors=True)
            moved.append(path.rename(place))
    return moved


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of the checkpoint at `path`.

    Raises:
        CheckpointError: there is none, it is damaged, or of another version of the format.
    """
    if not (path / MANIFEST).is_file():
        raise CheckpointError(f"{path} has no {MANIFEST}: it is not a complete checkpoint.")
    try:
        manifest = json_object((path / MANIFEST).read_bytes(), str(path / MANIFEST))
    except ValueError as error:
        raise CheckpointError(f"{error} Resume from another checkpoint.") from error
    found = manifest.get("format", 1)
    if found != FORMAT:
        raise CheckpointError(
            f"{path} is of format {found}, this version of the code reads format {FORMAT}; resume it with the version "
            "that wrote it."
        )
    return manifest


def check_run(
    manifest: Mapping[str, Any], run: Mapping[str, Any], may_change: Iterable[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Compare a manifest with the run that wants to resume from it; the layout may be another.

    Args:
        manifest: the checkpoint's.
        run: what the resuming run says of itself.
        may_change: settings that may differ, such as "train.optimizer.lr"; a data set's weight is "weights.NAME".

    Returns:
        What differs and may, by its name: the checkpoint's value and this run's.

    Raises:
        CheckpointError: listing every other difference by its dotted name; or a setting may never change.
    """
    allowed = set(may_change)
    never = sorted(name for name in allowed if not name.startswith(CHANGEABLE))
    if never:
        raise CheckpointError(
            f"--allow-change {' '.join(never)}: a resume may change settings that begin with "
            f"{' or '.join(CHANGEABLE)} alone."
        )
    found, wanted = _flat(manifest["run"], "run"), _flat(run, "run")
    # What frozen weights hold is told since a later version than some checkpoints are of.
    names = (k for k in found.keys() | wanted.keys() if k in found or not k.startswith("run.frozen."))
    pairs = {name.removeprefix("run."): (found.get(name), wanted.get(name)) for name in names}
    differing = {name: (before, now) for name, (before, now) in pairs.items() if before != now}
    lines = [
        f"  run.{name}: checkpoint {before!r}, this run {now!r}"
        for name, (before, now) in sorted(differing.items())
        if name not in allowed
    ]
    if lines:
        raise CheckpointError(
            "the checkpoint is of another run; resume with the same settings, start a new run, or allow a change "
            f"({' and '.join(f'{name}*' for name in CHANGEABLE)}) with --allow-change NAME:\n"
            + "\n".join(lines)
        )
    return differing


def check_files(path: Path, manifest: Mapping[str, Any], *, part: tuple[int, int] = (0, 1)) -> None:
    """Check the files of a checkpoint against the manifest's sizes and checksums.

    Args:
        path: the checkpoint's folder.
        manifest: its manifest.
        part: (i, n) reads every n-th file from the i-th on, to share the work among ranks.

    Raises:
        CheckpointError: naming the file that is missing, or differs from the one that was saved.
    """
    for name in sorted(manifest["files"])[part[0] :: part[1]]:
        saved, file = manifest["files"][name], path / name
        if not file.is_file():
            raise CheckpointError(f"{path}: {name} is missing; resume from another checkpoint.")
        if file.stat().st_size != saved["bytes"] or _sha256(file) != saved["sha256"]:
            raise CheckpointError(
                f"{path}: {name} is not the file that was saved (size or checksum differs); "
                "resume from another checkpoint."
            )


def describe_files(folder: Path, *, part: tuple[int, int]) -> dict[str, Any]:
    """Return size and checksum by name of every n-th file below `folder` from the i-th on, `part` being (i, n)."""
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    found = {}
    for name in names[part[0] :: part[1]]:
        file = folder / name
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        found[name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    return found


def begin(final: Path) -> Path:
    """Return an empty folder for the checkpoint `final`; what broken saves left behind is removed."""
    for left in final.parent.glob(".partial-*"):
        shutil.rmtree(left)
    partial = partial_folder(final)
    (partial / STATE).mkdir(parents=True)
    return partial


def complete(final: Path, manifest: Mapping[str, Any], *, keep: int) -> None:
    """Turn the written folder into the checkpoint `final`, then drop all but the newest `keep`."""
    partial = partial_folder(final)
    _write_durably(partial / MANIFEST, json.dumps(manifest, indent=1))
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _sync_folder(final.parent)
    for old in list_checkpoints(final.parent)[:-keep]:
        try:
            # The manifest goes first: a half-deleted checkpoint is not a checkpoint.
            (old / MANIFEST).unlink()
            shutil.rmtree(old)
        except OSError as error:  # the new one is complete all the same
            warnings.warn(f"the old checkpoint {old} cannot be deleted: {error}", stacklevel=2)


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _write_durably(file: Path, text: str) -> None:
    with file.open("w") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flat(value: Any, prefix: str) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}.{key}").items()}
    return {prefix: json.loads(json.dumps(value))}
