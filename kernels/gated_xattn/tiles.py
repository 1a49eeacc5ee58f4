"""Tiles of the gated cross-attention kernels, by head width, latents, dtype and architecture.

The kernels wait for memory and a program handles a tile or two, so what counts is how many programs share a processor:
their loads overlap with the others' arithmetic. Four warps a program beat eight at every shape that was timed.
Measured on an H200 for sm_90 (`python -m jobs.bench.tune`), elsewhere chosen by compiled figures
(`kernels.testing.dry`). What the tests compile uses not a byte of stack on sm_80, sm_90 and sm_100, with Triton 3.6.0
and 3.7.1; of all widths and powers of two of latents, a few that no published model has use 8 to 24. bf16, K 128, 64
latents on sm_90: forward 64 x 4 warps, 106 registers, four programs; backward 64 x 4 warps in two halves, the next
rows on their way, 254 registers, two programs.
"""

from dataclasses import dataclass, replace

import torch

from kernels.config import INTERPRETER_ARCH, without_wgmma

MAX_LATENTS = 128

_PARTS = {16: (16, 0), 32: (32, 0), 48: (32, 16), 64: (64, 0), 80: (64, 16), 96: (64, 32), 128: (128, 0)}

_PADDED = {80: (64, 32)}
"""Parts of the backward where they are others: 16 columns beside 64 make poor products. K 80, 128 latents, sm_90: 255
registers, 72 bytes of stack and 240 mma instructions; padded to 32 columns 218 registers, no stack, 40."""

WIDTHS = tuple(_PARTS)
"""Head widths that the kernels take."""

SMALL_SHARED_MEMORY = (86, 89, 120, 121)
"""Architectures with 99 KiB of shared memory for a program."""


@dataclass(frozen=True)
class Tile:
    """How one kernel is compiled."""

    rows: int
    """Text rows of a tile."""
    warps: int
    """Warps of a program."""
    parts: tuple[int, int]
    """Two powers of two that hold the head width, the second 0 or at least 16."""
    registers: int | None = None
    """Most registers a thread may take, None for as many as the compiler likes."""
    stages: int = 1
    """Tiles of rows in flight; the pipeline's buffers cost the forward a program of the processor."""
    dv_first: bool = False
    """Whether the backward adds up dv before anything else: with two parts, or 64 rows, any other order spills; with
    one part and fewer rows this one does."""


def tiles(width: int, latents: int, dtype: torch.dtype, arch: int) -> tuple[Tile, Tile]:
    """Return the tiles of the forward and of the backward kernel.

    Args:
        width: K, width of a head, one of `WIDTHS`.
        latents: BLOCK_R, the power of two that holds the latents.
        dtype: of queries, keys and values.
        arch: as `kernels.config.architecture` tells it.
    """
    parts = _PARTS[width]
    padded = _PADDED.get(width, parts)
    family = 80 if without_wgmma(arch) else arch
    if arch == INTERPRETER_ARCH:
        return Tile(16, 4, parts), Tile(16, 4, padded)
    if dtype == torch.float32:  # full fp32 has no tensor cores: small tiles, or it spills
        return Tile(16, 8, parts), Tile(16, 8, padded if latents > 64 else parts)
    # Two halves of 64 keep one half of the output in registers at a time.
    forward = Tile(64, 4, (64, 64) if width == 128 else parts)
    if latents > 64:
        if family == 80 and width == 96:  # 64 rows take 8 bytes of stack with Triton 3.6.0
            forward = Tile(32, 4, parts)
        if family == 80 and padded[1]:  # without wgmma two parts spill; one part of padded width does not
            padded = (128, 0)
        return forward, Tile(16 if padded[1] else 32, 8, padded, dv_first=padded[1] > 0)
    if latents == 32 and family != 80 and padded[1]:  # two parts spill with so few keys
        return forward, Tile(64, 8, (128, 0), dv_first=True)
    if (
        latents == 32 and family == 90 and width == 128
    ):  # with the next rows on their way it takes 32 bytes of stack
        return forward, replace(_HOPPER[128], stages=1)
    if family == 90:
        return forward, _HOPPER.get(width, Tile(64, 4, padded, dv_first=True))
    capped = {(80, 128): Tile(16, 8, padded, registers=128)}
    return forward, capped.get((family, width), Tile(32, 8, padded, dv_first=padded[1] > 0))


_HOPPER = {
    128: Tile(64, 4, (64, 64), stages=2, dv_first=True),
    96: Tile(64, 4, (64, 32), stages=2, dv_first=True),
    80: Tile(64, 4, (64, 32), stages=2, dv_first=True),
    64: Tile(64, 4, (64, 0), registers=168, dv_first=True),
}
"""Backward tiles of sm_90 for up to 64 latents, by head width; 64 and 128 measured, the others by their likeness."""


def short_tile(width: int, latents: int, dtype: torch.dtype, arch: int) -> Tile | None:
    """Return the tile of the backward kernel of images with few rows, None where the general one does it all.

    Args:
        width: K, width of a head, one of `WIDTHS`.
        latents: BLOCK_R, the power of two that holds the latents.
        dtype: of queries, keys and values.
        arch: as `kernels.config.architecture` tells it.
    """
    if arch == INTERPRETER_ARCH:
        return Tile(16, 4, _PARTS[width])
    if arch == 90 and dtype != torch.float32 and latents == 64:
        return _HOPPER_SHORT.get(width)
    return None


_HOPPER_SHORT = {
    128: Tile(64, 4, (64, 64)),
    96: Tile(64, 4, (64, 32)),
    80: Tile(64, 4, (64, 32)),
    64: Tile(64, 4, (64, 0)),
}
"""As `_HOPPER`, for images of at most 64 rows."""
