"""Real gloo processes for tests, started once and used by many tests.

Importing torch, DeepSpeed and Megatron takes seconds; a fork server imports them once and the ranks live for
the whole test session. Every task gets fresh process groups, and a task that fails or hangs costs the pool,
which is then started anew.
"""

import importlib
import multiprocessing as mp
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

SIZE = 4


class RankFailedError(AssertionError):
    """A rank raised; the text is its traceback."""


class RankPool:
    """Up to four processes that run functions as the ranks of a world."""

    def __init__(self) -> None:
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(
        self, function: Callable[..., Any], *args: Any, world: int, tensor: int = 1, timeout: float = 120
    ) -> list[Any]:
        """Call `function(topology, *args)` on `world` ranks and return their results by rank.

        `function` must be importable by name; arguments and results are pickled.
        """
        if not self._processes:
            self._start()
        with tempfile.TemporaryDirectory() as folder:
            task = (function.__module__, function.__qualname__, args, world, tensor, f"{folder}/store")
            for pipe in self._pipes[:world]:
                pipe.send(task)
            results: dict[int, Any] = {}
            failed = None
            while len(results) < world and failed is None:
                waiting = [p for i, p in enumerate(self._pipes[:world]) if i not in results]
                ready = wait(waiting, timeout=timeout)
                if not ready:
                    failed = f"{world - len(results)} of {world} ranks gave nothing for {timeout} s"
                for pipe in ready:
                    number = self._pipes.index(pipe)
                    try:
                        rank, ok, value = pipe.recv()
                    except EOFError:
                        rank, ok, value = -1, False, "the process died"
                    if ok:
                        results[number] = (rank, value)
                    else:
                        failed = f"rank {rank}: {value}"
            if failed is not None:
                self.close()
                raise RankFailedError(failed)
        return [value for _, value in sorted(results.values(), key=lambda pair: pair[0])]

    def _start(self) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["tests.ranks_preload"])
        for _ in range(SIZE):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []


def _serve(pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        rank = _rank_of(task[-1], task[-3])
        try:
            pipe.send((rank, True, _run(task, rank)))
        except BaseException:
            pipe.send((rank, False, traceback.format_exc()))


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
        _forget_deepspeed()


def _rank_of(store: str, world: int) -> int:
    """Take a rank: whoever makes the file first owns it. Which process is which rank does not matter."""
    for rank in range(world):
        try:
            Path(f"{store}-rank-{rank}").touch(exist_ok=False)
        except FileExistsError:
            continue
        return rank
    raise RuntimeError("more processes than ranks")


def _forget_deepspeed() -> None:
    """Drop what DeepSpeed keeps in globals: groups of the world that just ended, and counters of modules and
    parameters, which must agree among ranks that have not run the same tasks."""
    import deepspeed.comm.comm as comm
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups

    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    Init.param_id = 0

    comm.cdb = None
    groups.mpu = None
    for name in vars(groups):
        if name.startswith("_") and name.isupper() and "GROUP" in name:
            setattr(groups, name, {} if isinstance(getattr(groups, name), dict) else None)
