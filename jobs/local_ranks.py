"""Processes of this machine that compute one thing together: a network that no single GPU holds, without a cluster."""

import os
import pickle
import signal
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

from flamingo_dist.parallel.topology import Topology, destroy_groups, init_groups
from jobs.errors import RunFailedError

_PATIENCE = timedelta(hours=4)
"""How long a rank waits for another, which may have longer texts to write; one that dies ends the others at once."""
_RESULT, _ERROR, _STORE = "result", "error", "store"


def on_local_ranks(function: Callable[..., Any], *arguments: Any, tensor: int, data: int = 1) -> Any:
    """Call `function(topology, *arguments)` on every rank of a small world and return the first one's result.

    Args:
        function: can be imported by its name.
        arguments: pickled, as is the result.
        tensor: tensor-parallel degree. A rank is a process of this machine, with a GPU of its own where there are GPUs.
        data: data-parallel degree.

    Raises:
        ValueError: there are fewer GPUs.
        RunFailedError: a process ended without an error of its own, as by the kernel when memory runs out.
        Exception: what a rank raised; the others are ended.
    """
    world, gpus = tensor * data, torch.cuda.device_count()
    if torch.cuda.is_available() and world > gpus:
        raise ValueError(
            f"{tensor} tensor-parallel x {data} data-parallel ranks want a GPU each, and this machine has {gpus}."
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # CUDA does not survive a fork of this process; the server has not touched it.
        ranks = start_processes(
            _rank,
            args=(function, arguments, world, tensor, folder),
            nprocs=world,
            start_method="forkserver",
            join=False,
        )
        try:
            while not ranks.join():
                pass
        except (ProcessRaisedException, ProcessExitedException) as failed:
            raise _reason([process.exitcode for process in ranks.processes], folder, failed) from None
        return pickle.loads((folder / _RESULT).read_bytes())


def _reason(codes: Sequence[int | None], folder: Path, failed: Exception) -> BaseException:
    """Return why ranks failed: one was killed, which the others have errors of, or the first error of one."""
    for rank, code in enumerate(codes):
        if code is not None and code < 0 and code != -signal.SIGTERM:  # by which the others were ended
            return RunFailedError(
                f"process {rank} of {len(codes)} was ended by {signal.Signals(-code).name}; where that is SIGKILL, "
                "memory may have run out."
            )
    if (folder / _ERROR).exists():
        found: BaseException = pickle.loads((folder / _ERROR).read_bytes())
        return found
    return RunFailedError(f"a process of the network failed: {failed}")


def _rank(
    rank: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    world: int,
    tensor: int,
    folder: Path,
) -> None:
    """Be one rank; the first writes its result, and whoever fails first its error."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # as Megatron wants it under tensor parallelism
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
        backend = "cpu:gloo,cuda:nccl"
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // world))
    dist.init_process_group(
        backend,
        init_method=f"file://{folder / _STORE}",
        rank=rank,
        world_size=world,
        timeout=_PATIENCE,
    )
    topology = Topology(world=world, rank=rank, tensor=tensor)
    init_groups(topology, timeout_seconds=int(_PATIENCE.total_seconds()))
    try:
        found = function(topology, *arguments)
    except Exception as error:
        mine = folder / f"{_ERROR}-{rank}"
        mine.write_bytes(_as_sent(error))
        with suppress(FileExistsError):
            (folder / _ERROR).hardlink_to(mine)
        raise
    if rank == 0:
        (folder / _RESULT).write_bytes(pickle.dumps(found))
    destroy_groups()
    dist.destroy_process_group()


def _as_sent(error: Exception) -> bytes:
    """Return an error in a form that the other process can read."""
    try:
        sent = pickle.dumps(error)
        pickle.loads(sent)
    except Exception:  # an error of a library whose constructor wants more than a text
        return pickle.dumps(RunFailedError(f"{type(error).__name__}: {error}"))
    return sent
