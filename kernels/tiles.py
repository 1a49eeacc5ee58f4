"""Pieces of Triton code that several kernels share: tiles in and out, and a dot product for the interpreter too."""

import triton
import triton.language as tl


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, PREC: tl.constexpr, UPCAST: tl.constexpr) -> tl.tensor:
    """Return fp32 a @ b.

    Triton's interpreter keeps bf16 as its bit pattern and multiplies that: with UPCAST (set in the interpreter
    alone) the operands become fp32 first, which changes no value.
    """
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision=PREC)


@triton.jit
def load_tile(
    ptr: tl.tensor,
    rows: tl.tensor,
    real: tl.tensor,
    stride: tl.tensor,
    first: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Return [rows, BLOCK] from column `first` on: row `rows[i]` of a matrix with contiguous rows of WIDTH.

    Rows where `real` is False, and columns from WIDTH on, are zeros.
    """
    columns = first + tl.arange(0, BLOCK)
    here = ptr + rows[:, None] * stride + columns[None, :]
    if first + BLOCK > WIDTH:
        return tl.load(here, mask=real[:, None] & (columns < WIDTH)[None, :], other=0.0)
    return tl.load(here, mask=real[:, None], other=0.0)


@triton.jit
def load_parts(
    x: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    real: tl.tensor,
    x_stride: tl.tensor,
    y_stride: tl.tensor,
    K: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return x1, y1, x2, y2: both parts [rows, K1] and [rows, K2] of two matrices; for K2 = 0 the first ones twice."""
    x1 = load_tile(x, rows, real, x_stride, 0, K, K1)
    y1 = load_tile(y, rows, real, y_stride, 0, K, K1)
    x2, y2 = x1, y1
    if K2 > 0:
        x2 = load_tile(x, rows, real, x_stride, K1, K, K2)
        y2 = load_tile(y, rows, real, y_stride, K1, K, K2)
    return x1, y1, x2, y2


@triton.jit
def store_tile(
    ptr: tl.tensor,
    rows: tl.tensor,
    real: tl.tensor,
    stride: tl.tensor,
    first: tl.tensor,
    tile: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Store `tile` ([rows, BLOCK]) where `load_tile` would read it, in the pointer's dtype."""
    columns = first + tl.arange(0, BLOCK)
    here = ptr + rows[:, None] * stride + columns[None, :]
    value = tile.to(ptr.dtype.element_ty)
    if first + BLOCK > WIDTH:
        tl.store(here, value, mask=real[:, None] & (columns < WIDTH)[None, :])
    else:
        tl.store(here, value, mask=real[:, None])
