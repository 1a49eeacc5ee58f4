"""The gated squared ReLU as torch operators (`flamingo::gated_relu2` and its backward) on the Triton kernels."""

from typing import Any

import torch
from torch import Tensor

from kernels.config import DTYPES
from kernels.gated_relu2 import kernel

BLOCK, WARPS = 4096, 8
"""Elements and warps of a program: sixteen elements a thread, two 128-bit accesses in bf16."""


def unsupported(u: Tensor) -> str | None:
    """Return why the kernels do not take `u` (any shape), None if they do."""
    return None if u.dtype in DTYPES else f"the kernel computes on fp32, fp16 and bf16, not on {u.dtype}"


@torch.library.custom_op("flamingo::gated_relu2", mutates_args=())
def gated_relu2_op(u: Tensor, gate: Tensor | None) -> Tensor:
    """Return gate * relu(u)^2; its backward keeps `u` and the gate alone.

    Args:
        u: any shape, fp32, fp16 or bf16.
        gate: 0-dim, floating, or None.

    Returns:
        shape and dtype of `u`, contiguous.
    """
    return launch_forward(u, gate)


@gated_relu2_op.register_fake
def _(u: Tensor, gate: Tensor | None) -> Tensor:
    return u.new_empty(u.shape)


@torch.library.custom_op("flamingo::gated_relu2_backward", mutates_args=())
def gated_relu2_backward_op(dh: Tensor, u: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of `flamingo::gated_relu2`.

    Args:
        dh: gradient of the result, shape of `u`.
        u: any shape.
        gate: 0-dim, or None.

    Returns:
        The gradient of `u`, in its shape and dtype, and that of the gate, fp32 0-dim (0 without a gate).
    """
    return launch_backward(dh, u, gate)


@gated_relu2_backward_op.register_fake
def _(dh: Tensor, u: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), u.new_empty((), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
    """Keep the inputs alone: the backward computes relu(u) again."""
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of `u` (any shape) and of the gate (0-dim)."""
    u, gate = ctx.saved_tensors
    du, dgate = gated_relu2_backward_op(dh, u, gate)
    return du, None if gate is None else dgate.to(gate.dtype)


gated_relu2_op.register_autograd(_backward, setup_context=_setup_context)


def launch_forward(u: Tensor, gate: Tensor | None) -> Tensor:
    """Launch the forward kernel.

    Args:
        u: any shape.
        gate: 0-dim, or None.

    Returns:
        shape and dtype of `u`.
    """
    u = u.contiguous()
    h = u.new_empty(u.shape)
    if u.numel() > 0:
        with torch.cuda.device_of(u):
            kernel.forward_kernel[(_blocks(u),)](
                u, _or(gate, u), h, u.numel(), HAS_GATE=gate is not None, BLOCK=BLOCK, num_warps=WARPS
            )
    return h


def launch_backward(dh: Tensor, u: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel and add up the gate's partial sums in a fixed order.

    Args:
        dh: shape of `u`.
        u: any shape.
        gate: 0-dim, or None.

    Returns:
        du in the shape and dtype of `u`, dgate fp32 0-dim.
    """
    u, dh = u.contiguous(), dh.contiguous()
    du = u.new_empty(u.shape)
    partials = u.new_empty(_blocks(u) if gate is not None else 0, dtype=torch.float32)
    if u.numel() > 0:
        with torch.cuda.device_of(u):
            kernel.backward_kernel[(_blocks(u),)](
                u, _or(gate, u), dh, du, partials, u.numel(),
                HAS_GATE=gate is not None, BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
    return du, partials.sum()


def _blocks(u: Tensor) -> int:
    """Return the number of programs that cover `u` (any shape)."""
    return -(-u.numel() // BLOCK)


def _or(gate: Tensor | None, placeholder: Tensor) -> Tensor:
    """Return the gate (0-dim), or a tensor that the kernel never reads."""
    return placeholder if gate is None else gate
