"""The new modules under ZeRO-3: no parameter is used outside its own module's forward, or its unit's."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flamingo_dist.models.gated_block import GatedBlockConfig, GatedCrossAttentionBlock
from flamingo_dist.models.init import draw
from flamingo_dist.models.resampler import PerceiverResampler, ResamplerConfig
from flamingo_dist.parallel.topology import ParallelConfig, Topology
from flamingo_dist.parallel.zero import (
    building,
    deepspeed_config,
    fill_parameters,
    init_deepspeed,
    make_engine,
)
from tests import tiny

T, B, M, R = 6, 2, 3, 4
INDEX = torch.tensor([[0, 1, 1, 2, 3, 3], [0, 0, 1, 1, 1, 2]])
RESAMPLER = ResamplerConfig(
    feature_width=10, width=16, depth=2, latents=R, heads=4, head_dim=6, frames=3, qk_norm=True
)
BLOCK = GatedBlockConfig(
    width=20, media_width=16, heads=4, head_dim=6, ffw_hidden=24, gate_init=0.6, qk_norm=True
)


class Both(nn.Module):
    """Resampler and gated block, as the network joins them."""

    def __init__(self, *, shared: bool) -> None:
        super().__init__()
        self.resampler = PerceiverResampler(replace(RESAMPLER, shared_feature_kv=shared))
        self.block = GatedCrossAttentionBlock(BLOCK)

    def forward(self, x_TBD: Tensor, features: Tensor) -> Tensor:
        latents = self.resampler(features).unflatten(0, (B, M))
        return self.block(x_TBD, latents, INDEX).square().sum()


def train_once(
    topology: Topology, stage: int, shared: bool = False, units: tuple[type[nn.Module], ...] = ()
) -> tuple[int, float, list[float], dict[str, Tensor]]:
    """Loss, gates and the gradient of every parameter: this tensor-parallel rank's part, whole over ZeRO."""
    from deepspeed.utils import safe_get_full_grad

    init_deepspeed()
    partitioned = stage == 3
    parallel = ParallelConfig(
        tensor=topology.tensor, zero_stage=stage, frozen="partitioned" if partitioned else "resident"
    )
    config = deepspeed_config(parallel, topology, dtype=torch.float32, clip_norm=0.0)
    with building(parallel, config) if partitioned else nullcontext():
        model = Both(shared=shared)

    def value_of(name: str, param: Any) -> Tensor:
        return draw(
            name,
            param.flamingo_tag,
            param.shape,
            seed=0,
            tp_rank=topology.tensor_rank,
            tp_size=topology.tensor,
        )

    fill_parameters(model, value_of)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = make_engine(model, optimizer, config, units=units)
    gen = torch.Generator().manual_seed(1)
    x, features = torch.randn(T, B, 20, generator=gen), torch.randn(B * M, 2, 5, 10, generator=gen)
    loss = engine(x, features)
    engine.backward(loss)
    gates = [float(gate) for gate in model.block.gates()]
    grads = {
        name: safe_get_full_grad(param).clone() if partitioned else param.grad.clone()
        for name, param in model.named_parameters()
    }
    return topology.tensor_rank, loss.item(), gates, grads


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("shared", "units"),
    [(False, ()), (True, (PerceiverResampler,))],
    ids=["every module", "shared K/V, one unit"],
)
@pytest.mark.parametrize(("world", "tensor"), [(2, 1), (4, 2)])
def test_zero_3_equals_no_zero(ranks, world, tensor, shared, units):
    plain = {r[0]: r for r in ranks.run(train_once, 0, world=tensor, tensor=tensor)}
    for tensor_rank, loss, gates, grads in ranks.run(
        train_once, 3, shared, units, world=world, tensor=tensor
    ):
        _, want_loss, want_gates, want = plain[tensor_rank]
        assert loss == pytest.approx(want_loss, rel=1e-6)
        assert gates == want_gates == pytest.approx([0.537, 0.537], abs=1e-3)
        assert grads.keys() == want.keys()
        for name, grad in grads.items():
            assert want[name].any(), name
            torch.testing.assert_close(grad, want[name], rtol=1e-4, atol=1e-4)


def views_kept(topology: Topology, frozen: str) -> tuple[list[str], int]:
    """Which weights autograd keeps by a tensor that is not the parameter, and how many parameters it keeps."""
    parallel = ParallelConfig(tensor=topology.tensor, zero_stage=3, frozen=frozen)
    step = tiny.make_step(topology, parallel, tiny.train_config(1), tiny.network(gate_init=0.5))
    named = dict(step.engine.module.named_parameters())
    views, whole = [], set()

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        owners = [n for n, p in named.items() if p.numel() and p.untyped_storage().data_ptr() == place]
        if owners and isinstance(tensor, nn.Parameter):
            whole.add(place)
        elif owners and owners != [
            "resampler.latents"
        ]:  # a norm keeps its input, which these are; they are small
            views.append(owners[0])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step.run(0, tiny.batches(0, topology))
    return sorted(set(views)), len(whole)


@pytest.mark.distributed
@pytest.mark.parametrize("frozen", ["resident", "partitioned"])
@pytest.mark.parametrize(("world", "tensor"), [(2, 1), (4, 2)])
def test_nothing_holds_a_weight_that_zero_3_lets_go(ranks, world, tensor, frozen):
    """A view of a gathered weight would hold its memory until the backward, of all weights at once."""
    for views, parameters in ranks.run(views_kept, frozen, world=world, tensor=tensor):
        assert views == []
        assert parameters > 0
