"""Public implementations as numerical oracles: the parameter maps between theirs and ours."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

EVERYTHING = slice(None)
Pair = tuple[nn.Parameter, nn.Parameter, slice]
"""Our parameter, the oracle's, and the rows of the oracle's that ours is."""


class SquaredReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x).square()


def norm_pairs(ours: nn.Module, theirs: nn.Module) -> Iterator[Pair]:
    yield ours.weight, theirs.weight, EVERYTHING
    if ours.bias is not None:
        yield ours.bias, theirs.bias, EVERYTHING


def lucid_attention(ours: nn.Module, theirs: nn.Module) -> Iterator[Pair]:
    inner = theirs.to_q.weight.shape[0]
    yield ours.q.weight, theirs.to_q.weight, EVERYTHING
    yield ours.k.weight, theirs.to_kv.weight, slice(0, inner)
    yield ours.v.weight, theirs.to_kv.weight, slice(inner, None)
    yield ours.out.weight, theirs.to_out.weight, EVERYTHING


def lucid_ffw(norm: nn.Module, ffw: nn.Module, theirs: nn.Module) -> Iterator[Pair]:
    yield from norm_pairs(norm, theirs[0])
    yield ffw.up.weight, theirs[1].weight, EVERYTHING
    yield ffw.down.weight, theirs[3].weight, EVERYTHING


def lucid_resampler(ours: nn.Module, theirs: nn.Module) -> Iterator[Pair]:
    yield ours.latents, theirs.latents, EVERYTHING
    yield from norm_pairs(ours.norm, theirs.norm)
    for layer, (attn, ffw) in zip(ours.layers, theirs.layers, strict=True):
        yield from lucid_attention(layer.attn, attn)
        yield from norm_pairs(layer.attn.norm_features, attn.norm_media)
        yield from norm_pairs(layer.attn.norm_latents, attn.norm_latents)
        yield from lucid_ffw(layer.norm_ffw, layer.ffw, ffw)


def lucid_block(ours: nn.Module, theirs: nn.Module) -> Iterator[Pair]:
    yield ours.gate_attn, theirs.attn_gate, EVERYTHING
    yield ours.gate_ffw, theirs.ff_gate, EVERYTHING
    yield from norm_pairs(ours.norm_attn, theirs.attn.norm)
    yield from lucid_attention(ours.attn, theirs.attn)
    yield from lucid_ffw(ours.norm_ffw, ours.ffw, theirs.ff)


def idefics_attention(ours: nn.Module, theirs: nn.Module) -> Iterator[Pair]:
    for name in ("q", "k", "v"):
        yield getattr(ours, name).weight, getattr(theirs, f"{name}_proj").weight, EVERYTHING
    out = theirs.output_proj if hasattr(theirs, "output_proj") else theirs.o_proj
    yield ours.out.weight, out.weight, EVERYTHING
    if ours.q_norm is not None:
        yield from norm_pairs(ours.q_norm, theirs.q_layer_norm)
        yield from norm_pairs(ours.k_norm, theirs.k_layer_norm)


def idefics_resampler(ours: nn.Module, theirs: nn.Module) -> Iterator[Pair]:
    yield ours.latents, theirs.latents, EVERYTHING
    yield from norm_pairs(ours.norm, theirs.layer_norm)
    for layer, (attn, ffw) in zip(ours.layers, theirs.blocks, strict=True):
        yield from idefics_attention(layer.attn, attn)
        yield from norm_pairs(layer.attn.norm_features, attn.context_layer_norm)
        yield from norm_pairs(layer.attn.norm_latents, attn.latents_layer_norm)
        yield from norm_pairs(layer.norm_ffw, ffw.ln)
        yield layer.ffw.up.weight, ffw.fc.weight, EVERYTHING
        yield layer.ffw.down.weight, ffw.c_proj.weight, EVERYTHING


def idefics_block(ours: nn.Module, theirs: nn.Module) -> Iterator[Pair]:
    yield ours.gate_attn, theirs.alpha_cross_attn, EVERYTHING
    yield ours.gate_ffw, theirs.alpha_dense, EVERYTHING
    yield from norm_pairs(ours.norm_attn, theirs.input_layernorm)
    yield from norm_pairs(ours.norm_ffw, theirs.post_attention_layernorm)
    yield from idefics_attention(ours.attn, theirs.cross_attn)
    yield ours.ffw.gate.weight, theirs.mlp.gate_proj.weight, EVERYTHING
    yield ours.ffw.up.weight, theirs.mlp.up_proj.weight, EVERYTHING
    yield ours.ffw.down.weight, theirs.mlp.down_proj.weight, EVERYTHING


def randomise(theirs: nn.Module, seed: int = 0) -> None:
    """Fill the oracle with values that hide nothing: norms, biases and gates are random too."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in theirs.parameters():
            param.copy_(torch.randn(param.shape, generator=gen, dtype=torch.float64) * 0.3 + 0.1)


def copy_from(pairs: list[Pair], ours: nn.Module, *, except_for: tuple[str, ...] = ()) -> None:
    """Copy the oracle's values and check that every parameter of ours has its counterpart."""
    mapped = {id(pair[0]) for pair in pairs}
    missing = [n for n, p in ours.named_parameters() if id(p) not in mapped and n not in except_for]
    assert not missing, missing
    with torch.no_grad():
        for mine, other, rows in pairs:
            mine.copy_(other[rows].reshape(mine.shape))


def assert_same_gradients(pairs: list[Pair], tolerance: float) -> None:
    for mine, other, rows in pairs:
        assert mine.grad is not None
        assert mine.grad.any(), "a gradient of zeros compares with anything"
        torch.testing.assert_close(
            mine.grad, other.grad[rows].reshape(mine.shape), rtol=tolerance, atol=tolerance
        )
