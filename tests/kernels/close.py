"""Comparison of a kernel's results with fp64 ones, by name."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.kernels.interpreting import TOLERANCE, relative


def assert_close(
    names: Sequence[str], got: Sequence[Tensor], exact: Sequence[Tensor], dtype: torch.dtype
) -> None:
    for name, a, b in zip(names, got, exact, strict=True):
        assert a.shape == b.shape, name
        error = relative(a, b)
        assert error < TOLERANCE[dtype], f"{name}: relative error {error:.2e}"
