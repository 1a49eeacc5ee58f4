"""How near a kernel has to come to a computation in fp64, and memory that shows what was never written."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""Largest ||got - exact|| / ||exact||. The interpreter cuts bits off where a GPU rounds to bf16, hence 1.2e-2."""


def relative(got: Tensor, exact: Tensor) -> float:
    """||got - exact|| / ||exact||; where the exact values are all 0, ||got||."""
    scale = exact.double().norm().item()
    return (got.double() - exact.double()).norm().item() / (scale or 1.0)


def assert_close(
    names: Sequence[str], got: Sequence[Tensor], exact: Sequence[Tensor], dtype: torch.dtype
) -> None:
    for name, a, b in zip(names, got, exact, strict=True):
        assert a.shape == b.shape, name
        assert torch.isfinite(a).all(), f"{name} is not finite: not all of it was written, or it overflowed"
        assert relative(a.cpu(), b.cpu()) < TOLERANCE[dtype], f"{name}: {relative(a.cpu(), b.cpu()):.2e}"


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill every new empty tensor with NaN, so that an element that no program writes is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(4).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
