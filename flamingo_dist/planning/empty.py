"""A network without values, in a process that has no group and needs no network."""

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from flamingo_dist.models.flamingo import Flamingo, FlamingoConfig
from flamingo_dist.parallel.topology import Topology, destroy_groups, init_groups


def empty_network(config: FlamingoConfig) -> Flamingo:
    """Return the whole network on the meta device, for its parameters' names and shapes.

    Raises:
        RuntimeError: torch.distributed is initialised already.
    """
    if dist.is_initialized():
        raise RuntimeError(
            "torch.distributed is initialised in this process; an empty network needs its own."
        )
    # Layers ask Megatron for their group. A fake one asks for no interface of this machine, as gloo would.
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        init_groups(Topology(world=1, rank=0, tensor=1))
        with torch.device("meta"):
            return Flamingo(config, dtype=torch.bfloat16)
    finally:
        destroy_groups()
        dist.destroy_process_group()
