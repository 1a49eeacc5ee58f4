"""Rows in fp8 (e4m3), each scaled to its own largest magnitude, in plain PyTorch."""

import torch
from torch import Tensor

LARGEST = 448.0
"""Largest finite value of e4m3: the code of a row's largest magnitude."""
SMALLEST = 1e-30
"""Magnitude that a row's largest is taken for at least, so that a row of zeros has a scale; far above what overflows a
reciprocal, and below any gradient."""


def quantise_rows(x_NI: Tensor, factor_I: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantise the rows of x * factor: codes * scale is nearly it.

    A row with an infinity or a NaN has a NaN among its codes or in its scale, so that products with it are NaN.

    Args:
        x_NI: floating [N, I].
        factor_I: floating [I], multiplies the columns first; None for ones.

    Returns:
        codes float8_e4m3fn [N, I], contiguous, and scale fp32 [N, 1]: a row's largest magnitude over 448.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_shapes(x_NI, factor_I)
    scaled_NI = x_NI.float() if factor_I is None else x_NI.float() * factor_I.float()
    if x_NI.shape[1] == 0:
        peak_N1 = scaled_NI.new_full((len(x_NI), 1), SMALLEST)
    else:
        peak_N1 = scaled_NI.abs().amax(1, keepdim=True).clamp_min(SMALLEST)
    # By a tensor: torch divides by a number through its reciprocal, which rounds twice.
    largest_N1 = torch.full_like(peak_N1, LARGEST)
    codes_NI = (scaled_NI * (largest_N1 / peak_N1)).to(torch.float8_e4m3fn)
    return codes_NI.contiguous(), peak_N1 / largest_N1


def check_shapes(x_NI: Tensor, factor_I: Tensor | None) -> None:
    """Raise `ValueError` unless x is [N, I] and the factor [I] or None."""
    if x_NI.dim() != 2:
        raise ValueError(f"x is {tuple(x_NI.shape)}; pass rows, [N, I].")
    if factor_I is not None and factor_I.shape != x_NI.shape[1:]:
        raise ValueError(f"factor is {tuple(factor_I.shape)}; it must be {tuple(x_NI.shape[1:])}.")
