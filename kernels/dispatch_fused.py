"""Chooses the implementation of the fused element-wise functions around attention and convolutions."""

import torch
from torch import Tensor

from kernels.add_layernorm import reference as add_layernorm_reference
from kernels.config import have_triton
from kernels.conv_epilogue import reference as conv_epilogue_reference
from kernels.dispatch import Implementation, launches
from kernels.gated_relu2 import reference as gated_relu2_reference
from kernels.row_fp8 import reference as row_fp8_reference

if have_triton:
    from kernels.add_layernorm import op as add_layernorm_op
    from kernels.conv_epilogue import op as conv_epilogue_op
    from kernels.gated_relu2 import op as gated_relu2_op
    from kernels.row_fp8 import op as row_fp8_op


def add_layernorm(
    x: Tensor,
    a: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    gate_D: Tensor | None = None,
    *,
    eps: float = 1e-5,
    implementation: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """Residual addition and LayerNorm; `kernels.add_layernorm.reference` has the contract.

    Returns:
        y = x + gate * a, [..., D] in the dtype of `x`, and LayerNorm(y), [..., D] in the dtype of `weight_D`.
    """
    add_layernorm_reference.check_shapes(x, a, weight_D, bias_D, gate_D)
    reason = add_layernorm_op.unsupported(x, a, weight_D, gate_D) if have_triton else None
    if launches(implementation, "add_layernorm", x, reason):
        y, z, _, _ = add_layernorm_op.add_layernorm_op(x, a, weight_D, bias_D, gate_D, eps)
        return y, z
    return add_layernorm_reference.add_layernorm(x, a, weight_D, bias_D, gate_D, eps=eps)


def gated_relu2(u: Tensor, gate: Tensor | None = None, *, implementation: Implementation = "auto") -> Tensor:
    """Squared ReLU times a scalar gate; `kernels.gated_relu2.reference` has the contract.

    Returns:
        gate * relu(u)^2, shape and dtype of `u`.
    """
    gated_relu2_reference.check_gate(gate)
    reason = gated_relu2_op.unsupported(u) if have_triton else None
    if launches(implementation, "gated_relu2", u, reason):
        return gated_relu2_op.gated_relu2_op(u, gate)
    return gated_relu2_reference.gated_relu2(u, gate)


def bias_gelu_(x_NCHW: Tensor, bias_C: Tensor, *, implementation: Implementation = "auto") -> Tensor:
    """GELU of a convolution with its bias, in place; `kernels.conv_epilogue.reference` has the contract.

    Returns:
        `x_NCHW`, [N, C, H, W], which now holds gelu(x + bias).
    """
    conv_epilogue_reference.check_shapes(x_NCHW, bias_C)
    reason = conv_epilogue_op.unsupported(x_NCHW) if have_triton else None
    if launches(implementation, "bias_gelu_", x_NCHW, reason) and _is_eager(x_NCHW):
        conv_epilogue_op.launch_bias_gelu(x_NCHW, bias_C)
        return x_NCHW
    return conv_epilogue_reference.bias_gelu_(x_NCHW, bias_C)


def gated_residual_(
    residual_NCHW: Tensor,
    residual_bias_C: Tensor | None,
    y_NCHW: Tensor,
    bias_C: Tensor,
    gate_NC: Tensor,
    *,
    activate: bool,
    implementation: Implementation = "auto",
) -> tuple[Tensor, Tensor | None]:
    """End of a residual block, and GELU for the next; `kernels.conv_epilogue.reference` has the contract.

    Returns:
        out = (residual + residual_bias) + (y + bias) * gate, [N, C, H, W], and gelu(out), or None without `activate`.
    """
    conv_epilogue_reference.check_shapes(y_NCHW, bias_C, residual_NCHW, residual_bias_C, gate_NC)
    given = (residual_NCHW, residual_bias_C, y_NCHW, bias_C, gate_NC)
    reason = conv_epilogue_op.unsupported(y_NCHW, residual_NCHW) if have_triton else None
    if launches(implementation, "gated_residual_", y_NCHW, reason) and _is_eager(y_NCHW):
        return y_NCHW, conv_epilogue_op.launch_gated_residual(*given, activate)
    return conv_epilogue_reference.gated_residual_(*given, activate=activate)


def quantise_rows(
    x_NI: Tensor, factor_I: Tensor | None = None, *, implementation: Implementation = "auto"
) -> tuple[Tensor, Tensor]:
    """Rows in fp8 with a scale each; `kernels.row_fp8.reference` has the contract. No derivative.

    Returns:
        codes float8_e4m3fn [N, I] and scale fp32 [N, 1].
    """
    row_fp8_reference.check_shapes(x_NI, factor_I)
    reason = row_fp8_op.unsupported(x_NI) if have_triton else None
    if launches(implementation, "quantise_rows", x_NI, reason) and not torch.compiler.is_compiling():
        # Of a fake tensor shapes alone are asked; the reference's temporaries would count as the kernel's.
        return row_fp8_op.launch(x_NI, factor_I) if type(x_NI) is Tensor else row_fp8_op.empty(x_NI)
    return row_fp8_reference.quantise_rows(x_NI, factor_I)


def _is_eager(x_NCHW: Tensor) -> bool:
    """Return whether `x_NCHW` [N, C, H, W] is there to be computed on.

    torch.compile fuses what follows a convolution by itself; of a fake tensor shapes alone are asked, which the
    reference has too.
    """
    return not torch.compiler.is_compiling() and type(x_NCHW) is Tensor
