"""Two tensor-parallel ranks compute what one process does: results, input gradients, parameter gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flamingo_dist.models.gated_block import GatedBlockConfig, GatedCrossAttentionBlock
from flamingo_dist.models.init import initialize_
from flamingo_dist.models.linear import column_linear, row_linear, sum_grad_over_tp
from flamingo_dist.models.resampler import PerceiverResampler, ResamplerConfig

T, B, M, R, D, E = 6, 2, 3, 4, 20, 16
INDEX = torch.tensor([[0, 1, 1, 2, 3, 3], [0, 0, 1, 1, 1, 2]])

BLOCK: dict[str, Any] = {
    "width": D,
    "media_width": E,
    "heads": 4,
    "head_dim": 6,
    "ffw_hidden": 24,
    "gate_init": 0.6,
}
RESAMPLER: dict[str, Any] = {"width": E, "depth": 2, "latents": R, "heads": 4, "head_dim": 6, "frames": 3}
CASES: dict[str, ResamplerConfig | GatedBlockConfig] = {
    "resampler": ResamplerConfig(**RESAMPLER, feature_width=E),
    "resampler with projection and qk norm": ResamplerConfig(**RESAMPLER, feature_width=10, qk_norm=True),
    "resampler with shared feature K/V": ResamplerConfig(
        **RESAMPLER, feature_width=E, shared_feature_kv=True
    ),
    "resampler of RMS norms, shared": ResamplerConfig(
        **RESAMPLER, feature_width=10, qk_norm=True, norm="rms", shared_feature_kv=True
    ),
    "block": GatedBlockConfig(**BLOCK),
    "block with a vector gate": GatedBlockConfig(**BLOCK, gate="vector"),
    "block with GELU": GatedBlockConfig(**BLOCK, activation="gelu"),
    "block with attend_all": GatedBlockConfig(**BLOCK, attend_all=True),
    "block of IDEFICS": GatedBlockConfig(
        **BLOCK, gate="vector", activation="silu_gated", norm="rms", qk_norm=True
    ),
}


def rand(*shape: int, seed: int) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=gen).requires_grad_()


def results(config: ResamplerConfig | GatedBlockConfig, rank: int = 0, size: int = 1) -> dict[str, Tensor]:
    """The result and all gradients, a tensor-parallel one as this rank's part."""
    module: nn.Module
    if isinstance(config, ResamplerConfig):
        module = PerceiverResampler(config, dtype=torch.float64)
        inputs = [rand(M, 2, 5, config.feature_width, seed=1)]
        arguments = inputs
    else:
        module = GatedCrossAttentionBlock(config, dtype=torch.float64)
        inputs = [rand(T, B, D, seed=1), rand(B, M, R, E, seed=2)]
        arguments = [*inputs, INDEX]
    initialize_(module, 0, rank, size)
    out = module(*arguments)
    (out * rand(*out.shape, seed=3).detach()).sum().backward()
    found = {"out": out.detach()} | {f"input {i}": x.grad for i, x in enumerate(inputs)}
    return found | {name: param.grad for name, param in module.named_parameters()}


def all_results(topology: Any) -> tuple[int, dict[str, dict[str, Tensor]]]:
    return topology.tensor_rank, {
        name: results(config, topology.tensor_rank, topology.tensor) for name, config in CASES.items()
    }


def partition_dims(config: ResamplerConfig | GatedBlockConfig) -> dict[str, int | None]:
    kind = PerceiverResampler if isinstance(config, ResamplerConfig) else GatedCrossAttentionBlock
    with torch.device("meta"):
        return {n: p.flamingo_tag.partition_dim for n, p in kind(config).named_parameters()}


@pytest.mark.distributed
def test_two_ranks_equal_one_process(ranks):
    by_rank = dict(ranks.run(all_results, world=2, tensor=2))
    for case, config in CASES.items():
        dims = partition_dims(config)
        for name, want in results(config).items():
            parts = [by_rank[rank][case][name] for rank in range(2)]
            dim = dims.get(name)
            whole = [torch.cat(parts, dim=dim)] if dim is not None else parts
            assert want.any(), (case, name)
            for got in whole:
                torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        assert sum(dim is not None for dim in dims.values()) >= 6, case


def linear_results(topology: Any) -> dict[str, Tensor]:
    size = topology.tensor
    layers = nn.ModuleDict(
        {
            "column": column_linear(6, 8, bias=True, dtype=torch.float64),
            "row": row_linear(8, 6, bias=True, dtype=torch.float64),
        }
    )
    initialize_(layers, 0, topology.tensor_rank, size)
    with torch.no_grad():
        layers["row"].bias.copy_(rand(6, seed=4))
        layers["column"].bias.copy_(rand(8, seed=5).chunk(size)[topology.tensor_rank])
    x = rand(3, 2, 6, seed=1)
    hidden, _ = layers["column"](x)
    out, _ = layers["row"](hidden)
    (out * rand(*out.shape, seed=2).detach()).sum().backward()
    return {"out": out.detach(), "x": x.grad, "row bias": layers["row"].bias.grad}


def shared_gradient(topology: Any) -> tuple[int, Tensor, Tensor]:
    """x and y get one gradient tensor, not contiguous; only x's may be summed over the group."""
    x, y = (rand(3, 4, seed=s) for s in (1, 2))
    weight = rand(4, 3, seed=3).detach() * (1 + topology.tensor_rank)
    # Made before the sum, so that its backward runs after the sum's and would see what that wrote.
    doubled = 2 * y
    ((sum_grad_over_tp(x) + doubled).T * weight).sum().backward()
    return topology.tensor_rank, x.grad, y.grad


@pytest.mark.distributed
def test_linear_layers_with_biases(ranks):
    (alone,) = ranks.run(linear_results, world=1)
    for rank in ranks.run(linear_results, world=2, tensor=2):
        for name, want in alone.items():
            torch.testing.assert_close(rank[name], want, rtol=1e-10, atol=1e-12)


@pytest.mark.distributed
def test_summing_a_gradient_leaves_what_shares_it_alone(ranks):
    weight = rand(4, 3, seed=3).detach().T
    for rank, dx, dy in ranks.run(shared_gradient, world=2, tensor=2):
        torch.testing.assert_close(dx, 3 * weight)
        torch.testing.assert_close(dy, 2 * (1 + rank) * weight)


def odd_heads(topology: Any) -> str:
    with pytest.raises(ValueError, match="tensor-parallel size 2") as caught:
        GatedCrossAttentionBlock(GatedBlockConfig(**(BLOCK | {"heads": 3})))
    return str(caught.value)


@pytest.mark.distributed
def test_a_size_that_does_not_divide_the_heads_is_named(ranks):
    assert all("heads = 3" in message for message in ranks.run(odd_heads, world=2, tensor=2))
