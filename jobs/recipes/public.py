"""Flamingo on public language models, for GPUs.

Weights are not named here: `--model.lm.weights` takes a folder of Hugging Face safetensors at any fsspec URL (such as
`hf://meta-llama/Llama-3.1-8B`), `--data.tokenizer.path` its tokenizer; without weights the frozen LM is random.
LLaMA, Qwen, OPT and GPT-2 get the paper's new layers; the MPT recipes are OpenFlamingo's arrangement. The vision
encoder is a random one of CLIP ViT-L/14's width; `--model.vision.name clip --model.vision.weights FOLDER` names one.
"""

from dataclasses import replace
from typing import Any

from data_pipeline.config import DatasetConfig
from flamingo_dist.models.flamingo import FlamingoConfig
from flamingo_dist.models.gated_block import GatedBlockConfig
from flamingo_dist.models.lm_config import LMConfig, RopeScaling
from flamingo_dist.models.resampler import ResamplerConfig
from flamingo_dist.models.vision import VisionConfig
from jobs.config import DataConfig, RunConfig
from jobs.recipes.large import HEAD, ROOT, large_data, large_run, paper_data

IMAGE = 224
CLIP_WIDTH = 1024


def _vision() -> VisionConfig:
    return VisionConfig(name="tiny", image_size=IMAGE, tiny_width=CLIP_WIDTH)


def _network(lm: LMConfig, *, every: int) -> FlamingoConfig:
    """Put the paper's layers around `lm`: as many heads of the same width, 4 D, a map to the LM's width."""
    return FlamingoConfig(
        lm=lm,
        vision=_vision(),
        resampler=ResamplerConfig(feature_width=CLIP_WIDTH, head_dim=HEAD),
        gated=GatedBlockConfig(
            width=lm.width,
            media_width=lm.width,
            heads=lm.num_heads,
            head_dim=lm.width // lm.num_heads,
            ffw_hidden=4 * lm.width,
        ),
        cross_every=every,
    )


def _paper_run(
    name: str,
    lm: LMConfig,
    *,
    every: int,
    workers: int,
    tensor: int = 1,
    batch: int = 256,
    micro_rows: int = 0,
) -> RunConfig:
    data = paper_data(batch, vocab_size=lm.vocab_size, image_size=IMAGE)
    network = _network(lm, every=every)
    return large_run(name, network, data, workers=workers, tensor=tensor, micro_rows=micro_rows)


def _llama(**shape: Any) -> LMConfig:
    """Return an LM of LLaMA 3.1's and 3.2's vocabulary and positions."""
    scaling = RopeScaling(factor=shape.pop("factor"))
    return LMConfig(vocab_size=128_256, rope_base=500_000.0, rope_scaling=scaling, **shape)


def llama_1b() -> RunConfig:
    """Return Flamingo on LLaMA-3.2-1B, a gated block before every LM block; 8 GPUs."""
    lm = _llama(
        factor=32.0, num_layers=16, width=2048, num_heads=32, num_kv_heads=8, head_dim=64, ffn_width=8192
    )
    return _paper_run("llama_1b", lm, every=1, workers=8)


def llama_7b() -> RunConfig:
    """Return Flamingo on LLaMA-3.1-8B, a gated block before every 4th LM block; 32 GPUs."""
    lm = _llama(
        factor=8.0,
        num_layers=32,
        width=4096,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        ffn_width=14_336,
        tied=False,
    )
    return _paper_run("llama_7b", lm, every=4, workers=32, batch=512)


def llama_70b() -> RunConfig:
    """Return Flamingo on LLaMA-3.1-70B, a gated block before every 7th LM block; 256 GPUs."""
    lm = _llama(
        factor=8.0,
        num_layers=80,
        width=8192,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        ffn_width=28_672,
        tied=False,
    )
    return _paper_run("llama_70b", lm, every=7, workers=256, tensor=4, batch=1024, micro_rows=8)


def qwen_1b() -> RunConfig:
    """Return Flamingo on Qwen3-1.7B, a gated block before every LM block; 8 GPUs."""
    lm = LMConfig(
        vocab_size=151_936,
        num_layers=28,
        width=2048,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        ffn_width=6144,
        norm_eps=1e-6,
        qk_norm="head",
        rope_base=1e6,
    )
    return _paper_run("qwen_1b", lm, every=1, workers=8)


def qwen_7b() -> RunConfig:
    """Return Flamingo on Qwen2.5-7B, a gated block before every 4th LM block; 32 GPUs."""
    return _paper_run("qwen_7b", _qwen2_7b(), every=4, workers=32, batch=512)


