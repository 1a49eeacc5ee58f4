"""Tiles of the gated cross-attention kernels, by head width, dtype and architecture.

Chosen by compiled figures (`kernels.testing.dry`): no spills, shared memory and registers that let several
programs share a processor, since the kernels wait for memory and each program handles a tile or two.
"""

from typing import NamedTuple

import torch

from kernels.config import INTERPRETER_ARCH

MAX_LATENTS = 128


class Tile(NamedTuple):
    """How one kernel is compiled."""

    rows: int
    """Text rows of a tile."""
    warps: int
    """Warps of a program."""
    stages: int
    """Tiles of rows in flight, 1 without a pipeline."""


_SPLITS = {16: (16, 0), 32: (32, 0), 48: (32, 16), 64: (64, 0), 80: (64, 16), 96: (64, 32), 128: (128, 0)}

WIDTHS = tuple(_SPLITS)
"""Head widths that the kernels take."""


def split_width(width: int) -> tuple[int, int] | None:
    """Return a head width as a power of two and the rest (0, or a power of two from 16); None if impossible."""
    return _SPLITS.get(width)


def tiles(width: int, dtype: torch.dtype, arch: int) -> tuple[Tile, Tile]:
    """Return the tiles of the forward and of the backward kernel.

    Args:
        width: K, width of a head.
        dtype: of queries, keys and values.
        arch: as `kernels.config.architecture` tells it.
    """
    if arch == INTERPRETER_ARCH:
        return Tile(16, 4, 1), Tile(16, 4, 1)
    if dtype == torch.float32:
        return Tile(32, 8, 1), Tile(16, 8, 1)
    return Tile(64, 4, 1), Tile(32, 4, 1)
