"""The FFW of the new modules (paper section 2.1 and Table 4)."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flamingo_dist.models.linear import column_linear, fan_in_std, row_linear

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
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.activation = activation
        std_in = fan_in_std(width) if init_std is None else init_std
        std_out = fan_in_std(hidden) if init_std is None else init_std
        gated = activation == "silu_gated"
        self.gate = column_linear(width, hidden, std=std_in, dtype=dtype) if gated else None
        self.up = column_linear(width, hidden, std=std_in, dtype=dtype)
        self.down = row_linear(hidden, width, std=std_out, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map x of shape [..., width] to the same shape, dtype of the parameters."""
        u, _ = self.up(x)
        if self.gate is not None:
            g, _ = self.gate(x)
            h = F.silu(g) * u
        elif self.activation == "sqrelu":
            h = F.relu(u).square()
        elif self.activation == "relu":
            h = F.relu(u)
        else:
            h = F.gelu(u)
        out: Tensor = self.down(h)[0]
        return out
