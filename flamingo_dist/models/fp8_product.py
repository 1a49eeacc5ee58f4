"""Products with a frozen fp8 matrix on fp8 matrix units: activations and their gradients are quantised by row.

y = x W^T with the codes and channel scales of `QuantisedWeight`: x becomes codes with a scale for each row, the matrix
units multiply codes and add up in fp32, both scales multiply the sum. The gradient of x is (dy * scale) codes(W): there
the sum runs over the channels, so the matrix' scales go into dy before it is quantised. Matrix units read both operands
along the sum, so the backward has a transposed copy of the codes: two bytes a value, as bf16 takes.

A frozen matrix has no gradient of its own, so this is all: of the three products of a trained layer the one that
fp8 suits least is not there.
"""

import torch
from torch import Tensor

from flamingo_dist.models.frozen_product import frozen_product
from kernels.dispatch_fused import quantise_rows

MULTIPLE = 16
"""What inputs and outputs of a matrix must be a multiple of: 128 bits of codes."""
FIRST_CAPABILITY = (8, 9)
"""The first compute capability with fp8 matrix units."""


def check_fp8_device(device: torch.device) -> None:
    """Raise `ValueError` where a GPU has no fp8 matrix units."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < FIRST_CAPABILITY:
        raise ValueError(
            f"model.lm.matrix_products='fp8' cannot run on {torch.cuda.get_device_name(device)}: it has no fp8 matrix "
            "units (Ada, Hopper and later GPUs have). Set model.lm.matrix_products='same'."
        )


def check_fp8_shape(outputs: int, inputs: int) -> None:
    """Raise `ValueError` unless matrix units take a matrix [outputs, inputs] of this rank."""
    if outputs % MULTIPLE or inputs % MULTIPLE:
        raise ValueError(
            f"a frozen matrix is [{outputs}, {inputs}] on this rank; model.lm.matrix_products='fp8' needs multiples of "
            f"{MULTIPLE}. Choose another tensor-parallel degree, or matrix_products='same'."
        )


def _product(x: Tensor, codes_OI: Tensor, codes_IO: Tensor, scale_O: Tensor) -> Tensor:
    return _multiplied(x, None, codes_OI, scale_O[None])


def _input_grad(grad: Tensor, codes_OI: Tensor, codes_IO: Tensor, scale_O: Tensor) -> Tensor:
    return _multiplied(grad, scale_O, codes_IO, scale_O.new_ones(1, len(codes_IO)))


def _multiplied(x: Tensor, factor_K: Tensor | None, codes_NK: Tensor, scale_1N: Tensor) -> Tensor:
    """Return (x * factor) times the matrix [N, K] of codes and scales, for x [..., K]: [..., N], dtype of x."""
    rows_MK = x.reshape(-1, x.shape[-1])
    if len(rows_MK) == 0:
        return x.new_zeros(*x.shape[:-1], len(codes_NK))
    codes_MK, scale_M1 = quantise_rows(rows_MK, factor_K)
    # On a GPU products with a scale for each row come out in bf16 alone. Fast accumulation keeps 14 bits of a partial
    # sum, far more than the operands' four leave certain.
    dtype = torch.bfloat16 if x.device.type == "cuda" else x.dtype
    product_MN = torch._scaled_mm(
        codes_MK, codes_NK.t(), scale_M1, scale_1N, out_dtype=dtype, use_fast_accum=True
    )
    return product_MN.to(x.dtype).view(*x.shape[:-1], len(codes_NK))


_run_product = frozen_product("fp8", _product, _input_grad)


def fp8_product(x: Tensor, codes_OI: Tensor, codes_IO: Tensor, scale_O: Tensor) -> Tensor:
    """Return the product of x with a frozen matrix; its gradient reaches x alone.

    Args:
        x: floating [..., I].
        codes_OI: float8_e4m3fn [O, I], contiguous.
        codes_IO: the same, transposed, [I, O], contiguous.
        scale_O: fp32 [O].

    Returns:
        [..., O] in the dtype of `x`.
    """
    return _run_product(x, codes_OI, codes_IO, scale_O)
