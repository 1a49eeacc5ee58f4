"""Real gloo processes for tests, forked for each task from a server that has imported everything.

Importing torch, DeepSpeed and Megatron takes seconds, a fork takes none. Processes are not kept for a second task:
gloo's threads outlive their process group, and a pool that lived through a hundred tasks had five thousand of them.
"""

import importlib
import multiprocessing as mp
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

# For whatever starts the server first: the code under test may have processes of its own (`jobs.local_ranks`).
mp.get_context("forkserver").set_forkserver_preload(["tests.ranks_preload"])


class RankFailedError(AssertionError):
    """A rank raised; the text is its traceback."""


class RankPool:
    """Runs functions as the ranks of a world."""

    def run(
        self, function: Callable[..., Any], *args: Any, world: int, tensor: int = 1, timeout: float = 120
    ) -> list[Any]:
        """Call `function(topology, *args)` on `world` ranks and return their results by rank.

        `function` must be importable by name; arguments and results are pickled.
        """
        with tempfile.TemporaryDirectory() as folder, _processes(world) as pipes:
            task = (function.__module__, function.__qualname__, args, world, tensor, f"{folder}/store")
            for rank, pipe in enumerate(pipes):
                pipe.send((rank, task))
            results: dict[int, Any] = {}
            failed = None
            while len(results) < world and failed is None:
                ready = wait([p for i, p in enumerate(pipes) if i not in results], timeout=timeout)
                if not ready:
                    failed = f"{world - len(results)} of {world} ranks gave nothing for {timeout} s"
                for pipe in ready:
                    rank = pipes.index(pipe)
                    try:
                        ok, value = pipe.recv()
                    except EOFError:
                        ok, value = False, "the process died"
                    if ok:
                        results[rank] = value
                    else:
                        failed = f"rank {rank}: {value}"
            if failed is not None:
                raise RankFailedError(failed)
        return [results[rank] for rank in range(world)]


@contextmanager
def _processes(world: int) -> Iterator[list[Connection]]:
    """Start one process a rank for the time of the block; yields a pipe to each."""
    context = mp.get_context("forkserver")
    started, pipes = [], []
    try:
        for _ in range(world):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            there.close()
            started.append(process)
            pipes.append(here)
        yield pipes
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.join()
        for pipe in pipes:
            pipe.close()


def _serve(pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    rank, task = pipe.recv()
    try:
        pipe.send((True, _run(task, rank)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    # Tensors arrive through memory that this process shares: it stays until it is ended.
    with suppress(EOFError):
        pipe.recv()


def _run(task: tuple[Any, ...], rank: int) -> Any:
    import torch.distributed as dist

    from flamingo_dist.parallel.topology import Topology, destroy_groups, init_groups

    module, name, args, world, tensor, store = task
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    topology = Topology(world=world, rank=rank, tensor=tensor)
    init_groups(topology)
    try:
        return getattr(importlib.import_module(module), name)(topology, *args)
    finally:
        destroy_groups()
        dist.destroy_process_group()
