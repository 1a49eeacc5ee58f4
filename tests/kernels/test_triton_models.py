"""The network's modules on the kernels give what they give on the references, results and all gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flamingo_dist.models.gated_block import GatedBlockConfig, GatedCrossAttentionBlock
from flamingo_dist.models.init import initialize_
from flamingo_dist.models.resampler import PerceiverResampler, ResamplerConfig
from flamingo_dist.parallel.topology import Topology
from tests.kernels.interpreting import poisoned, relative

pytestmark = pytest.mark.modes("interpret", "cuda")

T, B, M, R, D, E = 9, 2, 3, 4, 40, 24
INDEX = torch.tensor([[0, 1, 1, 2, 3, 3, 3, 3, 3], [0, 0, 1, 1, 1, 2, 2, 0, 0]])
BLOCK: dict[str, Any] = {
    "width": D,
    "media_width": E,
    "heads": 2,
    "head_dim": 16,
    "ffw_hidden": 56,
    "gate_init": 0.6,
}
RESAMPLER: dict[str, Any] = {
    "feature_width": 10,
    "width": E,
    "depth": 2,
    "latents": R,
    "heads": 2,
    "head_dim": 16,
    "frames": 3,
}
CASES: dict[str, dict[str, Any]] = {
    "resampler": RESAMPLER,
    "resampler, shared K/V and qk norm": RESAMPLER | {"shared_feature_kv": True, "qk_norm": True},
    "block": BLOCK,
    "block with a vector gate": BLOCK | {"gate": "vector"},
    "block of other variants": BLOCK | {"norm": "rms", "activation": "gelu"},
}


def build(sizes: dict[str, Any], implementation: str, device: str, rank: int = 0, size: int = 1) -> nn.Module:
    module: nn.Module
    if "latents" in sizes:
        module = PerceiverResampler(ResamplerConfig(**sizes, implementation=implementation))
    else:
        module = GatedCrossAttentionBlock(GatedBlockConfig(**sizes, implementation=implementation))
    initialize_(module, 0, rank, size)
    return module.to(device)


def results(module: nn.Module, device: str, *, recompute: bool = False) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(1)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen).to(device).requires_grad_()

    if isinstance(module, PerceiverResampler):
        mask = torch.tensor([[True, True], [True, False]], device=device)
        inputs: list[Any] = [rand(2, 2, 5, 10), mask]
    else:
        inputs = [rand(T, B, D), rand(B, M, R, E), INDEX.to(device)]
    out = checkpoint(module, *inputs, use_reentrant=False) if recompute else module(*inputs)
    (out * rand(*out.shape).detach()).sum().backward()
    found = {f"input {i}": x.grad for i, x in enumerate(inputs) if x.requires_grad}
    return {"out": out.detach()} | found | {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("case", CASES)
def test_both_implementations_agree(case, device):
    want = results(build(CASES[case], "reference", device), device)
    with poisoned():
        got = results(build(CASES[case], "triton", device), device)
    for name, value in want.items():
        assert value.any(), name
        # A shift of all keys changes no softmax: the key norm's bias has a gradient of rounding alone.
        if "k_norm.bias" not in name:
            assert relative(got[name], value) < 1e-5, name


def test_recomputing_gives_the_same_gradients(device):
    want = results(build(BLOCK, "triton", device), device)
    got = results(build(BLOCK, "triton", device), device, recompute=True)
    assert all(torch.equal(got[name], value) for name, value in want.items())


def test_closed_gates_return_the_stream_bit_for_bit(device):
    block = build(BLOCK | {"gate_init": 0.0}, "triton", device)
    x = torch.randn(T, B, D, device=device)
    out = block(x, torch.randn(B, M, R, E, device=device), INDEX.to(device))
    assert torch.equal(out, x)
    out.square().sum().backward()
    assert block.gate_attn.grad.any()
    assert block.gate_ffw.grad.any()


def results_by_rank(topology: Topology, case: str) -> tuple[int, dict[str, Tensor]]:
    module = build(CASES[case], "triton", "cpu", topology.tensor_rank, topology.tensor)
    return topology.tensor_rank, results(module, "cpu")


@pytest.mark.parametrize("case", ["resampler, shared K/V and qk norm", "block", "block with a vector gate"])
def test_two_tensor_parallel_ranks_agree_with_the_reference(case, ranks, device):
    if device == "cuda":
        pytest.skip("the ranks of the tests are CPU processes; on the interpreter alone")
    whole = build(CASES[case], "reference", device)
    dims = {name: param.flamingo_tag.partition_dim for name, param in whole.named_parameters()}
    by_rank = dict(ranks.run(results_by_rank, case, world=2, tensor=2))
    for name, want in results(whole, device).items():
        parts = [by_rank[rank][name] for rank in range(2)]
        dim = dims.get(name)
        for got in [torch.cat(parts, dim=dim)] if dim is not None else parts:
            if "k_norm.bias" not in name:
                assert relative(got, want) < 1e-5, name