def qwen_70b() -> RunConfig:
    """Return Flamingo on Qwen2.5-72B, a gated block before every 7th LM block; 256 GPUs."""
    lm = replace(_qwen2_7b(), num_layers=80, width=8192, num_heads=64, num_kv_heads=8, ffn_width=29_568)
    return _paper_run("qwen_70b", lm, every=7, workers=256, tensor=4, batch=1024, micro_rows=8)


def _qwen2_7b() -> LMConfig:
    return LMConfig(
        vocab_size=152_064,
        num_layers=28,
        width=3584,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        ffn_width=18_944,
        norm_eps=1e-6,
        bias="qkv",
        rope_base=1e6,
        tied=False,
    )


def opt_1b() -> RunConfig:
    """Return Flamingo on OPT-1.3B, a gated block before every LM block; 8 GPUs."""
    lm = LMConfig(
        vocab_size=50_272,
        num_layers=24,
        width=2048,
        num_heads=32,
        num_kv_heads=32,
        head_dim=64,
        ffn_width=8192,
        activation="relu",
        norm="layer",
        bias="all",
        positions="learned",
        position_offset=2,
        naming="opt",
    )
    return _paper_run("opt_1b", lm, every=1, workers=8)


def gpt2_1b() -> RunConfig:
    """Return Flamingo on GPT-2 XL (1.5B), a gated block before every 2nd LM block; 8 GPUs."""
    lm = LMConfig(
        vocab_size=50_257,
        num_layers=48,
        width=1600,
        num_heads=25,
        num_kv_heads=25,
        head_dim=64,
        ffn_width=6400,
        activation="gelu_tanh",
        norm="layer",
        bias="all",
        positions="learned",
        max_positions=1024,
        naming="gpt2",
    )
    return _paper_run("gpt2_1b", lm, every=2, workers=8)


def mpt_1b() -> RunConfig:
    """Return OpenFlamingo-3B's arrangement: MPT-1B (RedPajama), a gated block before every LM block; 64 GPUs."""
    lm = _mpt(vocab_size=50_368, num_layers=24, width=2048, qk_norm="width", naming="mosaic_gpt")
    return _open_flamingo("mpt_1b", lm, every=1)


def mpt_7b() -> RunConfig:
    """Return OpenFlamingo-9B's arrangement: MPT-7B, a gated block before every 4th LM block, its last; 64 GPUs."""
    lm = _mpt(vocab_size=50_432, num_layers=32, width=4096, naming="mpt")
    return _open_flamingo("mpt_7b", lm, every=4)


def _mpt(*, width: int, **shape: Any) -> LMConfig:
    """Return an MPT: heads of 128, a hidden width of 4 D, ALiBi, norms without a shift."""
    return LMConfig(
        width=width,
        num_heads=width // 128,
        num_kv_heads=width // 128,
        head_dim=128,
        ffn_width=4 * width,
        activation="gelu",
        norm="layer_no_bias",
        positions="alibi",
        **shape,
    )


def _open_flamingo(name: str, lm: LMConfig, *, every: int) -> RunConfig:
    """Return a run as arXiv 2308.01390 describes it: 8 heads of 64 whatever the width, GELU, images alone."""
    network = FlamingoConfig(
        lm=lm,
        vision=_vision(),
        resampler=ResamplerConfig(
            feature_width=CLIP_WIDTH, width=CLIP_WIDTH, heads=8, head_dim=64, activation="gelu", frames=1
        ),
        gated=GatedBlockConfig(
            width=lm.width,
            media_width=CLIP_WIDTH,
            heads=8,
            head_dim=64,
            ffw_hidden=4 * lm.width,
            activation="gelu",
        ),
        cross_every=every,
        cross_phase="last",
    )
    run = large_run(name, network, _open_flamingo_data(lm.vocab_size), workers=64, tensor=1)
    optimizer = replace(run.train.optimizer, warmup_steps=1875)
    return replace(run, train=replace(run.train, steps=29_300, optimizer=optimizer))


def _open_flamingo_data(vocab_size: int) -> DataConfig:
    """Return MMC4 and LAION-2B, 32 documents and 64 pairs on each of 64 GPUs; the pairs weigh 0.2."""
    mmc4 = DatasetConfig(
        name="mmc4",
        kind="interleaved",
        urls=(f"{ROOT}/mmc4",),
        batch_size=2048,
        seq_len=256,
        max_media=6,
        image_size=IMAGE,
    )
    laion = DatasetConfig(
        name="laion",
        kind="pair",
        urls=(f"{ROOT}/laion",),
        batch_size=4096,
        seq_len=32,
        weight=0.2,
        image_size=IMAGE,
    )
    return large_data({"mmc4": mmc4, "laion": laion}, vocab_size)
