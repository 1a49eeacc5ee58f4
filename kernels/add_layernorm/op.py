"""Residual addition and LayerNorm as torch operators (`flamingo::add_layernorm` and its backward)."""

from typing import Any

import torch
from torch import Tensor

from kernels.add_layernorm import kernel
from kernels.config import DTYPES, FILL_PROGRAMS, power_of_two

MAX_WIDTH = 8192
"""Widest stream: a row lives in the registers of one program."""

MAX_GATED_WIDTH = 4096
"""Widest stream with a gate, whose sums are a third row: at 8192 the backward spills, and in fp32 overfills sm_80."""


def unsupported(x: Tensor, a: Tensor, weight_D: Tensor, gate_D: Tensor | None) -> str | None:
    """Return why the kernels do not take x and a [..., D], a weight and a gate [D] like these, None if they do."""
    if not {x.dtype, a.dtype, weight_D.dtype} <= set(DTYPES):
        return f"the kernel computes on fp32, fp16 and bf16, not on {x.dtype}, {a.dtype} and {weight_D.dtype}"
    widest, rows = (MAX_WIDTH, "rows") if gate_D is None else (MAX_GATED_WIDTH, "gated rows")
    if not 1 <= x.shape[-1] <= widest:
        return f"the kernel takes {rows} of 1 to {widest}, not of {x.shape[-1]}"
    return None


