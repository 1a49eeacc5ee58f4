"""Triton kernel that quantises rows to fp8: one program a row, which it reads once."""

import triton
import triton.language as tl


@triton.jit
def quantise_rows_kernel(
    x_ptr: tl.tensor,
    factor_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Compute scale = max |x * factor| / LARGEST of a row and its codes x * factor / scale. Grid (rows,).

    Pointers:
        x_ptr: [rows, WIDTH], contiguous.
        factor_ptr: [WIDTH], any floating dtype; unused without HAS_FACTOR.
        codes_ptr: float8_e4m3fn [rows, WIDTH], contiguous.
        scale_ptr: fp32 [rows].
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    real = column < WIDTH
    x = tl.load(x_ptr + row * WIDTH + column, mask=real, other=0.0).to(tl.float32)
    if HAS_FACTOR:
        x *= tl.load(factor_ptr + column, mask=real, other=0.0).to(tl.float32)
    peak = tl.maximum(tl.max(tl.abs(x), 0), SMALLEST)
    # Correctly rounded divisions: codes and scales are the reference's to the bit.
    codes = x * tl.div_rn(LARGEST, peak)
    tl.store(codes_ptr + row * WIDTH + column, codes.to(codes_ptr.dtype.element_ty), mask=real)
    tl.store(scale_ptr + row, tl.div_rn(peak, LARGEST))
