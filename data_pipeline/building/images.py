"""Images of a corpus: the paper's filters, and perceptual hashes against evaluation sets."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data_pipeline.building.config import ImageConfig
from data_pipeline.errors import BadSampleError

EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}
"""Formats that are kept, whatever the file was called, with the ending that a sample's member gets."""
_HASH_SIDE = 32
_HASH_BITS = 64
_LOW = 8
_DECODE_SIDE = 256


@dataclass(frozen=True, slots=True)
class CheckedImage:
    """An image that passed."""

    extension: str
    """By what the bytes are."""
    hash: int
    """Perceptual hash, 64 bits."""


def check_image(blob: bytes, config: ImageConfig, *, hashed: bool = True) -> CheckedImage:
    """Decode an image and apply the filters.

    Args:
        blob: the encoded image.
        config: the limits.
        hashed: compute the perceptual hash; 0 stands for it else.

    Raises:
        BadSampleError: its `cause` names the filter, as "side under 64 pixels".
    """
    if len(blob) < config.min_bytes:
        raise BadSampleError(f"under {config.min_bytes} bytes", f"{len(blob)}")
    if len(blob) > config.max_bytes:
        raise BadSampleError(f"over {config.max_bytes} bytes", f"{len(blob)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata; faults that matter raise
        try:
            image: Image.Image = Image.open(BytesIO(blob), formats=list(EXTENSIONS))
            # Pillow replaces a header that it cannot read by the next plugin's; the format is what it decodes.
            extension = EXTENSIONS[str(image.format)]
            _check_size(image.width, image.height, config)
            plain = _plain(image)
        except BadSampleError:
            raise
        except UnidentifiedImageError as error:
            raise BadSampleError("no image of a known format", f"begins with {blob[:8]!r}") from error
        except Image.DecompressionBombError as error:
            raise BadSampleError("too many pixels", str(error)) from error
        except Exception as error:  # Pillow's plugins raise anything from OSError to struct.error
            raise BadSampleError("corrupt image", f"{type(error).__name__}: {error}"[:200]) from error
    spans = [high - low for low, high in plain.getextrema()]  # type: ignore[misc]  # RGB: one pair a band
    if max(spans) < config.colour_range:
        raise BadSampleError("single colour", f"channels span {spans}")
    return CheckedImage(extension, perceptual_hash(plain) if hashed else 0)


def _check_size(width: int, height: int, config: ImageConfig) -> None:
    """Apply the filters that need the header alone, before anything is decoded."""
    short, long = sorted((width, height))
    if width * height > config.max_pixels:
        raise BadSampleError("too many pixels", f"{width} x {height}")
    if short < config.min_side:
        raise BadSampleError(f"side under {config.min_side} pixels", f"{width} x {height}")
    if long > config.max_aspect * short:
        raise BadSampleError(f"aspect ratio over {config.max_aspect:g}", f"{width} x {height}")


def _plain(image: Image.Image) -> Image.Image:
    """Decode to upright RGB; transparent parts become white, as training shows them."""
    if image.format == "JPEG" and image.mode == "RGB":
        image.draft(
            "RGB", (_DECODE_SIDE, _DECODE_SIDE)
        )  # the decoder shrinks as it goes, and still reads all
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        plain = Image.new("RGB", layer.size, (255, 255, 255))
        plain.paste(layer, mask=layer.getchannel("A"))
        return plain
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):
        levels = np.asarray(image, np.float64)
        top = 65535.0 if levels.max(initial=0.0) > 255 else 255.0
        return Image.fromarray((np.clip(levels / top, 0, 1) * 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _cosines() -> np.ndarray:
    """First rows of the discrete cosine transform, float64 [8, 32]."""
    k, n = np.arange(_LOW)[:, None], np.arange(_HASH_SIDE)[None, :]
    return np.cos(np.pi * (n + 0.5) * k / _HASH_SIDE)


_DCT_KN = _cosines()


def perceptual_hash(image: Image.Image) -> int:
    """Return the 64-bit hash of the low frequencies (pHash): alike after scaling, compression, slight edits.

    Args:
        image: any mode.
    """
    small = image.convert("L").resize((_HASH_SIDE, _HASH_SIDE), Image.Resampling.BICUBIC)
    low_KK = _DCT_KN @ np.asarray(small, np.float64) @ _DCT_KN.T
    flat = low_KK.reshape(-1)
    # The constant term is far from all others; rounding keeps the bits equal on every machine.
    bits = np.round(flat, 6) > np.round(np.median(flat[1:]), 6)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


class HashIndex:
    """Finds hashes within a small Hamming distance, without loss: pigeonholes of distance + 1 chunks.

    Two hashes that differ in at most d bits agree on one of d + 1 chunks; only those are compared.
    """

    def __init__(self, hashes: Iterable[int], distance: int) -> None:
        """Sort the hashes by each chunk.

        Args:
            hashes: 64-bit hashes.
            distance: most bits that differ.
        """
        self._distance = distance
        self._hashes = np.unique(np.fromiter(hashes, np.uint64))
        edges = np.linspace(0, _HASH_BITS, distance + 2).astype(int)
        self._chunks = [(int(a), int(b)) for a, b in pairwise(edges)]
        self._sorted: list[tuple[np.ndarray, np.ndarray]] = []
        for start, stop in self._chunks:
            values = self._cut(self._hashes, start, stop)
            order = np.argsort(values, kind="stable")
            self._sorted.append((values[order], order))

    def __len__(self) -> int:
        return len(self._hashes)

    @staticmethod
    def _cut(hashes: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Take bits start to stop of uint64 [N]."""
        return (hashes >> np.uint64(start)) & np.uint64((1 << (stop - start)) - 1)

    def near(self, wanted: int) -> bool:
        """Whether a hash of the index differs from `wanted` in at most `distance` bits."""
        if not len(self._hashes):
            return False
        value = np.array([wanted], np.uint64)
        for (start, stop), (values, order) in zip(self._chunks, self._sorted, strict=True):
            piece = self._cut(value, start, stop)[0]
            low, high = np.searchsorted(values, piece, "left"), np.searchsorted(values, piece, "right")
            if low == high:
                continue
            bits = np.bitwise_count(self._hashes[order[low:high]] ^ value)
            if int(bits.min()) <= self._distance:
                return True
        return False
