"""Bytes to pixels and tokens: our decoder, and what a loader's users write with Pillow."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.media import MediaConfig, decode_image
from data_pipeline.tokenizer import Tokenizer, TokenizerConfig

SEQ_LEN = 64


def media_config(image_size: int) -> MediaConfig:
    """Return what all loaders decode to: a whole picture in a square of `image_size` pixels."""
    return MediaConfig(image_size=image_size, hflip_p=0.0)


def decode_by_us(blob: bytes, config: MediaConfig) -> np.ndarray:
    """Return uint8 [3, H, W]; the very function of our reader."""
    return decode_image(blob, config)


def decode_by_pillow(blob: bytes, config: MediaConfig) -> np.ndarray:
    """Return uint8 [3, H, W]: Pillow's decoder, its bicubic resize and a padded square, without limits of any kind."""
    image = Image.open(io.BytesIO(blob)).convert("RGB")
    size = config.image_size
    scale = size / max(image.size)
    fitted = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (size, size), config.pad_colour)
    square.paste(fitted, ((size - fitted.width) // 2, (size - fitted.height) // 2))
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


DECODES: dict[str, Callable[[bytes, MediaConfig], np.ndarray]] = {
    "ours": decode_by_us,
    "pillow": decode_by_pillow,
}


class Decode:
    """Bytes to pixels and tokens; picklable, for the loaders' worker processes."""

    def __init__(self, image_size: int, decode: str) -> None:
        """Decode to squares of `image_size` pixels by the function of this name in `DECODES`."""
        self.media, self.decode = media_config(image_size), DECODES[decode]
        self.tokenizer: Tokenizer | None = None

    def __call__(self, jpg: bytes, txt: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Return pixels uint8 [3, H, W] and tokens int64 [T]."""
        if self.tokenizer is None:
            self.tokenizer = TokenizerConfig().load()
        tokens_T = np.full(SEQ_LEN, self.tokenizer.pad_id, np.int64)
        ids = self.tokenizer.encode(txt.decode())[:SEQ_LEN]
        tokens_T[: len(ids)] = ids
        return self.decode(jpg, self.media), tokens_T

    def sample(self, sample: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Decode a sample by its extensions: pixels uint8 [3, H, W], tokens int64 [T]."""
        return self(sample["jpg"], sample["txt"])

    def row(self, row: dict[str, Any]) -> dict[str, np.ndarray]:
        """Decode a row of a table: pixels uint8 [3, H, W], tokens int64 [T]."""
        pixels_3HW, tokens_T = self.sample(row)
        return {"pixels": pixels_3HW, "tokens": tokens_T}
