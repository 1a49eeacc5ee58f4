"""Chooses the implementation of the fused element-wise functions around the attention."""

from torch import Tensor

from kernels.add_layernorm import reference as add_layernorm_reference
from kernels.config import have_triton
from kernels.dispatch import Implementation, launches
from kernels.gated_relu2 import reference as gated_relu2_reference

if have_triton:
    from kernels.add_layernorm import op as add_layernorm_op
    from kernels.gated_relu2 import op as gated_relu2_op


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
