"""Launches of the kernels that follow a frozen convolution.

They are no operators of torch's: without a derivative none is needed, and an encoder launches hundreds in a few tens of
milliseconds, where an operator's way through the dispatcher would cost more than the launch.
"""

import torch
from torch import Tensor

from kernels.config import DTYPES
from kernels.conv_epilogue import kernel

ELEMENTS, WARPS = 4096, 8
"""Elements and warps of a program: sixteen elements a thread, two 128-bit accesses to each tensor in bf16."""
COLUMNS = 128
"""Channels of a tile at most. It divides the widths of the published NFNets from 128 on; those below divide it."""


def unsupported(*grids: Tensor) -> str | None:
    """Return why the kernels do not take these grids ([N, C, H, W] each), None if they do."""
    first = grids[0]
    if first.dtype not in DTYPES:
        return f"the kernel computes on fp32, fp16 and bf16, not on {first.dtype}"
    if any(x.dtype != first.dtype or x.device != first.device for x in grids):
        return "its grids must share dtype and device"
    if not all(x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) for x in grids):
        return "its grids must lie channels-last in memory, without gaps"
    if torch.is_grad_enabled() and any(x.requires_grad for x in grids):
        return "it has no derivative"
    return None


def launch_bias_gelu(x_NCHW: Tensor, bias_C: Tensor) -> None:
    """Overwrite x with gelu(x + bias), in its tanh form.

    Args:
        x_NCHW: [N, C, H, W] channels-last, overwritten.
        bias_C: [C].
    """
    _assert_layout(x_NCHW)
    if x_NCHW.numel() == 0:
        return
    images, channels, height, width = x_NCHW.shape
    rows, columns = _tile(channels)
    pixels = images * height * width
    grid = (-(-pixels // rows) * -(-channels // columns),)
    with torch.cuda.device_of(x_NCHW):
        kernel.bias_gelu_kernel[grid](
            x_NCHW, bias_C.contiguous(), pixels, channels, ROWS=rows, COLUMNS=columns, num_warps=WARPS
        )


def launch_gated_residual(
    residual_NCHW: Tensor,
    residual_bias_C: Tensor | None,
    y_NCHW: Tensor,
    bias_C: Tensor,
    gate_NC: Tensor,
    activate: bool,
) -> Tensor | None:
    """Overwrite y with out = (residual + residual_bias) + (y + bias) * gate.

    Args:
        residual_NCHW: [N, C, H, W] channels-last.
        residual_bias_C: [C], or None.
        y_NCHW: [N, C, H, W] channels-last, overwritten.
        bias_C: [C].
        gate_NC: [N, C].
        activate: whether gelu(out) is wanted.

    Returns:
        gelu(out), [N, C, H, W] channels-last, or None.
    """
    _assert_layout(residual_NCHW, y_NCHW)
    activated = torch.empty_like(y_NCHW) if activate else None
    if y_NCHW.numel() == 0:
        return activated
    images, channels, height, width = y_NCHW.shape
    rows, columns = _tile(channels)
    pixels = height * width
    grid = (images * -(-pixels // rows) * -(-channels // columns),)
    second = bias_C if residual_bias_C is None else residual_bias_C
    with torch.cuda.device_of(y_NCHW):
        kernel.gated_residual_kernel[grid](
            residual_NCHW, second.contiguous(), y_NCHW, bias_C.contiguous(), gate_NC.contiguous(),
            y_NCHW if activated is None else activated, pixels, channels,
            HAS_RESIDUAL_BIAS=residual_bias_C is not None, ACTIVATE=activate,
            ROWS=rows, COLUMNS=columns, num_warps=WARPS,
        )  # fmt: skip
    return activated


def _assert_layout(*grids: Tensor) -> None:
    """Stop before a kernel reads grids [N, C, H, W] in the wrong order."""
    for x in grids:
        assert x.is_contiguous(memory_format=torch.channels_last), f"strides {x.stride()} of {tuple(x.shape)}"


def _tile(channels: int) -> tuple[int, int]:
    """Return a tile's pixels and channels."""
    columns = min(COLUMNS, 1 << (channels - 1).bit_length())
    return ELEMENTS // columns, columns
