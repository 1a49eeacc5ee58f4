"""Processes of this machine that compute one thing together: a network that no single GPU holds, without a cluster."""

import os
import pickle
import tempfile
from collections.abc import Callable
from datetime import timedelta
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

from flamingo_dist.parallel.topology import Topology, destroy_groups, init_groups
from jobs.errors import RunFailedError

_START = "forkserver"  # CUDA does not survive a fork of this process; the server has not touched it
_SAID_SECONDS = 5.0
_FAILED = (ProcessRaisedException, ProcessExitedException)


def on_local_ranks(function: Callable[..., Any], *arguments: Any, tensor: int) -> Any:
    """Call `function(topology, *arguments)` on the ranks of a tensor-parallel group and return the first one's result.

    Args:
        function: can be imported by its name.
        arguments: pickled, as is the result.
        tensor: ranks, each a process of this machine, with a GPU of its own where there are GPUs.

    Raises:
        ValueError: there are fewer GPUs.
        RunFailedError: a process ended without an error of its own, as by the kernel when memory runs out.
        Exception: what a rank raised; the others are ended.
    """
    gpus = torch.cuda.device_count()
    if torch.cuda.is_available() and tensor > gpus:
        raise ValueError(f"{tensor} tensor-parallel ranks want a GPU each, and this machine has {gpus}.")
    said = mp.get_context(_START).Queue()
    with tempfile.TemporaryDirectory() as folder:
        try:
            start_processes(
                _rank,
                args=(function, arguments, tensor, f"{folder}/store", said),
                nprocs=tensor,
                start_method=_START,
            )
        except _FAILED as failed:
            raise _first_error(said, failed) from None
    return pickle.loads(said.get(timeout=_SAID_SECONDS))


def _rank(
    rank: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    tensor: int,
    store: str,
    said: "mp.Queue[bytes]",
) -> None:
    """Be one rank; the first says its result, and whoever fails its error."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # as Megatron wants it under tensor parallelism
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
        backend = "cpu:gloo,cuda:nccl"
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // tensor))
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=tensor, timeout=timedelta(minutes=30)
    )
    topology = Topology(world=tensor, rank=rank, tensor=tensor)
    init_groups(topology)
    try:
        found = function(topology, *arguments)
    except Exception as error:
        said.put(_as_sent(error))
        raise
    if rank == 0:
        said.put(pickle.dumps(found))
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


def _first_error(said: "mp.Queue[bytes]", failed: Exception) -> BaseException:
    """Return what the first rank that failed has said, or what became of its process."""
    try:
        while True:
            found = pickle.loads(said.get(timeout=_SAID_SECONDS))
            if isinstance(found, BaseException):
                return found
    except Empty:
        return RunFailedError(f"a process of the network ended: {failed}")