@torch.library.custom_op("flamingo::add_layernorm", mutates_args=())
def add_layernorm_op(
    x: Tensor, a: Tensor, weight_D: Tensor, bias_D: Tensor, gate_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y = x + gate * a, z = LayerNorm(y), and the rows' statistics.

    Args:
        x: [..., D] fp32, fp16 or bf16.
        a: [..., D], shape of `x`, dtype of its own.
        weight_D: [D], dtype of its own.
        bias_D: [D], dtype of `weight_D`.
        gate_D: [D], or None.
        eps: added to the variance.

    Returns:
        y [..., D] in the dtype of `x`, z [..., D] in that of `weight_D`, and mean and 1 / sqrt(variance + eps),
        fp32 [rows].
    """
    return launch_forward(x, a, weight_D, bias_D, gate_D, eps)


@add_layernorm_op.register_fake
def _(
    x: Tensor, a: Tensor, weight_D: Tensor, bias_D: Tensor, gate_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=weight_D.dtype), mean, rstd


@torch.library.custom_op("flamingo::add_layernorm_backward", mutates_args=())
def add_layernorm_backward_op(
    dy: Tensor,
    dz: Tensor,
    y: Tensor,
    a: Tensor,
    weight_D: Tensor,
    gate_D: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `flamingo::add_layernorm`.

    Args:
        dy: [..., D] gradient of y.
        dz: [..., D] gradient of z.
        y: [..., D] the forward's first result.
        a: [..., D] what was added; read where there is a gate.
        weight_D: [D].
        gate_D: [D], or None.
        mean: fp32 [rows].
        rstd: fp32 [rows].

    Returns:
        The gradient of x [..., D]; that of a [..., D], empty where the gradient of x is its too (no gate, one
        dtype); and fp32 [2 or 3, D], those of the weight, the bias and the gate.
    """
    return launch_backward(dy, dz, y, a, weight_D, gate_D, mean, rstd)


@add_layernorm_backward_op.register_fake
def _(
    dy: Tensor,
    dz: Tensor,
    y: Tensor,
    a: Tensor,
    weight_D: Tensor,
    gate_D: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    da = a.new_empty(a.shape if _separate(y, a, gate_D) else (0,))
    vectors = y.new_empty((2 if gate_D is None else 3, y.shape[-1]), dtype=torch.float32)
    return y.new_empty(y.shape), da, vectors


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep y and the statistics; of `a` only where a gate's gradient needs it, else an empty tensor of its dtype."""
    _, a, weight_D, _, gate_D, _ = inputs
    y, _, mean, rstd = output
    kept = a if gate_D is not None else a.new_empty(0)
    ctx.save_for_backward(y, kept, weight_D, gate_D, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _backward(ctx: Any, dy: Tensor, dz: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """Return a gradient for each input of `flamingo::add_layernorm`."""
    y, a, weight_D, gate_D, mean, rstd = ctx.saved_tensors
    if gate_D is None and a.dtype != y.dtype:
        a = a.new_empty(()).expand(y.shape)  # its shape and dtype count, never its values
    dx, da, vectors = add_layernorm_backward_op(dy, dz, y, a, weight_D, gate_D, mean, rstd)
    if not _separate(y, a, gate_D):
        da = dx
    dweight, dbias = (vectors[i].to(weight_D.dtype) for i in range(2))
    dgate = None if gate_D is None else vectors[2].to(gate_D.dtype)
    return dx, da, dweight, dbias, dgate, None


add_layernorm_op.register_autograd(_backward, setup_context=_setup_context)


def launch_forward(
    x: Tensor, a: Tensor, weight_D: Tensor, bias_D: Tensor, gate_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward kernel.

    Args and results: as `add_layernorm_op`: shape [..., D] twice and fp32 [rows] twice.
    """
    width = x.shape[-1]
    rows = x.numel() // width
    x, a = x.contiguous(), a.contiguous()
    y, z = x.new_empty(x.shape), x.new_empty(x.shape, dtype=weight_D.dtype)
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    if rows > 0:
        vectors, constants = _common(weight_D, gate_D)
        with torch.cuda.device_of(x):
            kernel.forward_kernel[(rows,)](
                x, a, vectors[0], bias_D.contiguous(), vectors[1], y, z, mean, rstd, eps, **constants
            )
    return y, z, mean, rstd


def launch_backward(
    dy: Tensor,
    dz: Tensor,
    y: Tensor,
    a: Tensor,
    weight_D: Tensor,
    gate_D: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward kernel and add up the programs' sums for the vectors in a fixed order.

    Args and results: as `add_layernorm_backward_op`: shape [..., D] twice and fp32 [2 or 3, D].
    """
    width = y.shape[-1]
    rows = y.numel() // width
    vectors, constants = _common(weight_D, gate_D)
    programs = programs_for(rows, constants["num_warps"])
    separate = _separate(y, a, gate_D)
    dx = y.new_empty(y.shape)
    da = a.new_empty(a.shape if separate else (0,))
    partials = y.new_empty((2 if gate_D is None else 3, programs, width), dtype=torch.float32)
    with torch.cuda.device_of(y):
        kernel.backward_kernel[(programs,)](
            dy.contiguous(), dz.contiguous(), y, y if gate_D is None else a.contiguous(), *vectors, mean, rstd,
            dx, da if separate else dx, partials, rows, -(-rows // programs),
            SEPARATE=separate, STAGES=2, **constants,
        )  # fmt: skip
    return dx, da, partials.sum(1)


def programs_for(rows: int, warps: int) -> int:
    """Return how many programs share the rows of the backward: sixteen warps on every processor.

    A function of the shape alone, because the order of the vectors' sums depends on it.

    Args:
        rows: number of rows.
        warps: warps of a program.
    """
    return max(1, min(rows, FILL_PROGRAMS // 2 * (16 // warps)))


def _separate(y: Tensor, a: Tensor, gate_D: Tensor | None) -> bool:
    """Return whether the gradient of `a` ([..., D]) is not that of the stream `y` ([..., D])."""
    return gate_D is not None or a.dtype != y.dtype


def _common(weight_D: Tensor, gate_D: Tensor | None) -> tuple[tuple[Tensor, Tensor], dict[str, int]]:
    """Return what both kernels take for a weight [D] and a gate [D] or None.

    Weight and gate, contiguous, the weight, never read, in place of no gate; and the compile-time arguments: the
    power of two that holds a row, and the warps that work on it, 16 elements a thread.
    """
    width = weight_D.shape[0]
    block = power_of_two(width)
    constants = {
        "D": width,
        "BLOCK_D": block,
        "HAS_GATE": gate_D is not None,
        "num_warps": min(16, max(1, block // 512)),
    }
    weight_D = weight_D.contiguous()
    return (weight_D, weight_D if gate_D is None else gate_D.contiguous()), constants
