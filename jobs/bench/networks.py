"""Networks of the step benchmark and of the comparison with the CPU, and batches for them.

The sizes are those of the recipes `smoke` and `flamingo_3b`, `_9b` and `_80b` (a test compares them); the recipes
themselves need the data pipeline, which a machine that only measures may lack.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flamingo_dist.models.flamingo import Flamingo, FlamingoConfig
from flamingo_dist.models.gated_block import GatedBlockConfig
from flamingo_dist.models.lm_config import LMConfig
from flamingo_dist.models.recompute import Recompute
from flamingo_dist.models.resampler import ResamplerConfig
from flamingo_dist.models.vision import VisionConfig
from flamingo_dist.training.batch import TrainBatch
from jobs.bench.layers import fill


def smoke_network() -> FlamingoConfig:
    """Return the network of the recipe `smoke`."""
    return FlamingoConfig(
        lm=LMConfig(
            vocab_size=260, num_layers=4, width=64, num_heads=4, num_kv_heads=2, head_dim=16, ffn_width=128
        ),
        vision=VisionConfig(name="tiny", image_size=32, tiny_width=32),
        resampler=ResamplerConfig(
            feature_width=32, width=48, depth=2, latents=8, heads=4, head_dim=16, frames=4
        ),
        gated=GatedBlockConfig(width=64, media_width=48, heads=4, head_dim=16, ffw_hidden=256),
        cross_every=2,
    )


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Sizes of a network of the step benchmark, on one GPU."""

    width: int
    """D."""
    heads: int
    """Heads of this GPU."""
    every: int
    """A gated block stands before every n-th block."""
    layers: int
    """Blocks that the step benchmark takes: the whole network's, or one gated block's group of what no GPU holds."""
    head_dim: int = 128
    """K."""
    resampler_head: int = 128
    """K of the paper's Resampler."""
    depth: int = 6
    """Layers of IDEFICS' Resampler."""
    latents: int = 64
    """R of IDEFICS' Resampler."""
    features: int = 1536
    """E, and C of IDEFICS, which has no map between the two."""
    encoder: int = 3072
    """C of the paper's networks: NFNet-F6's channels."""
    image_size: int = 80
    """Pixels of the stand-in encoder: at its stride of 8 the 100 features that 320 px are at the paper's 32."""
    vocab: int = 32_000
    """V."""
    tensor: int = 1
    """Tensor-parallel degree whose slice this is: hidden widths and the vocabulary are divided by it, but for the
    Resampler's FFW, which stays whole."""


PAPER = {
    "3b": Widths(width=2048, heads=16, every=1, layers=24),
    "9b": Widths(width=4096, heads=32, every=4, layers=32),
    "80b-tp8": Widths(width=8192, heads=8, every=7, layers=7, tensor=8),
}
"""The paper's sizes; of the 80B what one of eight tensor-parallel GPUs computes."""
IDEFICS = {
    "3b-idefics": PAPER["3b"],
    "9b-idefics": PAPER["9b"],
    "smoke-idefics": Widths(
        width=64,
        heads=4,
        every=2,
        layers=2,
        head_dim=16,
        depth=2,
        latents=16,
        features=32,
        image_size=32,
        vocab=260,
    ),
}
"""The same as transformers' IDEFICS can be it: SwiGLU, RMSNorm, rotary positions, an untied head."""
NETWORKS = ("smoke", *PAPER, *IDEFICS)


def network(name: str, layers: int | None = None) -> FlamingoConfig:
    """Return the network `name` (of `NETWORKS`) with `layers` of its blocks; None for those that a benchmark takes.

    Raises:
        ValueError: the name is unknown, or IDEFICS cannot have so many blocks.
    """
    if name == "smoke":
        return smoke_network()
    if name not in NETWORKS:
        raise ValueError(f"network {name!r}: give one of {', '.join(NETWORKS)}.")
    sizes = IDEFICS[name] if name in IDEFICS else PAPER[name]
    layers = sizes.layers if layers is None else layers
    if name in IDEFICS and layers % sizes.every:
        raise ValueError(f"{name} with {layers} blocks: give a multiple of {sizes.every}.")
    return _idefics(sizes, layers) if name in IDEFICS else _paper(sizes, layers)


def _vision(sizes: Widths, width: int) -> VisionConfig:
    """Return a stand-in of the encoder's width; features come ready, so it never runs."""
    return VisionConfig(name="tiny", image_size=sizes.image_size, tiny_width=width)


def _paper(sizes: Widths, layers: int) -> FlamingoConfig:
    width, tensor = sizes.width, sizes.tensor
    return FlamingoConfig(
        lm=LMConfig(
            vocab_size=sizes.vocab // tensor,
            num_layers=layers,
            width=width,
            num_heads=sizes.heads,
            num_kv_heads=sizes.heads,
            head_dim=sizes.head_dim,
            ffn_width=4 * width // tensor,
            activation="gelu",
            positions="relative",
        ),
        vision=_vision(sizes, sizes.encoder),
        resampler=ResamplerConfig(
            feature_width=sizes.encoder,
            width=sizes.features,
            heads=16 // tensor,
            head_dim=sizes.resampler_head,
        ),
        gated=GatedBlockConfig(
            width=width,
            media_width=width,
            heads=sizes.heads,
            head_dim=sizes.head_dim,
            ffw_hidden=4 * width // tensor,
        ),
        cross_every=sizes.every,
    )


