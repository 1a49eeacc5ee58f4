"""Relative positions against the sums of Dai et al. 2019 and XLNet's core, at TP 1 and 2; MPT-1B's wide norm."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import XLNetConfig
from transformers.models.xlnet.modeling_xlnet import XLNetRelativeAttention

from flamingo_dist.models.init import initialize_
from flamingo_dist.models.lm import LanguageModel, run_layer
from flamingo_dist.models.lm_config import LMConfig
from flamingo_dist.models.megatron import WidthNorm, transformer_config
from flamingo_dist.models.positions import alibi_slopes, distance_sinusoids
from flamingo_dist.parallel.topology import single_process
from tests.flamingo_dist.models.test_lm import lm_logits

D, H, K = 24, 4, 6
CHINCHILLA = LMConfig(
    vocab_size=50,
    num_layers=2,
    width=D,
    num_heads=H,
    num_kv_heads=H,
    head_dim=K,
    ffn_width=96,
    activation="gelu",
    positions="relative",
)
MOSAIC = replace(
    CHINCHILLA, positions="alibi", norm="layer_no_bias", qk_norm="width", naming="mosaic_gpt", clip_qkv=2.0
)
TOKENS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(2))


def build(config: LMConfig, rank: int = 0, size: int = 1) -> LanguageModel:
    """An LM with random weights that are large enough for positions to matter."""
    lm = LanguageModel(config, torch.float64)
    initialize_(lm, 3, rank, size)
    with torch.no_grad():
        for name, param in lm.named_parameters():
            param.mul_(15.0 if param.dim() > 1 and "layernorm" not in name else 1.0)
    return lm


def by_the_paper(core: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention [T, B, H, K] -> [T, B, H * K], one pair of positions at a time."""
    length, batch = q.shape[:2]
    # In fp32 the sinusoids are the model's own; their angles would differ in the last bits.
    r = (distance_sinusoids(length, D, device=q.device).double() @ core.position.weight.T).view(length, H, K)
    out = torch.zeros(length, batch, H, K, dtype=q.dtype)
    for i in range(length):
        scores = []
        for j in range(i + 1):
            content = ((q[i] + core.content_bias) * k[j]).sum(-1)
            position = ((q[i] + core.position_bias) * r[i - j]).sum(-1)
            scores.append((content + position) / K**0.5)
        weights = torch.stack(scores).softmax(0)
        out[i] = (weights[..., None] * v[: i + 1]).sum(0)
    return out.flatten(2)


def xlnet(core: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by XLNet's core, which is Transformer-XL's."""
    theirs = XLNetRelativeAttention(
        XLNetConfig(d_model=D, n_head=H, d_head=K, d_inner=8, vocab_size=8, dropout=0.0)
    ).double()
    with torch.no_grad():
        theirs.r_w_bias.copy_(core.content_bias)
        theirs.r_r_bias.copy_(core.position_bias)
    length, batch = q.shape[:2]
    sinusoids = distance_sinusoids(length + 1, D, device=q.device).double().flip(0)
    r = (sinusoids @ core.position.weight.T).view(length + 1, 1, H, K).expand(-1, batch, -1, -1)
    later = torch.ones(length, length, dtype=q.dtype).triu(1)[:, :, None, None]
    return theirs.rel_attn_core(q, k, v, r, attn_mask=later).flatten(2)


@pytest.mark.parametrize("reference", [by_the_paper, xlnet])
def test_core_equals(reference):
    generator = torch.Generator().manual_seed(5)
    with single_process():
        core = build(CHINCHILLA).layers[0].self_attention.core_attention
        qkv = [torch.randn(7, 2, H, K, generator=generator, dtype=torch.float64) for _ in range(3)]
        ours = [x.clone().requires_grad_() for x in qkv]
        theirs = [x.clone().requires_grad_() for x in qkv]
        out = core(*ours, attention_bias=distance_sinusoids(7, D, device=qkv[0].device))
        expected = reference(core, *theirs)
        torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)
        weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        (out * weight).sum().backward()
        (expected * weight).sum().backward()
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine.grad, other.grad, atol=1e-6, rtol=0)
        assert core.content_bias.abs().mean() > 0.1 < core.position_bias.abs().mean()


def test_sinusoids_are_transformer_xls():
    # Angle of distance 3 at pair 1 of 3: 3 / 10000^(2/6).
    angle = torch.tensor(3 / 10000 ** (2 / 6))
    row = distance_sinusoids(4, 6, device=angle.device)[3]
    torch.testing.assert_close(row[[1, 4]], torch.stack([angle.sin(), angle.cos()]))


def test_slopes_of_sixteen_heads_halve_every_second_head():
    slopes = alibi_slopes(16, 8.0)
    torch.testing.assert_close(slopes[1::2], 0.5 ** torch.arange(1, 9).float())


def logits_and_gradients(topology: Any, config: LMConfig) -> dict[str, Tensor]:
    """What ranks must agree on: logits whole, cached and packed, and the gradient of the stream."""
    lm = build(config, topology.tensor_rank, topology.tensor)
    segments = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 2, 2]] * 2)
    x, inputs = lm.embed(TOKENS)
    stream = x.detach().requires_grad_()
    out = stream
    for layer in lm.layers:
        out = run_layer(layer, out, inputs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out * weight).sum().backward()
    return {
        "whole": lm_logits(lm, TOKENS, cached=False),
        "cached": lm_logits(lm, TOKENS, cached=True),
        "packed": lm_logits(lm, TOKENS, cached=False, segments_BT=segments),
        "second": lm_logits(lm, TOKENS[:, 3:], cached=False),
        "gradient": stream.grad,
    }


@pytest.mark.distributed
@pytest.mark.parametrize("config", [CHINCHILLA, MOSAIC], ids=["relative", "alibi and wide norm"])
def test_ranks_caches_and_packed_rows_agree(ranks, config):
    (alone,) = ranks.run(logits_and_gradients, config, world=1)
    torch.testing.assert_close(alone["cached"], alone["whole"], atol=1e-5, rtol=0)
    torch.testing.assert_close(alone["packed"][:, 3:], alone["second"], atol=1e-5, rtol=0)
    assert (alone["packed"] - alone["whole"])[:, 3:].abs().max() > 1e-2
    for rank in ranks.run(logits_and_gradients, config, world=2, tensor=2):
        for name, want in alone.items():
            torch.testing.assert_close(rank[name], want, atol=1e-5, rtol=1e-5, msg=f"{name}: {{}}".format)


def test_the_wide_norm_is_a_layer_norm_over_all_heads():
    """As `attn_qk_ln` of MosaicGPT has it: before the heads are taken apart."""
    with single_process():
        megatron = transformer_config(MOSAIC, dtype=torch.float64, tp_size=1)
        norm = WidthNorm(megatron, K, 1e-5, kind="layer_no_bias", heads=H)
        with torch.no_grad():
            norm.weight.normal_()
        x = torch.randn(3, 2, H, K, dtype=torch.float64)
        expected = torch.nn.functional.layer_norm(x.flatten(2), (D,), norm.weight.flatten())
        torch.testing.assert_close(norm(x).flatten(2), expected, atol=1e-6, rtol=0)


def test_a_text_longer_than_the_table_is_refused():
    config = replace(CHINCHILLA, positions="learned", max_positions=8)
    with (
        single_process(),
        pytest.raises(ValueError, match=r"9 tokens needs more .* than the 8 of lm.max_positions"),
    ):
        LanguageModel(config, torch.float32).embed(TOKENS)
