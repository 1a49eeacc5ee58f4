"""The FFW of the new modules (paper section 2.1 and Table 4)."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flamingo_dist.models.linear import column_linear, fan_in_std, row_linear, sum_grad_over_tp
from kernels.dispatch import Implementation
from kernels.dispatch_fused import gated_relu2

Activation = Literal["sqrelu", "gelu", "relu", "silu_gated"]
"""Squared ReLU (the paper's), exact GELU, ReLU, or SwiGLU with a gate projection of its own."""


def check_activation(activation: str) -> None:
    """Raise `ValueError` unless `activation` names one."""
    if activation not in get_args(Activation):
        raise ValueError(
            f"activation={activation!r} is not known; choose one of {', '.join(get_args(Activation))}."
        )


class FeedForward(nn.Module):
    """Two bias-free linear layers with an activation between them; the hidden width is tensor-parallel."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: Activation,
        init_std: float | None = None,
        implementation: Implementation = "auto",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.implementation = implementation
        std_in = fan_in_std(width) if init_std is None else init_std
        std_out = fan_in_std(hidden) if init_std is None else init_std
        gated = activation == "silu_gated"
        self.gate = column_linear(width, hidden, std=std_in, dtype=dtype) if gated else None
        self.up = column_linear(width, hidden, std=std_in, dtype=dtype)
        self.down = row_linear(hidden, width, std=std_out, dtype=dtype)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Map x of shape [..., width] to the same shape, dtype of the parameters, times the gate.

        Args:
            x: [..., width] floating, dtype of the parameters.
            gate: factor of the result, 0-dim or [width], dtype of the parameters; None multiplies by nothing.
        """
        u, _ = self.up(x)
        if self.activation == "sqrelu" and (gate is None or gate.dim() == 0):
            # A scalar gate commutes with the projection that follows. Each rank multiplies its own hidden units
            # by it, so it has only their part of the gate's gradient.
            inner = None if gate is None else sum_grad_over_tp(gate)
            folded: Tensor = self.down(gated_relu2(u, inner, implementation=self.implementation))[0]
            return folded
        out: Tensor = self.down(self._activate(u, x))[0]
        return out if gate is None else out * gate

    def _activate(self, u: Tensor, x: Tensor) -> Tensor:
        """Return the hidden activations [..., hidden] from u [..., hidden] and the input x [..., width]."""
        if self.gate is not None:
            g, _ = self.gate(x)
            return F.silu(g) * u
        if self.activation == "sqrelu":
            return gated_relu2(u, implementation=self.implementation)
        return F.relu(u) if self.activation == "relu" else F.gelu(u)
