"""The shards that all loaders read: photographs' worth of JPEG with captions."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.shards import ShardWriter

SHARD_SAMPLES = 250
_WORDS = (
    "a",
    "red",
    "green",
    "old",
    "house",
    "river",
    "with",
    "trees",
    "under",
    "the",
    "sky",
    "and",
    "birds",
)


def jpeg(number: int, width: int = 640, height: int = 480) -> bytes:
    """Draw a smooth random picture with some grain: it decodes and weighs like a photograph (about 60 kB).

    Args:
        number: seeds the picture.
        width: pixels.
        height: pixels.
    """
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    grain = rng.normal(0, 9, (height, width, 1))
    pixels = np.clip(np.asarray(coarse, np.float32) + grain, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=87)
    return buffer.getvalue()


def write_corpus(folder: Path, samples: int) -> Path:
    """Write the WebDataset shards, or find them there.

    Args:
        folder: where corpora lie.
        samples: how many pairs.

    Returns:
        The corpus' folder.
    """
    target = folder / f"tars-{samples}"
    if not (target / "index.json").exists():
        with ShardWriter(str(target), max_samples=SHARD_SAMPLES) as writer:
            for number in range(samples):
                words = np.random.default_rng(number).choice(_WORDS, 10)
                members = {"jpg": jpeg(number), "txt": " ".join(words).encode()}
                writer.write(f"{number:08d}", members)
    return target
