"""Checkpoints that are whole or absent, and a resume that restores everything or refuses.

DeepSpeed writes the tensors (trainable weights, optimizer state); beside them stand the trainable weights once
more as one safetensors file for any layout, the RNG states of every rank, and a manifest: step, layout,
fingerprints, data positions, and size and SHA-256 of every file. A checkpoint is written in a hidden folder and
renamed when complete.
"""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from flamingo_dist.parallel.topology import Topology
from flamingo_dist.training.weights_only import export_trainable

MANIFEST = "manifest.json"
_TAG = "deepspeed"


class CheckpointError(ValueError):
    """A checkpoint is incomplete, damaged, or of another run."""


def step_folder(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return folder / f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, oldest first."""
    return sorted(p.parent for p in folder.glob(f"step-*/{MANIFEST}"))


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


def save_checkpoint(
    engine: Any, folder: Path, step: int, description: Mapping[str, Any], topology: Topology, *, keep: int
) -> Path:
    """Write the checkpoint after `step` steps, by all ranks together, then drop all but the newest `keep`.

    Args:
        engine: the DeepSpeed engine.
        folder: the run's checkpoint folder, on a file system that all ranks share.
        step: steps done.
        description: what a resume must match (`run`, see `check_manifest`) and restore (`data`), JSON values.
        topology: the run's degrees.
        keep: how many checkpoints stay.

    Returns:
        The checkpoint's folder.
    """
    final = step_folder(folder, step)
    partial = folder / f".partial-{final.name}"
    if topology.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(partial), tag=_TAG, save_latest=False, exclude_frozen_parameters=True)
    export_trainable(engine, partial, topology)
    torch.save(_rng_state(), partial / f"rng-{topology.rank:05d}.pt")
    dist.barrier()
    files = _describe_files(partial, topology)
    if topology.rank == 0:
        manifest = {"step": step, "layout": layout(topology, engine), **description, "files": files}
        _write_durably(partial / MANIFEST, json.dumps(manifest, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync_folder(folder)
        for old in list_checkpoints(folder)[:-keep]:
            # The manifest goes first: a half-deleted checkpoint is not a checkpoint.
            (old / MANIFEST).unlink()
            shutil.rmtree(old)
    dist.barrier()
    return final


def layout(topology: Topology, engine: Any) -> dict[str, Any]:
    """Return the parts of a run that decide which rank's file holds what."""
    return {
        "world": topology.world,
        "tensor": topology.tensor,
        "zero_stage": engine.zero_optimization_stage(),
        "dtype": "bf16" if engine.bfloat16_enabled() else "fp32",
    }


def load_checkpoint(
    engine: Any,
    path: Path,
    run: Mapping[str, Any],
    topology: Topology,
    check_data: Callable[[Mapping[str, Any]], None],
) -> int:
    """Restore everything from the checkpoint at `path`, or refuse.

    Args:
        engine: the DeepSpeed engine of the resuming run.
        path: the checkpoint's folder.
        run: the resuming run's description, to be equal to the saved one.
        topology: the resuming run's degrees.
        check_data: raises ValueError if the saved data positions do not fit this run's data.

    Returns:
        The number of steps done.

    Raises:
        CheckpointError: on every rank, saying what is missing, damaged or different.
    """
    manifest = _on_all_ranks(lambda: _checked_manifest(engine, path, run, topology, check_data))
    loaded, _ = engine.load_checkpoint(str(path), tag=_TAG, load_module_strict=False)
    if loaded is None:
        raise CheckpointError(f"{path}: DeepSpeed found nothing to load.")
    # Written by this same code, whose RNG states are numpy's and Python's own objects.
    _set_rng_state(torch.load(path / f"rng-{topology.rank:05d}.pt", weights_only=False))
    return int(manifest["step"])


def _checked_manifest(
    engine: Any,
    path: Path,
    run: Mapping[str, Any],
    topology: Topology,
    check_data: Callable[[Mapping[str, Any]], None],
) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
    check_manifest(manifest, layout=layout(topology, engine), run=run)
    check_files(path, manifest, part=(topology.rank, topology.world))
    check_data(manifest["data"])
    return manifest


def check_manifest(manifest: Mapping[str, Any], *, layout: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Compare a manifest with the run that wants to resume from it.

    Raises:
        CheckpointError: listing every difference by its dotted name.
    """
    found = {**_flat(manifest["layout"], "layout"), **_flat(manifest["run"], "run")}
    wanted = {**_flat(layout, "layout"), **_flat(run, "run")}
    differing = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
    if differing:
        lines = [f"  {k}: checkpoint {found.get(k)!r}, this run {wanted.get(k)!r}" for k in differing]
        raise CheckpointError(
            "the checkpoint is of another run; resume with the same settings or start a new run:\n"
            + "\n".join(lines)
        )


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


def _on_all_ranks(check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run `check` on every rank and fail on all if it fails on one, so that none waits for the others."""
    result: dict[str, Any] = {}
    problem: str | None = None
    try:
        result = check()
    except (ValueError, OSError, KeyError) as error:
        problem = f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    told = list(dict.fromkeys(p for p in problems if p is not None))
    if told:
        raise CheckpointError("\n".join(told))
    return result


def _describe_files(folder: Path, topology: Topology) -> dict[str, Any]:
    """Return size and checksum of every file, each rank reading its share."""
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    mine = {}
    for name in names[topology.rank :: topology.world]:
        file = folder / name
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        mine[name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    parts: list[dict[str, Any]] = [{}] * topology.world
    dist.all_gather_object(parts, mine)
    return {name: entry for part in parts for name, entry in sorted(part.items())}


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


def _rng_state() -> dict[str, Any]:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
