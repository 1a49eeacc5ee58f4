"""Processes of one machine: the first one's result, its own errors, and what is said of one that is killed."""

import os
import signal

import pytest
import torch
import torch.distributed as dist

from flamingo_dist.parallel.topology import Topology
from jobs.errors import RunFailedError
from jobs.local_ranks import on_local_ranks

pytestmark = pytest.mark.distributed


class TwoTextsError(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def total(topology: Topology, values: torch.Tensor) -> torch.Tensor:
    values = values * (topology.tensor_rank + 1)
    dist.all_reduce(values)
    return values


def places(topology: Topology) -> list[tuple[int, int]]:
    mine = torch.tensor([topology.data_rank, topology.tensor_rank])
    found = [torch.empty_like(mine) for _ in range(topology.world)]
    dist.all_gather(found, mine)
    return [tuple(place.tolist()) for place in found]


def misbehave(topology: Topology, how: str) -> None:
    if topology.tensor_rank == 1:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("rank 1 has no such file") if how == "user" else TwoTextsError("a", "b")
    dist.barrier()


def test_the_first_rank_says_what_all_have_made():
    torch.testing.assert_close(on_local_ranks(total, torch.ones(3), tensor=3), torch.full((3,), 6.0))


def test_tensor_parallel_peers_are_neighbours():
    assert on_local_ranks(places, tensor=2, data=2) == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize(
    ("how", "kind", "says"),
    [
        ("user", ValueError, "^rank 1 has no such file$"),
        ("library", RunFailedError, "^TwoTextsError: a b$"),
        ("kill", RunFailedError, "process 1 of 2 was ended by SIGKILL"),
    ],
)
def test_a_rank_that_fails_ends_the_others(how, kind, says):
    with pytest.raises(kind, match=says):
        on_local_ranks(misbehave, how, tensor=2)
