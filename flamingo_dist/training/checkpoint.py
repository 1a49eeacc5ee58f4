"""Checkpoints that are whole or absent, that any layout can resume, and that are written while training goes on.

What is saved is the trainable part: fp32 weights and AdamW's moments, each a whole tensor in the format of
torch.distributed.checkpoint, whatever tensor-parallel degree, data-parallel degree or ZeRO stage held it. Beside it
stand the random states of every rank, and a manifest: step, layout, fingerprints, data positions, and size and SHA-256
of every file. A checkpoint is written in a hidden folder and renamed when complete.
"""

import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from flamingo_dist.parallel.topology import Topology
from flamingo_dist.training.checkpoint_folder import (
    FORMAT,
    STATE,
    CheckpointError,
    await_checkpoint,
    begin,
    check_files,
    check_run,
    complete,
    describe_files,
    partial_folder,
    read_manifest,
    step_folder,
)
from flamingo_dist.training.fragments import Fragment, SaveFragments
from flamingo_dist.training.optimizer_state import local_fragments, publish, share, updates_done
from flamingo_dist.training.random_state import random_state, restore_random_state, state_file
from flamingo_dist.training.stored_state import check_stored, read_fragments

Description = Mapping[str, Any]


class CheckpointWriter:
    """Saves checkpoints in the background: training waits for a copy to host memory alone.

    One save is written at a time: the next, and the end of the run, wait for it. A save that fails leaves the
    checkpoint before it in place; its error is raised on all ranks at the next save or `wait`.
    """

    def __init__(self, folder: Path, topology: Topology, *, keep: int, timeout_seconds: int = 600) -> None:
        """Prepare, on all ranks together.

        Args:
            folder: the run's checkpoint folder, on a file system that all ranks share.
            topology: the run's degrees.
            keep: how many checkpoints stay.
            timeout_seconds: how long a rank waits for the others while a save is written.
        """
        self.folder, self.topology, self.keep = folder, topology, keep
        # Its own, because the writing thread's messages must not mix with those of training; of CPU memory alone.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        self._thread: threading.Thread | None = None
        self._problem: str | None = None
        self._host: dict[str, Tensor] = {}

    def save(self, engine: Any, step: int, description: Description) -> None:
        """Copy what belongs to the checkpoint after `step` steps and start to write it, on all ranks together.

        Args:
            engine: the DeepSpeed engine.
            step: steps done.
            description: what a resume must match (`run`, see `check_run`) and restore (`data`), JSON values.

        Raises:
            CheckpointError: the save before this one failed.
        """
        self.wait()
        started = time.perf_counter()
        fragments = self._copy(share(local_fragments(engine, self.topology), engine, self.topology))
        random = random_state()
        manifest = {
            "format": FORMAT,
            "step": step,
            "updates": updates_done(engine),
            "layout": layout(self.topology, engine),
            **description,
            "copy_seconds": time.perf_counter() - started,
        }
        self._thread = threading.Thread(
            target=self._write, args=(fragments, random, manifest), name=f"checkpoint-{step}", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait until the last save is complete.

        Raises:
            CheckpointError: it failed, on all ranks.
        """
        self.settle()
        problem, self._problem = self._problem, None
        if problem is not None:
            raise CheckpointError(problem)

    def settle(self) -> None:
        """Wait until the last save is complete or has failed, without telling which."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _copy(self, fragments: Mapping[str, Fragment]) -> dict[str, Fragment]:
        """Return the fragments in host memory, which is kept for the next save (pinned where there is a GPU)."""
        copies = {}
        for name, fragment in fragments.items():
            if name not in self._host:
                self._host[name] = torch.empty(
                    fragment.flat_N.shape,
                    dtype=fragment.flat_N.dtype,
                    device="cpu",
                    pin_memory=fragment.flat_N.is_cuda,
                )
            self._host[name].copy_(fragment.flat_N, non_blocking=True)
            copies[name] = fragment.like(self._host[name])
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return copies

    def _write(self, fragments: dict[str, Fragment], random: Any, manifest: dict[str, Any]) -> None:
        """Write a checkpoint on all ranks together, in the background."""
        final = step_folder(self.folder, manifest["step"])
        started = time.perf_counter()
        try:
            on_all_ranks(lambda: begin(final) if self.topology.rank == 0 else None, self._group)
            # By itself: a rank that fails here must not leave the others in the collectives of the tensors.
            rank_file = state_file(partial_folder(final), self.topology.rank)
            on_all_ranks(lambda: torch.save(random, rank_file), self._group)
            files = on_all_ranks(lambda: self._write_files(final, fragments), self._group)
            manifest["files"] = {name: entry for part in files for name, entry in sorted(part.items())}
            manifest["write_seconds"] = time.perf_counter() - started
            on_all_ranks(
                lambda: complete(final, manifest, keep=self.keep) if self.topology.rank == 0 else None,
                self._group,
            )
        except BaseException as error:  # CheckpointException is none of Exception; all are told by `wait`
            self._problem = f"saving {final} failed; the checkpoint before it stands: {error}"

    def _write_files(self, final: Path, fragments: dict[str, Fragment]) -> dict[str, Any]:
        """Write the tensors; return size and checksum of this rank's share of the files."""
        partial = partial_folder(final)
        save(
            fragments,
            storage_writer=FileSystemWriter(partial / STATE),
            planner=SaveFragments(),
            process_group=self._group,
        )
        dist.barrier(group=self._group)
        return describe_files(partial, part=(self.topology.rank, self.topology.world))


def layout(topology: Topology, engine: Any) -> dict[str, Any]:
    """Return how a run is spread; a checkpoint notes it, another layout may load it."""
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
    may_change: Iterable[str] = (),
) -> int:
    """Restore everything from the checkpoint at `path`, or refuse. The layout may be another than that of the save.

    Args:
        engine: the DeepSpeed engine of the resuming run.
        path: the checkpoint's folder.
        run: the resuming run's description, to be equal to the saved one.
        topology: the resuming run's degrees.
        check_data: raises ValueError if the saved data positions do not fit this run's data.
        may_change: settings that may differ, see `check_run`.

    Returns:
        The number of steps done.

    Raises:
        CheckpointError: on every rank, saying what is missing, damaged or different.
    """
    fragments = local_fragments(engine, topology)
    manifest: dict[str, Any] = {}

    def check() -> str:
        await_checkpoint(path)
        manifest.update(read_manifest(path))
        check_run(manifest, run, may_change)
        check_files(path, manifest, part=(topology.rank, topology.world))
        check_stored(path, {name: fragment.size() for name, fragment in fragments.items()})
        check_data(manifest["data"])
        return json.dumps(manifest, sort_keys=True)

    if len(set(on_all_ranks(check))) > 1:
        raise CheckpointError(
            f"{path}: ranks see different manifests there; they must share one file system."
        )
    on_all_ranks(lambda: read_fragments(path, fragments))
    publish(engine, manifest["updates"])
    engine.global_steps = manifest["step"]
    same = all(manifest["layout"][part] == layout(topology, engine)[part] for part in ("world", "tensor"))
    restore_random_state(path, rank=topology.rank, step=manifest["step"], same_layout=same)
    return int(manifest["step"])


def on_all_ranks(work: Callable[[], Any], group: dist.ProcessGroup | None = None) -> list[Any]:
    """Run `work` on every rank and return all results, or fail on all if it fails on one, so that none waits.

    Raises:
        CheckpointError: with the messages of all ranks that failed.
    """
    result: Any = None
    problem: str | None = None
    try:
        result = work()
    except (Exception, CheckpointException) as error:  # the second is none of the first
        problem = f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    answers: list[tuple[Any, str | None]] = [(None, None)] * dist.get_world_size()
    dist.all_gather_object(answers, (result, problem), group=group)
    told = list(dict.fromkeys(problem for _, problem in answers if problem is not None))
    if told:
        raise CheckpointError("\n".join(told))
    return [result for result, _ in answers]
