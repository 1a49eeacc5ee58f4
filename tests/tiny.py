"""A tiny network and batches for tests, equal on every layout."""

from typing import Any

import torch

from flamingo_dist.models.flamingo import Flamingo, FlamingoConfig, FlamingoOutput
from flamingo_dist.models.gated_block import GatedBlockConfig
from flamingo_dist.models.init import ParamTag
from flamingo_dist.models.lm_config import LMConfig
from flamingo_dist.models.resampler import ResamplerConfig
from flamingo_dist.models.vision import VisionConfig
from flamingo_dist.parallel.topology import ParallelConfig, Topology
from flamingo_dist.training.batch import TrainBatch
from flamingo_dist.training.build import build_engine
from flamingo_dist.training.config import OptimizerConfig, TrainConfig
from flamingo_dist.training.step import TrainStep

VOCAB = 60
IMAGE, EOC = VOCAB, VOCAB + 1
WEIGHTS = {"docs": 1.0, "pairs": 0.2}
WHOLE = ParamTag()
"""Tag of a tensor that is not cut."""


def network(*, gate_init: float = 0.0, layers: int = 3, every: int = 2) -> FlamingoConfig:
    return FlamingoConfig(
        lm=LMConfig(
            vocab_size=VOCAB,
            num_layers=layers,
            width=32,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            ffn_width=64,
        ),
        vision=VisionConfig(name="tiny", image_size=16, tiny_width=16),
        resampler=ResamplerConfig(
            feature_width=16, width=24, depth=2, latents=4, heads=2, head_dim=8, frames=2
        ),
        gated=GatedBlockConfig(
            width=32, media_width=24, heads=2, head_dim=8, ffw_hidden=64, gate_init=gate_init
        ),
        cross_every=every,
    )


def train_config(steps: int = 3, *, dtype: str = "fp32", lr: float = 1e-2) -> TrainConfig:
    return TrainConfig(steps=steps, dtype=dtype, optimizer=OptimizerConfig(lr=lr, warmup_steps=2), seed=7)


def batch(name: str, step: int, *, rows: int = 4) -> TrainBatch:
    """The global batch of one data set at one step: lead text, images at random places, padding at the end."""
    seed = step * 10 + list(WEIGHTS).index(name)
    generator = torch.Generator().manual_seed(seed)
    length, media = (14, 2) if name == "docs" else (9, 1)
    tokens = torch.randint(3, VOCAB, (rows, length), generator=generator)
    index = torch.zeros(rows, length, dtype=torch.int32)
    media_mask = torch.zeros(rows, media, dtype=torch.bool)
    mask = torch.ones(rows, length, dtype=torch.bool)
    for row in range(rows):
        present = media if name == "pairs" else row % (media + 1)
        places = sorted(torch.randperm(length - 4, generator=generator)[:present].tolist())
        for number, place in enumerate(places):
            tokens[row, place + 1] = IMAGE
            index[row, place + 1 :] = number + 1
            media_mask[row, number] = True
        end = length - row % 3
        tokens[row, end - 1] = EOC
        tokens[row, end:] = 0
        mask[row, end:] = False
    mask &= tokens != IMAGE
    mask[:, 0] = False
    pixels = torch.randint(0, 256, (rows, media, 2, 3, 16, 16), generator=generator).to(torch.uint8)
    pixels[~media_mask] = 0
    return TrainBatch(
        tokens_BT=tokens, loss_mask_BT=mask, media_index_BT=index, media=pixels, media_mask_BM=media_mask
    )


def forward(model: Flamingo, given: TrainBatch, **more: Any) -> FlamingoOutput:
    """The network on a batch; `more` goes to its `forward` too."""
    return model(given.tokens_BT, given.media_index_BT, given.media, given.media_mask_BM, **more)


def local(whole: TrainBatch, topology: Topology) -> TrainBatch:
    """This data-parallel rank's rows."""
    rows = whole.tokens_BT.shape[0] // topology.data
    return whole.rows(slice(topology.data_rank * rows, (topology.data_rank + 1) * rows))


def batches(step: int, topology: Topology) -> dict[str, TrainBatch]:
    return {name: local(batch(name, step), topology) for name in WEIGHTS}


def make_step(
    topology: Topology,
    parallel: ParallelConfig,
    train: TrainConfig | None = None,
    config: FlamingoConfig | None = None,
) -> TrainStep:
    train = train or train_config()
    engine = build_engine(config or network(), train, parallel, topology)
    return TrainStep(engine, train, topology, WEIGHTS, parallel)
