"""The paper's three sizes (tables 4 and 5), for GPUs.

The LM is Chinchilla's: Transformer-XL's relative positions, RMSNorm, GeLU, 32,000 tied embeddings. Its weights were
never published, so they are random unless `model.lm.weights` names a folder; `jobs.recipes.public` has LMs that are
public. Table 5 counts 12 D^2 a gated block: its keys and values read the LM's width, so a map to it follows the
resampler. NFNet-F6 is random, too, unless `model.vision.weights` names published weights.
"""

from dataclasses import replace
from typing import Any

from data_pipeline.actors import ReaderConfig
from data_pipeline.config import DatasetConfig
from data_pipeline.tokenizer import TokenizerConfig
from flamingo_dist.models.flamingo import FlamingoConfig
from flamingo_dist.models.gated_block import GatedBlockConfig
from flamingo_dist.models.lm_config import LMConfig
from flamingo_dist.models.resampler import ResamplerConfig
from flamingo_dist.models.vision import VisionConfig
from flamingo_dist.parallel.topology import ParallelConfig
from flamingo_dist.training.config import OptimizerConfig, TrainConfig
from jobs.config import DataConfig, ResourceConfig, RunConfig

VOCAB = 32_000
"""SentencePiece vocabulary of Flamingo's and Chinchilla's model cards."""
WIDTH = 1536
"""Width of the resampler, the same at every size (table 4)."""
HEAD = 128
"""Width of a head, the resampler's too: with the text's 1536 / 16 it has 175M parameters, with 128 table 5's 194M."""
ROOT = "s3://YOUR-BUCKET"
"""Where the data are; a name to put one's own in place of."""
IMAGE = 320
"""Pixels (paper: 320, up from 288 in pretraining)."""
LAMBDAS = {"m3w": 1.0, "align": 0.2, "ltip": 0.2, "vtp": 0.03}
"""Weights of the data sets' losses (paper, appendix B)."""


def _network(*, layers: int, width: int, heads: int, every: int) -> FlamingoConfig:
    vision = VisionConfig(name="nfnet-f6", image_size=IMAGE, dtype="bfloat16")
    return FlamingoConfig(
        lm=LMConfig(
            vocab_size=VOCAB,
            num_layers=layers,
            width=width,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=HEAD,
            ffn_width=4 * width,
            activation="gelu",
            positions="relative",
        ),
        vision=vision,
        resampler=ResamplerConfig(feature_width=vision.width, width=WIDTH, latents=64, head_dim=HEAD),
        gated=GatedBlockConfig(
            width=width, media_width=width, heads=heads, head_dim=HEAD, ffw_hidden=4 * width
        ),
        cross_every=every,
    )


def paper_data(batch: int, *, vocab_size: int = VOCAB, image_size: int = IMAGE) -> DataConfig:
    """Return the paper's four data sets with the batch sizes of its ablations, scaled to `batch` documents."""
    image: dict[str, Any] = {"image_size": image_size}
    train = {
        "m3w": DatasetConfig(
            name="m3w",
            kind="interleaved",
            urls=(f"{ROOT}/m3w",),
            batch_size=batch,
            seq_len=256,
            max_media=5,
            weight=LAMBDAS["m3w"],
            **image,
        ),
        **{
            name: DatasetConfig(
                name=name,
                kind="pair",
                urls=(f"{ROOT}/{name}",),
                batch_size=2 * batch,
                seq_len=length,
                weight=LAMBDAS[name],
                **image,
            )
            for name, length in (("align", 32), ("ltip", 64))
        },
        "vtp": DatasetConfig(
            name="vtp",
            kind="video",
            urls=(f"{ROOT}/vtp",),
            batch_size=batch // 4,
            seq_len=32,
            frames=8,
            weight=LAMBDAS["vtp"],
            **image,
        ),
    }
    return large_data(train, vocab_size)


def large_data(train: dict[str, DatasetConfig], vocab_size: int) -> DataConfig:
    """Return data sets under `ROOT` with the tokenizer there, read by 64 readers."""
    return DataConfig(
        train=train,
        tokenizer=TokenizerConfig(kind="hf", path=f"{ROOT}/tokenizer", vocab_size=vocab_size),
        readers=ReaderConfig(readers=64, cpus_per_reader=1, prefetch=4),
    )


def large_run(
    name: str,
    network: FlamingoConfig,
    data: DataConfig,
    *,
    workers: int,
    tensor: int,
    micro_rows: int = 0,
) -> RunConfig:
    """Return a run of the paper's schedule on `workers` GPUs in tensor-parallel groups of `tensor`.

    Borders of pictures get the colour of the network's encoder. Nothing is recomputed: what the backward needs fits
    beside the rest in 80 GB, up to 9B for all rows at once, above that for `micro_rows` of them. ZeRO 1 then reduces
    gradients once a step, where ZeRO 2 and 3 would for each part. The ranks of a tensor-parallel group share a batch's
    images.
    """
    colour = network.vision.pad_colour
    train = {key: replace(dataset, pad_colour=colour) for key, dataset in data.train.items()}
    return RunConfig(
        recipe=name,
        name=name,
        model=network,
        train=TrainConfig(
            steps=500_000,
            optimizer=OptimizerConfig(),
            checkpoint_every=500,
            probe_every=2_000 if data.held_out else 0,
        ),
        parallel=ParallelConfig(
            tensor=tensor,
            zero_stage=1 if micro_rows else 3,
            frozen="resident",
            micro_rows=micro_rows,
            split_vision=tensor > 1,
        ),
        resources=ResourceConfig(
            workers=workers, cpus_per_worker=4, threads_per_worker=4, use_gpu=True, max_failures=3
        ),
        data=replace(data, train=train),
    )


def flamingo_3b() -> RunConfig:
    """Return Flamingo-3B: LM of 24 blocks of width 2048, a gated block before every one; 8 GPUs."""
    network = _network(layers=24, width=2048, heads=16, every=1)
    return large_run("flamingo_3b", network, paper_data(256), workers=8, tensor=1)


def flamingo_9b() -> RunConfig:
    """Return Flamingo-9B: LM of 32 blocks of width 4096, a gated block before every 4th; 32 GPUs.

    32 and not table 4's 40: only 32 blocks give table 5's parameter counts.
    """
    network = _network(layers=32, width=4096, heads=32, every=4)
    return large_run("flamingo_9b", network, paper_data(512), workers=32, tensor=1)


def flamingo_80b() -> RunConfig:
    """Return Flamingo-80B: LM of 80 blocks of width 8192, a gated block before every 7th; 256 GPUs."""
    network = _network(layers=80, width=8192, heads=64, every=7)
    return large_run("flamingo_80b", network, paper_data(1024), workers=256, tensor=4, micro_rows=8)
