"""The whole network trains the same with the kernels and with the references."""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest

from flamingo_dist.models.flamingo import FlamingoConfig
from flamingo_dist.parallel.topology import ParallelConfig, Topology
from kernels.gated_xattn import op as gated_xattn
from kernels.perceiver_attn import op as perceiver_attn
from tests.tiny import batches, make_step, network, train_config

pytestmark = pytest.mark.modes("interpret")


def config(implementation: str) -> FlamingoConfig:
    """Tiny, but with heads wide enough for the kernel; gates open, so that all gradients flow."""
    tiny = network(gate_init=0.5, layers=2, every=2)
    gated = replace(tiny.gated, head_dim=16, implementation=implementation)
    resampler = replace(tiny.resampler, head_dim=16, implementation=implementation)
    return replace(tiny, gated=gated, resampler=resampler)


def two_steps(topology: Topology, implementation: str) -> dict[str, Any]:
    """Losses and gradient norms of two steps, and how often each kernel ran."""
    parallel = ParallelConfig(tensor=topology.tensor, zero_stage=3, activation_checkpointing=True)
    with (
        patch.object(gated_xattn, "forward", wraps=gated_xattn.forward) as xattn,
        patch.object(perceiver_attn, "launch_forward", wraps=perceiver_attn.launch_forward) as perceiver,
    ):
        step = make_step(topology, parallel, train_config(), config(implementation))
        results = [step.run(number, batches(number, topology)) for number in range(2)]
    return {
        "loss": [loss for result in results for loss in result.loss.values()],
        "grad_norm": [result.grad_norm for result in results],
        "calls": (xattn.call_count, perceiver.call_count),
    }


@pytest.mark.parametrize("tensor", [1, 2])
def test_losses_and_gradients_are_the_same_either_way(ranks, tensor):
    """Under ZeRO-3 and activation checkpointing; the second step's losses follow the first step's gradients."""
    got = ranks.run(two_steps, "triton", world=tensor, tensor=tensor)
    want = ranks.run(two_steps, "reference", world=tensor, tensor=tensor)
    for a, b in zip(got, want, strict=True):
        assert min(a["calls"]) > 0
        assert max(b["calls"]) == 0
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
