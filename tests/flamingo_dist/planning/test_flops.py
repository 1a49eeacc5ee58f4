"""Operations against torch's own counter on a tiny network, forward and backward, and by hand."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flamingo_dist.models.flamingo import Flamingo
from flamingo_dist.parallel.topology import single_process
from flamingo_dist.planning.flops import dataset_flops, gated, relative_flops, resampler
from flamingo_dist.planning.workload import DatasetShape
from tests.tiny import network

ROWS, TOKENS, MEDIA, FRAMES = 2, 6, 3, 2
PRODUCTS = ("mm", "addmm", "bmm", "convolution", "convolution_backward")


def counted(config, *, checkpointing):
    """Return the counter's operations by operator: of the forward and of the whole step."""
    with single_process():
        return counted_in_groups(config, checkpointing)


def counted_in_groups(config, checkpointing):
    """`counted` where Megatron's groups are initialised, on this rank."""
    model = Flamingo(config, dtype=torch.float32, activation_checkpointing=checkpointing)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(0.01)
    tokens = torch.zeros(ROWS, TOKENS, dtype=torch.int64)
    size = config.vision.image_size
    media = torch.zeros(ROWS, MEDIA, FRAMES, 3, size, size, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        out = model(
            tokens,
            torch.ones_like(tokens),
            media,
            torch.ones(ROWS, MEDIA, dtype=torch.bool),
            targets_BT=tokens,
        )
        forward = by_operator(counter)
        out.nll_BT.sum().backward()
    return forward, by_operator(counter)


def by_operator(counter):
    found = Counter()
    for operator, value in counter.get_flop_counts()["Global"].items():
        found[str(operator).split(".")[-1]] += value
    return found


def linear(found):
    """Linear layers and convolutions: attention goes through other operators, or through bmm."""
    return sum(found[name] for name in ("mm", "addmm", "convolution", "convolution_backward"))


def in_forward(parts):
    """What the forward computes: the gradient of the frozen head's input, too (`models.head_loss`)."""
    return sum(p.linear for p in parts.values()) + parts["head"].backward_linear


@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
@pytest.mark.parametrize("activation", ["sqrelu", "silu_gated"])
def test_linear_layers_equal_torchs_counter(checkpointing, activation):
    base = network()
    config = replace(
        base,
        gated=replace(base.gated, activation=activation),
        resampler=replace(base.resampler, activation=activation),
    )
    data = DatasetShape(name="d", rows=ROWS, tokens=TOKENS, media=MEDIA, frames=FRAMES)
    parts = dataset_flops(config, data, checkpointing=checkpointing)
    forward, whole = counted(config, checkpointing=checkpointing)
    # The two trainable rows of the head, which a plan leaves out.
    rows = 2 * ROWS * TOKENS * config.lm.width * 2
    assert linear(forward) == in_forward(parts) + rows
    expected = sum(
        p.linear + p.recomputed * (p.linear - p.skipped) + p.backward_linear for p in parts.values()
    )
    assert linear(whole) == expected + 3 * rows


@pytest.mark.parametrize("checkpointing", [False, True])
def test_relative_positions_equal_torchs_counter(checkpointing):
    base = network()
    config = replace(
        base,
        lm=replace(base.lm, positions="relative", activation="gelu"),
        gated=replace(base.gated, media_width=32),
    )
    data = DatasetShape(name="d", rows=ROWS, tokens=TOKENS, media=MEDIA, frames=FRAMES)
    parts = dataset_flops(config, data, checkpointing=checkpointing)
    forward, whole = counted(config, checkpointing=checkpointing)
    rows = 2 * ROWS * TOKENS * config.lm.width * 2
    distances, scores = relative_flops(config.lm, data)
    assert min(distances, scores) > 0
    # With a bias that wants a gradient torch's attention on CPUs goes through bmm too, two products of this size.
    assert forward["bmm"] == 3 * scores
    assert whole["bmm"] == (3 + 1 + 4 + 3 * checkpointing) * scores
    assert linear(forward) + scores == in_forward(parts) + rows
    expected = sum(
        p.linear + p.recomputed * (p.linear - p.skipped) + p.backward_linear for p in parts.values()
    )
    assert linear(whole) + (2 + checkpointing) * scores == expected + 3 * rows


def test_attention_by_hand():
    config = network()
    r, g = config.resampler, config.gated
    # Scores and weighted sum: 2 products of 2 operations each.
    features = FRAMES * (16 // 8) ** 2
    one = 4 * r.latents * (features + r.latents) * r.heads * r.head_dim
    assert resampler(config, 5, FRAMES).attention == 5 * r.depth * one
    cross = 4 * TOKENS * r.latents * g.heads * g.head_dim * len(config.gated_positions())
    assert gated(config, TOKENS, 1, 1).attention == cross
    everything = replace(config, gated=replace(g, attend_all=True))
    assert gated(everything, TOKENS, MEDIA, MEDIA).attention == MEDIA * cross
    data = DatasetShape(name="d", rows=1, tokens=TOKENS, media=1, frames=1)
    pairs = TOKENS * (TOKENS + 1) // 2
    lm = dataset_flops(config, data, checkpointing=False)["lm"].attention
    assert lm == 4 * pairs * config.lm.num_layers * config.lm.num_heads * config.lm.head_dim


def test_a_frozen_backward_has_no_weight_gradients():
    data = DatasetShape(name="d", rows=1, tokens=TOKENS, media=1, frames=1)
    parts = dataset_flops(network(), data, checkpointing=True)
    assert parts["vision"].useful == parts["vision"].forward
    assert parts["lm"].backward_linear == parts["lm"].linear
    assert parts["gated"].backward_linear == 2 * parts["gated"].linear
    assert parts["resampler"].recompute == 0 < parts["lm"].recompute < parts["lm"].forward


def test_stored_features_need_no_encoder():
    data = DatasetShape(name="d", rows=1, tokens=TOKENS, media=1, frames=1, pixels=False)
    assert dataset_flops(network(), data, checkpointing=True)["vision"].forward == 0


def recomputed(topology):
    """Operations that checkpointing adds on this rank."""
    plain, again = (counted_in_groups(network(), checkpointing)[1] for checkpointing in (False, True))
    return linear(again) - linear(plain)


@pytest.mark.distributed
def test_recomputation_under_tensor_parallelism_leaves_out_each_blocks_last_product_too(ranks):
    data = DatasetShape(name="d", rows=ROWS, tokens=TOKENS, media=MEDIA, frames=FRAMES)
    parts = dataset_flops(network(), data, checkpointing=True)
    expected = sum(p.recomputed * (p.linear - p.skipped) for p in parts.values())
    assert sum(ranks.run(recomputed, world=2, tensor=2)) == expected
