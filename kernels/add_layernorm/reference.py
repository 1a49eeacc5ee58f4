"""Residual addition and LayerNorm in plain PyTorch (paper figure 4: every branch starts from a LayerNorm)."""

import torch
from torch import Tensor
from torch.nn import functional as F


def add_layernorm(
    x: Tensor, a: Tensor, weight_D: Tensor, bias_D: Tensor, gate_D: Tensor | None = None, *, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Return y = x + gate * a, and z = LayerNorm(y) * weight + bias.

    The stream keeps its dtype, whatever that of the branch that is added: y has the dtype of `x`, z that of
    `weight_D`.

    Args:
        x: [..., D] residual stream, floating.
        a: [..., D] what a branch adds to it, shape of `x`, floating.
        weight_D: [D] scale of the LayerNorm.
        bias_D: [D] shift of the LayerNorm, dtype of the scale.
        gate_D: [D] factor of each channel of `a`, already squashed, dtype of `a`; None adds `a` as it is.
        eps: added to the variance.

    Returns:
        y [..., D] in the dtype of `x`, and z [..., D] in the dtype of `weight_D`.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_shapes(x, a, weight_D, bias_D, gate_D)
    update = a if gate_D is None else a * gate_D
    y = x + update.to(x.dtype)
    z = F.layer_norm(y.to(weight_D.dtype), weight_D.shape, weight_D, bias_D, eps)
    return y, z


def naive(
    x: Tensor, a: Tensor, weight_D: Tensor, bias_D: Tensor, gate_D: Tensor | None = None, *, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """`add_layernorm` written out from its definition, row by row; for tests.

    Args and results: as `add_layernorm`, both of shape [..., D].
    """
    y_rows, z_rows = [], []
    for x_D, a_D in zip(x.flatten(0, -2), a.flatten(0, -2), strict=True):
        y_D = x_D + (a_D if gate_D is None else gate_D * a_D)
        mean = y_D.sum() / y_D.numel()
        variance = ((y_D - mean) ** 2).sum() / y_D.numel()
        y_rows.append(y_D)
        z_rows.append((y_D - mean) / torch.sqrt(variance + eps) * weight_D + bias_D)
    return torch.stack(y_rows).view_as(x), torch.stack(z_rows).view_as(x)


def check_shapes(x: Tensor, a: Tensor, weight_D: Tensor, bias_D: Tensor, gate_D: Tensor | None) -> None:
    """Raise `ValueError` unless x and a are [..., D] of one shape and the vectors [D]."""
    if x.shape != a.shape or x.dim() < 1:
        raise ValueError(
            f"x is {tuple(x.shape)} and a is {tuple(a.shape)}; both must be [..., D] of one shape."
        )
    vectors = {"weight_D": weight_D, "bias_D": bias_D} | ({} if gate_D is None else {"gate_D": gate_D})
    for name, vector in vectors.items():
        if vector.shape != x.shape[-1:]:
            raise ValueError(
                f"{name} is {tuple(vector.shape)}; it must be [D] = {tuple(x.shape[-1:])}, the last axis of x."
            )
    if weight_D.dtype != bias_D.dtype:
        raise ValueError(f"weight_D is {weight_D.dtype} and bias_D {bias_D.dtype}; they must have one dtype.")
