"""Where a network's tensors are when it is built."""

from unittest.mock import patch

import pytest
import torch

from flamingo_dist.parallel.topology import ParallelConfig, Topology
from flamingo_dist.parallel.zero import deepspeed_config, init_deepspeed
from flamingo_dist.training import build
from tests import tiny

pytestmark = pytest.mark.distributed


def places(topology: Topology, parallel: ParallelConfig) -> tuple[dict[str, str], int]:
    """The device of every tensor that ZeRO-3 does not partition, and how many it does; the device is no CPU."""
    init_deepspeed()
    config = deepspeed_config(parallel, topology, dtype=torch.float32, clip_norm=1.0)
    with patch.object(build, "world_device", lambda: torch.device("meta")):
        model = build.build_model(
            tiny.network(), parallel, topology, dtype=torch.float32, seed=0, ds_config=config
        )
    named = dict((*model.named_parameters(), *model.named_buffers()))
    whole = {name: tensor.device.type for name, tensor in named.items() if not hasattr(tensor, "ds_id")}
    return whole, len(named) - len(whole)


@pytest.mark.parametrize(
    ("parallel", "partitioned"),
    [
        (ParallelConfig(zero_stage=1), False),
        (ParallelConfig(zero_stage=3), False),
        (ParallelConfig(zero_stage=3, frozen="partitioned"), True),
    ],
    ids=str,
)
def test_whole_tensors_are_where_the_rank_computes(ranks, parallel, partitioned):
    """The vision encoder's weights stayed on the CPU where frozen weights were partitioned, as a GPU showed."""
    whole, others = ranks.run(places, parallel, world=1)[0]
    assert any(name.startswith("vision.") for name in whole)
    assert set(whole.values()) == {"meta"}
    assert (others > 0) == partitioned
