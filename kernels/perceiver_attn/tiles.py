"""Tile sizes of `perceiver_attn`: chosen by shape and dtype alone, checked on the dry device."""

from dataclasses import dataclass

import torch

from kernels.config import power_of_two, without_wgmma

MAX_HEAD = 128
"""Widest head that the kernels take."""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """What one program works on."""

    rows: int
    """Queries of a tile; the last tile may be partly empty."""
    keys: int
    """Keys of a block."""
    parts: tuple[int, int]
    """Widths (K0, K1) of the two parts of a head; K1 = 0 for one part."""
    warps: int
    """Warps of a program."""
    stages: int
    """Key blocks that are on their way at once."""


def forward_tiles(latents: int, head_dim: int, dtype: torch.dtype, arch: int) -> Tiles:
    """Return the forward's tiles.

    Args:
        latents: R.
        head_dim: K.
        dtype: of queries, keys and values.
        arch: compute capability, 10 * major + minor; 0 under the interpreter.
    """
    rows, parts = min(64, power_of_two(latents)), head_parts(head_dim, dtype)
    if dtype != torch.float32 and arch == 90:
        # On an H200 84% of a copy's bytes at the paper's shape, where two blocks of 64 keys on their way get 68%.
        return Tiles(rows=rows, keys=32, parts=parts, warps=4, stages=3)
    if dtype != torch.float32:
        return Tiles(rows=rows, keys=64, parts=parts, warps=4, stages=2)
    # Three products for one: both operands are in registers three times over. Tiles of 64 rows, through wgmma, spilled,
    # and at a width of 80 they read illegal addresses on an H200.
    return Tiles(rows=16, keys=32, parts=parts, warps=4, stages=2)


def backward_tiles(latents: int, head_dim: int, dtype: torch.dtype, arch: int) -> Tiles:
    """Return the backward's tiles: all queries in one tile where registers allow it, so that dK, dV are final.

    Args:
        latents: R.
        head_dim: K.
        dtype: of queries, keys and values.
        arch: compute capability, 10 * major + minor; 0 under the interpreter.
    """
    rows, parts = power_of_two(latents), head_parts(head_dim, dtype)
    if dtype == torch.float32:
        return Tiles(rows=16, keys=32, parts=parts, warps=8, stages=1)
    if without_wgmma(arch):
        # Two parts spill here; one part of padded width does not.
        parts = (power_of_two(head_dim), 0)
        # At a width of 64 two blocks of 64 keys on their way spill (56 bytes of stack); of 32 they do not.
        keys = 64 if rows <= 64 and parts[0] != 64 else 32
        return Tiles(rows=min(rows, 64), keys=keys, parts=parts, warps=8, stages=2)
    if rows <= 64 and arch == 90 and sum(parts) <= 96:
        # At most 255 registers for four warps: two programs share a processor, where eight warps leave room for one.
        return Tiles(rows=rows, keys=64, parts=parts, warps=4, stages=2)
    if rows <= 64:
        # Two blocks of 64 keys of a width of 128 spill on sm_100 with Triton 3.6.0.
        keys = 32 if arch >= 100 and sum(parts) > 96 else 64
        return Tiles(rows=rows, keys=keys, parts=parts, warps=8, stages=2)
    return Tiles(rows=128, keys=32, parts=parts, warps=8, stages=2)


def head_parts(head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return the widths (K0, K1) of the two parts of a head, powers of two of at least 16; K1 = 0 for one part.

    96 = 64 + 32 and 80 = 64 + 16 are exact. A width that is not the sum of two such powers is padded to one.
    In fp32, 128 goes as 64 + 64: the operands of one product have to fit the registers three times over.
    """
    if dtype == torch.float32 and 96 < head_dim <= 128:
        return 64, 64
    high = 1 << (head_dim.bit_length() - 1)
    low = head_dim - high
    if dtype == torch.float32 and high >= 32 and low == 16:
        low = 32  # 16 columns beside more make poor products: three of each spill
        return high, low
    if high >= 16 and (low == 0 or (low >= 16 and low & (low - 1) == 0)):
        return high, low
    return power_of_two(head_dim), 0
