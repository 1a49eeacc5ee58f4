"""Launch of the kernel that quantises rows to fp8.

No operator of torch's: what multiplies the rows has the derivative (`flamingo_dist.models.fp8_product`), and a frozen
block launches it a dozen times in a step, where an operator's way through the dispatcher costs more than the launch.
"""

import torch
from torch import Tensor

from kernels.config import DTYPES, architecture, power_of_two
from kernels.row_fp8 import kernel
from kernels.row_fp8.reference import LARGEST, SMALLEST

MAX_WIDTH = 32768
"""Widest row: it lives in the registers of one program."""
FIRST_ARCH = 89
"""The first architecture that converts to e4m3 (and multiplies it)."""


def unsupported(x_NI: Tensor) -> str | None:
    """Return why the kernel does not take rows like x [N, I], None if it does."""
    if x_NI.dtype not in DTYPES:
        return f"the kernel reads fp32, fp16 and bf16, not {x_NI.dtype}"
    if not 1 <= x_NI.shape[1] <= MAX_WIDTH:
        return f"the kernel takes rows of 1 to {MAX_WIDTH}, not of {x_NI.shape[1]}"
    if x_NI.is_cuda and architecture(x_NI.device) < FIRST_ARCH:
        return f"sm_{architecture(x_NI.device)} has no fp8 (sm_{FIRST_ARCH} and later have)"
    return None


def launch(x_NI: Tensor, factor_I: Tensor | None) -> tuple[Tensor, Tensor]:
    """Launch the kernel.

    Args:
        x_NI: [N, I].
        factor_I: [I], or None.

    Returns:
        codes float8_e4m3fn [N, I] and scale fp32 [N, 1].
    """
    x_NI = x_NI.contiguous()
    rows, width = x_NI.shape
    codes_NI, scale_N1 = empty(x_NI)
    if rows > 0:
        block = power_of_two(width)
        factor_I = x_NI if factor_I is None else factor_I.contiguous()
        with torch.cuda.device_of(x_NI):
            kernel.quantise_rows_kernel[(rows,)](
                x_NI, factor_I, codes_NI, scale_N1, LARGEST, SMALLEST,
                HAS_FACTOR=factor_I is not x_NI, WIDTH=width, BLOCK=block,
                num_warps=min(32, max(1, block // 512)),
            )  # fmt: skip
    return codes_NI, scale_N1


def empty(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `launch` writes for x [N, I]: codes [N, I] and scale [N, 1], not filled."""
    codes_NI = x_NI.new_empty(x_NI.shape, dtype=torch.float8_e4m3fn)
    return codes_NI, x_NI.new_empty((len(x_NI), 1), dtype=torch.float32)
