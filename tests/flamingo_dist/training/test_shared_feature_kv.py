"""Computing all layers' feature keys and values at once trains the same network in every layout."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from flamingo_dist.models.flamingo import Flamingo
from flamingo_dist.models.resampler import PerceiverLayer, PerceiverResampler
from flamingo_dist.parallel.topology import ParallelConfig, Topology
from tests import tiny

STEPS = 3


def network(*, shared: bool) -> Any:
    plain = tiny.network(gate_init=0.5)
    return replace(plain, resampler=replace(plain.resampler, shared_feature_kv=shared))


def train(topology: Topology, parallel: ParallelConfig, shared: bool) -> dict[str, Any]:
    step = tiny.make_step(topology, parallel, tiny.train_config(STEPS), network(shared=shared))
    results = [step.run(i, tiny.batches(i, topology)) for i in range(STEPS)]
    return {"loss": [dict(r.loss) for r in results], "norm": [r.grad_norm for r in results]}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "tensor", "parallel"),
    [
        (1, 1, ParallelConfig(zero_stage=0, frozen="resident")),
        (2, 1, ParallelConfig(zero_stage=3, frozen="partitioned")),
        (2, 2, ParallelConfig(tensor=2, zero_stage=3, frozen="resident", activation_checkpointing=True)),
    ],
    ids=["alone", "zero3-partitioned", "tensor2-zero3-ckpt"],
)
def test_trains_alike(ranks, plain, world, tensor, parallel):
    for result in ranks.run(train, parallel, True, world=world, tensor=tensor):
        for ours, expected in zip(result["loss"], plain["loss"], strict=True):
            assert ours == pytest.approx(expected, abs=2e-5)
        assert result["norm"] == pytest.approx(plain["norm"], rel=1e-4)


@pytest.fixture(scope="module")
def plain(ranks):
    (result,) = ranks.run(train, ParallelConfig(zero_stage=0), False, world=1)
    return result


def gathered_at_once(topology: Topology, shared: bool) -> tuple[type, ...]:
    return Flamingo(network(shared=shared), dtype=torch.float32).gather_units


@pytest.mark.distributed
def test_what_zero_gathers_at_once(ranks):
    for shared in (False, True):
        (units,) = ranks.run(gathered_at_once, shared, world=1)
        assert (PerceiverResampler in units) == shared
        assert (PerceiverLayer in units) != shared
