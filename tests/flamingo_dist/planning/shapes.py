"""Recipes and networks as a planner sees them."""

from collections import Counter
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from flamingo_dist.models.flamingo import Flamingo, FlamingoConfig
from flamingo_dist.parallel.topology import Topology, destroy_groups, init_groups
from flamingo_dist.planning.hardware import GPUS, Assumptions
from flamingo_dist.planning.seconds import Machine

LARGE = ["flamingo_3b", "flamingo_9b", "flamingo_80b"]
GPU_COUNTS = [8, 64, 256, 1024]


def machine(gpus: int, gpu: str = "h100") -> Machine:
    return Machine(gpu=GPUS[gpu], gpus=gpus, assumptions=Assumptions())


@contextmanager
def fake_world(world: int, tensor: int):
    """One process that takes itself for rank 0 of `world`."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    init_groups(Topology(world=world, rank=0, tensor=tensor))
    try:
        yield
    finally:
        destroy_groups()
        dist.destroy_process_group()


def meta_counts(config: FlamingoConfig, tensor: int) -> Counter[str]:
    """Count the elements of the real modules of tensor-parallel rank 0, by component."""
    with fake_world(tensor, tensor), torch.device("meta"):
        model = Flamingo(config, dtype=torch.bfloat16)
    counts: Counter[str] = Counter()
    for name, param in model.named_parameters():
        part = name.split(".")[0]
        if part == "lm":
            part = "extra" if ".extra" in name else "vocabulary" if "vocabulary" in name else "lm_blocks"
        assert param.requires_grad == (part in ("resampler", "media_map", "gated", "extra"))
        counts[part] += param.numel()
    return counts
