"""Products with a frozen matrix in a storage of its own: a gradient of the input alone, and nothing kept for it.

The matrix is not a saved tensor: it never changes, and recomputation under activation checkpointing, which runs until
it has every saved tensor again, need not run the last product for it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def frozen_product(
    name: str, product: Callable[..., Tensor], input_grad: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """Return `product` with its derivative, for eager and for compiled code.

    For compiled code both functions are operators that the compiler does not look into: it found that forward and
    backward want the same cast of a quantised matrix, and kept the cast matrix from the one to the other.

    Args:
        name: the operators are `flamingo::NAME_product` and `flamingo::NAME_input_grad`.
        product: x [..., I] and the tensors that hold the matrix, of which the first is [O, I], to [..., O].
        input_grad: the gradient of the product [..., O] and the same tensors, to that of x [..., I].
    """

    class Eager(torch.autograd.Function):
        """The product with its gradient."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, *matrix: Tensor) -> Tensor:
            """Return [..., O] of x [..., I]."""
            ctx.matrix = matrix
            return product(x, *matrix)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            """Return the gradient of x [..., I] from that of the product [..., O]."""
            return input_grad(grads[0], *ctx.matrix), *[None for _ in ctx.matrix]

    traced = torch.library.custom_op(f"flamingo::{name}_product", product, mutates_args=())
    traced_grad = torch.library.custom_op(f"flamingo::{name}_input_grad", input_grad, mutates_args=())
    traced.register_fake(lambda x, *matrix: x.new_empty(*x.shape[:-1], matrix[0].shape[0]))
    traced_grad.register_fake(lambda grad, *matrix: grad.new_empty(*grad.shape[:-1], matrix[0].shape[1]))

    def keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.matrix = inputs[1:]

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return traced_grad(grad, *ctx.matrix), *[None for _ in ctx.matrix]

    traced.register_autograd(backward, setup_context=keep)

    def run(x: Tensor, *matrix: Tensor) -> Tensor:
        result: Tensor = (traced if torch.compiler.is_compiling() else Eager.apply)(x, *matrix)
        return result

    return run
