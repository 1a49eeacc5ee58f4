"""Weights and pixels of the tiny NFNet, equal wherever they are made. Imports numpy alone: see write_nfnet_golden."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden" / "nfnet_tiny.npz"
"""Features that the published code gives of these weights and pixels, and the names of its parameters."""
PICKLED = Path(__file__).parent / "golden" / "nfnet_tiny_block.dill"
"""A few of the weights, as dill writes them."""
TINY = {"width": [32, 32, 48, 64], "depth": [1, 2, 3, 1], "group_width": [8] * 4}
"""The variant `nfnet-tiny`, in the published code's words."""
MEAN = np.array([0.485, 0.456, 0.406]) * 255
STD = np.array([0.229, 0.224, 0.225]) * 255


def picture() -> np.ndarray:
    """Two images, uint8 [2, 3, 64, 64]."""
    return np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64)).astype(np.uint8)


def values(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Draw fp32 weights that are in no way like fresh ones: means, gains and biases all off their start."""
    rng, drawn = np.random.default_rng(1), {}
    for name in sorted(shapes):
        shape, last = shapes[name], name.rsplit("/", 1)[1]
        if last in ("gain", "skip_gain"):
            value = rng.uniform(0.4, 1.4, shape)
        elif last == "w":
            value = (rng.standard_normal(shape) + 0.3) / np.sqrt(np.prod(shape[:-1]))
        else:
            value = 0.3 * rng.standard_normal(shape)
        drawn[name] = np.asarray(value, np.float32)
    return drawn
