"""Mean and standard deviation of an encoder's features over a corpus, for `VisionConfig.statistics`."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from data_pipeline.batch import Skip
from data_pipeline.files import write_whole
from data_pipeline.index import open_index
from flamingo_dist.models.vision import VisionConfig, build_vision
from jobs.encode import media_config
from jobs.encode_shard import decoded_samples

BATCH = 16
"""Images encoded at a time."""


def feature_statistics(source_url: str, vision: VisionConfig, *, images: int = 256) -> dict[str, Tensor]:
    """Measure an encoder's features over some images of a corpus, taken evenly from its shards.

    Args:
        source_url: folder of WebDataset shards with media, any fsspec URL.
        vision: the encoder; statistics that it names already are left aside.
        images: about how many images to look at; of a video, one frame.

    Returns:
        `mean` and `std`, fp32 [C], over images and positions.

    Raises:
        MissingShardError: the corpus does not exist.
        ValueError: it has no readable image.
    """
    encoder = build_vision(replace(vision, statistics=""))
    count, total_C, squares_C = 0, torch.zeros(vision.width).double(), torch.zeros(vision.width).double()
    for pixels_N3HW in _batches(source_url, vision, images):
        features_NC = encoder(torch.from_numpy(pixels_N3HW)).double().flatten(0, 1)
        count += features_NC.shape[0]
        total_C += features_NC.sum(0)
        squares_C += features_NC.square().sum(0)
    if count == 0:
        raise ValueError(f"{source_url} has no readable image to take statistics of.")
    mean_C = total_C / count
    std_C = (squares_C / count - mean_C.square()).clamp(min=0).sqrt()
    return {"mean": mean_C.float(), "std": std_C.float()}


def write_statistics(path: Path, source_url: str, vision: VisionConfig, *, images: int = 256) -> None:
    """Write `feature_statistics` to `path` whole or not at all; arguments and errors as there."""
    write_whole(path, save(feature_statistics(source_url, vision, images=images)))


def _batches(source_url: str, vision: VisionConfig, images: int) -> Iterator[np.ndarray]:
    """Give uint8 [N, 3, H, W] of the first samples of every shard, `images` in all or a few more."""
    shards = len(open_index([source_url]).entries)
    each = -(-images // max(1, shards))
    media, skips = media_config(vision), list[Skip]()
    for shard in range(shards):
        taken: list[np.ndarray] = []
        for sample in decoded_samples(source_url, shard, media, 1, skips):
            taken += sample.media
            if len(taken) >= each:
                break
        for start in range(0, len(taken), BATCH):
            yield np.concatenate(taken[start : start + BATCH])
