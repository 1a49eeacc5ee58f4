"""Chooses the implementation of the fused element-wise functions around the attention."""

from torch import Tensor

from kernels.add_layernorm import reference as add_layernorm_reference
from kernels.choice import dtype_obstacle, use_triton
from kernels.config import have_triton
from kernels.dispatch import Implementation, check_implementation
from kernels.gated_relu2 import reference as gated_relu2_reference

if have_triton:
    from kernels.add_layernorm.op import MAX_WIDTH, add_layernorm_op
    from kernels.gated_relu2.op import gated_relu2_op
else:
    MAX_WIDTH = 0


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
    check_implementation(implementation)
    add_layernorm_reference.check_shapes(x, a, weight_D, bias_D, gate_D)
    obstacle = dtype_obstacle(x, a, weight_D, gate_D)
    if x.shape[-1] > MAX_WIDTH:
        obstacle = f"the kernel takes rows of up to {MAX_WIDTH}, not of {x.shape[-1]}"
    if use_triton(implementation, x, obstacle):
        y, z, _, _ = add_layernorm_op(x, a, weight_D, bias_D, gate_D, eps)
        return y, z
    return add_layernorm_reference.add_layernorm(x, a, weight_D, bias_D, gate_D, eps=eps)


def gated_relu2(u: Tensor, gate: Tensor | None = None, *, implementation: Implementation = "auto") -> Tensor:
    """Squared ReLU times a scalar gate; `kernels.gated_relu2.reference` has the contract.

    Returns:
        gate * relu(u)^2, shape and dtype of `u`.
    """
    check_implementation(implementation)
    gated_relu2_reference.check_gate(gate)
    if use_triton(implementation, u, dtype_obstacle(u, gate)):
        return gated_relu2_op(u, gate)
    return gated_relu2_reference.gated_relu2(u, gate)