def _idefics(sizes: Widths, layers: int) -> FlamingoConfig:
    """Return a network that transformers' classes can be, too; hidden widths are LLaMA's for the width."""
    width = sizes.width
    hidden = -(-8 * width // 3 // sizes.head_dim) * sizes.head_dim
    return FlamingoConfig(
        lm=LMConfig(
            vocab_size=sizes.vocab,
            num_layers=layers,
            width=width,
            num_heads=sizes.heads,
            num_kv_heads=sizes.heads,
            head_dim=sizes.head_dim,
            ffn_width=hidden,
            norm_eps=1e-6,
            tied=False,
        ),
        vision=_vision(sizes, sizes.features),
        resampler=ResamplerConfig(
            feature_width=sizes.features,
            width=sizes.features,
            depth=sizes.depth,
            latents=sizes.latents,
            activation="relu",
            frames=1,
            frames_std=0.0,
        ),
        gated=GatedBlockConfig(
            width=width,
            media_width=sizes.features,
            heads=sizes.heads,
            head_dim=sizes.head_dim,
            ffw_hidden=hidden,
            activation="silu_gated",
            norm="rms",
            norm_eps=1e-6,
        ),
        cross_every=sizes.every,
    )


def with_encoder(config: FlamingoConfig) -> FlamingoConfig:
    """Return `config` with the paper's encoder, NFNet-F6 in bf16 with random weights, in place of the stand-in."""
    return replace(config, vision=VisionConfig(name="nfnet-f6", image_size=320, dtype="bfloat16"))


def with_implementation(config: FlamingoConfig, implementation: Any, *, gate_init: float) -> FlamingoConfig:
    """Return `config` with the kernels' implementation and the initial gates set."""
    return replace(
        config,
        resampler=replace(config.resampler, implementation=implementation),
        gated=replace(config.gated, implementation=implementation, gate_init=gate_init),
    )


def build(
    config: FlamingoConfig,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    recompute: Recompute = False,
    *,
    draw_there: bool = False,
) -> Flamingo:
    """Return the network on `device`, filled from its parameters' names and the seed alone.

    Megatron's groups must be initialised (`single_process`).

    Args:
        config: the network.
        dtype: of its parameters.
        device: where to.
        seed: of the weights.
        recompute: activation checkpointing.
        draw_there: draw the weights on `device`: seconds less a gigabyte, and other values than a CPU draws.
    """
    from flamingo_dist.models.init import draw, tag_of

    model = Flamingo(config, dtype=dtype, activation_checkpointing=recompute).to(device)
    if draw_there:
        fill(model, torch.Generator(device).manual_seed(seed))
        return model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = draw(name, tag_of(parameter), parameter.shape, seed=seed, tp_rank=0, tp_size=1)
            parameter.copy_(values)
    return model


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Size of a made-up batch."""

    rows: int
    """B."""
    length: int
    """T."""
    media: int
    """M."""
    features: int = 0
    """S, features of a medium; 0 sends pixels through the encoder."""


def make_batch(config: FlamingoConfig, size: BatchConfig, *, seed: int) -> TrainBatch:
    """Return a batch of random tokens whose images stand at even distances after a lead, on the CPU.

    Args:
        config: the network that it is for.
        size: how much.
        seed: of everything.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, config.lm.vocab_size, (size.rows, size.length), generator=generator)
    index = torch.zeros(size.rows, size.length, dtype=torch.int32)
    lead = max(1, size.length // 16)
    for medium in range(size.media):
        place = lead + medium * (size.length - lead) // size.media
        tokens[:, place] = config.lm.vocab_size
        index[:, place:] = medium + 1
    mask = tokens < config.lm.vocab_size
    mask[:, 0] = False
    shape = (size.rows, size.media, 1)
    if size.features:
        media: Tensor = torch.randn(*shape, size.features, config.vision.width, generator=generator)
    else:
        pixels = (*shape, 3, config.vision.image_size, config.vision.image_size)
        media = torch.randint(0, 256, pixels, generator=generator).to(torch.uint8)
    return TrainBatch(
        tokens_BT=tokens,
        loss_mask_BT=mask,
        media_index_BT=index,
        media=media,
        media_mask_BM=torch.ones(size.rows, size.media, dtype=torch.bool),
    )


def nll_sum(network: Flamingo, batch: TrainBatch, targets_BT: Tensor) -> Tensor:
    """Return the sum of the losses of the targets that are not ignored, 0-dim.

    Args:
        network: ours.
        batch: what it reads.
        targets_BT: int64 [B, T], -100 where no loss is wanted.
    """
    out = network(
        batch.tokens_BT,
        batch.media_index_BT,
        batch.media,
        batch.media_mask_BM,
        targets_BT=targets_BT,
        num_media=batch.num_media(),
        num_targets=batch.num_loss_tokens(),
    )
    assert out.nll_BT is not None, "targets were given"
    total: Tensor = out.nll_BT.sum()
    return total
