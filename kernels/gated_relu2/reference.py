"""Squared ReLU times a scalar gate in plain PyTorch (paper table 4: the FFW's activation)."""

import torch
from torch import Tensor
from torch.nn import functional as F


def gated_relu2(u: Tensor, gate: Tensor | None = None) -> Tensor:
    """Return gate * relu(u)^2.

    Args:
        u: [..., any shape] hidden activations of an FFW, floating.
        gate: 0-dim tensor, already squashed (tanh), dtype of `u`; None multiplies by nothing.

    Returns:
        shape and dtype of `u`.

    Raises:
        ValueError: the gate is not 0-dim.
    """
    check_gate(gate)
    h = F.relu(u).square()
    return h if gate is None else h * gate


def naive(u: Tensor, gate: Tensor | None = None) -> Tensor:
    """`gated_relu2` from its definition: u^2 where u is positive, else 0; for tests.

    Args and result: as `gated_relu2`, any shape.
    """
    h = torch.where(u > 0, u * u, 0.0)
    return h if gate is None else gate * h


def check_gate(gate: Tensor | None) -> None:
    """Raise `ValueError` unless `gate` is None or has no axis (shape [])."""
    if gate is not None and gate.dim() != 0:
        raise ValueError(
            f"gate is {tuple(gate.shape)}; pass a 0-dim tensor, or None and apply a vector gate after the "
            "output projection (it does not commute with it)."
        )
