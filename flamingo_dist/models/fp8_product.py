"""Products with a frozen fp8 matrix on fp8 matrix units: activations and their gradients are quantised by row.

y = x W^T with the codes and channel scales of `QuantisedWeight`: x becomes codes with a scale for each row, the matrix
units multiply codes and add up in fp32, both scales multiply the sum. The gradient of x is (dy * scale) codes(W): there
the sum runs over the channels, so the matrix' scales go into dy before it is quantised. Matrix units read both operands
along the sum, so the backward has a transposed copy of the codes: two bytes a value, as bf16 takes.

A frozen matrix has no gradient of its own, so this is all: of the three products of a trained layer the one that
fp8 suits least is not there.
"""

from typing import Any

import torch
from torch import Tensor

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
    run = _traced_product if torch.compiler.is_compiling() else _Product.apply
    product: Tensor = run(x, codes_OI, codes_IO, scale_O)
    return product


class _Product(torch.autograd.Function):
    """The eager product. Nothing is a saved tensor, as in `quantised.py`, so that recomputation stops early."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes_OI: Tensor, codes_IO: Tensor, scale_O: Tensor) -> Tensor:
        """Return [..., O] of x [..., I]."""
        ctx.codes_IO, ctx.scale_O = codes_IO, scale_O
        return _product(x, codes_OI, codes_IO, scale_O)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the gradient of x [..., I] from that of the product [..., O]."""
        return _input_grad(grads[0], ctx.codes_IO, ctx.scale_O), None, None, None


def _product(x: Tensor, codes_OI: Tensor, codes_IO: Tensor, scale_O: Tensor) -> Tensor:
    return _multiplied(x, None, codes_OI, scale_O[None])


def _input_grad(grad: Tensor, codes_IO: Tensor, scale_O: Tensor) -> Tensor:
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


# For compiled code both are operators that the compiler does not look into, as the products of `quantised.py`.
_traced_product = torch.library.custom_op("flamingo::fp8_product", _product, mutates_args=())
_traced_input_grad = torch.library.custom_op("flamingo::fp8_input_grad", _input_grad, mutates_args=())


@_traced_product.register_fake
def _(x: Tensor, codes_OI: Tensor, codes_IO: Tensor, scale_O: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes_OI.shape[0])


@_traced_input_grad.register_fake
def _(grad: Tensor, codes_IO: Tensor, scale_O: Tensor) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], codes_IO.shape[0])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor], output: Tensor) -> None:
    _, _, ctx.codes_IO, ctx.scale_O = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return _traced_input_grad(grad, ctx.codes_IO, ctx.scale_O), None, None, None


_traced_product.register_autograd(_backward, setup_context=_keep)
