"""Triton kernels of what follows a frozen convolution: one pass each over tiles of pixels by channels."""

import triton
import triton.language as tl


@triton.jit
def _gelu(x: tl.tensor) -> tl.tensor:
    """GELU's tanh form: 0.5 (1 + tanh(z)) is sigmoid(2 z); 1.5957691 is 2 sqrt(2 / pi)."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def bias_gelu_kernel(
    x_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    pixels: tl.tensor,
    channels: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Compute x = gelu(x + bias) in place. Grid (cdiv(pixels, ROWS) * cdiv(channels, COLUMNS),).

    Pointers:
        x_ptr: [pixels, channels], contiguous; the pixels of all images.
        bias_ptr: [channels], any floating dtype.
    """
    tiles = tl.cdiv(channels, COLUMNS)
    program = tl.program_id(0)
    column = program % tiles * COLUMNS + tl.arange(0, COLUMNS)
    row = (program // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = (row < pixels)[:, None] & (column < channels)[None, :]
    at = row[:, None] * channels + column[None, :]
    bias = tl.load(bias_ptr + column, mask=column < channels, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask=real, other=0.0).to(tl.float32) + bias[None, :]
    tl.store(x_ptr + at, _gelu(x).to(x_ptr.dtype.element_ty), mask=real)


@triton.jit
def gated_residual_kernel(
    residual_ptr: tl.tensor,
    residual_bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    activated_ptr: tl.tensor,
    pixels: tl.tensor,
    channels: tl.tensor,
    HAS_RESIDUAL_BIAS: tl.constexpr,
    ACTIVATE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Compute y = (residual + residual_bias) + (y + bias) * gate in place, and activated = gelu(y).

    Grid (images * cdiv(pixels, ROWS) * cdiv(channels, COLUMNS),). Pointers:
        residual_ptr, y_ptr, activated_ptr: [images, pixels, channels], contiguous, one dtype; the last unused
            without ACTIVATE.
        bias_ptr, residual_bias_ptr: [channels], any floating dtype; the last unused without HAS_RESIDUAL_BIAS.
        gate_ptr: [images, channels], contiguous, any floating dtype.
    """
    tiles, blocks = tl.cdiv(channels, COLUMNS), tl.cdiv(pixels, ROWS)
    program = tl.program_id(0)
    column = program % tiles * COLUMNS + tl.arange(0, COLUMNS)
    block = program // tiles
    image = (block // blocks).to(tl.int64)
    row = block % blocks * ROWS + tl.arange(0, ROWS)
    in_width = column < channels
    real = (row < pixels)[:, None] & in_width[None, :]
    at = (image * pixels + row)[:, None] * channels + column[None, :]
    bias = tl.load(bias_ptr + column, mask=in_width, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + image * channels + column, mask=in_width, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + at, mask=real, other=0.0).to(tl.float32)
    kept = tl.load(residual_ptr + at, mask=real, other=0.0).to(tl.float32)
    if HAS_RESIDUAL_BIAS:
        kept += tl.load(residual_bias_ptr + column, mask=in_width, other=0.0).to(tl.float32)[None, :]
    out = kept + (y + bias[None, :]) * gate[None, :]
    tl.store(y_ptr + at, out.to(y_ptr.dtype.element_ty), mask=real)
    if ACTIVATE:
        tl.store(activated_ptr + at, _gelu(out).to(activated_ptr.dtype.element_ty), mask=real)
