"""Rows in fp8: the kernel's codes and scales are the reference's to the bit, and those are as near as e4m3 can be."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels import dispatch_fused
from kernels.row_fp8 import op, reference
from tests.kernels.interpreting import (
    TOLERANCE,
    Mutant,
    assert_mutant_is_caught,
    in_both_orders,
    rounding_to_fp8,
)

pytestmark = pytest.mark.modes("interpret", "cuda")

SHAPES = [(1, 1), (3, 16), (5, 300), (2, 512), (4, 1000), (2, 2100)]
"""Rows and width: less than a block, whole blocks, and blocks that are partly empty."""


@pytest.fixture(autouse=True)
def _rounding() -> Iterator[None]:
    with rounding_to_fp8():
        yield


def make(shape: tuple[int, int], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Rows whose magnitudes lie powers of ten apart, and a factor of both signs."""
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=gen) * 10.0 ** torch.arange(-2, shape[0] - 2)[:, None]
    return [x.to(device, dtype), torch.randn(shape[1], generator=gen).to(device)]


def run(x: Tensor, factor: Tensor | None, implementation: str = "triton") -> tuple[Tensor, Tensor]:
    """Codes as bytes, and scale."""
    codes, scale = dispatch_fused.quantise_rows(x, factor, implementation=implementation)
    assert codes.dtype == torch.float8_e4m3fn
    return codes.view(torch.uint8), scale


def assert_equals_the_reference(x: Tensor, factor: Tensor | None) -> None:
    got = in_both_orders(lambda: run(x, factor))
    for name, a, b in zip(("codes", "scale"), got, run(x, factor, "reference"), strict=True):
        assert a.shape == b.shape, name
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(shape, scaled, dtype, device):
    x, factor = make(shape, dtype, device)
    assert_equals_the_reference(x, factor if scaled else None)


@pytest.mark.parametrize("scaled", [True, False])
def test_no_code_is_further_than_half_a_step(scaled, device):
    x, factor = make((6, 700), torch.float32, device)
    exact = x.double() * factor.double() if scaled else x.double()
    codes, scale = dispatch_fused.quantise_rows(x, factor if scaled else None, implementation="triton")
    assert torch.equal(codes.float().abs().amax(1), torch.full((6,), reference.LARGEST, device=device))
    wanted = exact.abs() / scale  # in units of a code: three bits of mantissa, steps of 2^-9 at the lowest
    step = 2.0 ** (wanted.log2().floor().clamp_min(-6) - 3)
    assert ((codes.double().abs() - wanted).abs() <= step / 2 * (1 + 1e-5)).all()
    assert torch.equal(codes.double().sign().where(codes.double() != 0, exact.sign()), exact.sign())


def test_rows_of_zeros_and_of_the_smallest_numbers(device):
    x = torch.zeros(3, 40, device=device)
    x[1, 7], x[2, 3] = 1e-38, -torch.finfo(torch.float32).smallest_normal / 8
    assert_equals_the_reference(x, None)
    codes, scale = dispatch_fused.quantise_rows(x, implementation="triton")
    assert codes.float().abs().max() < 1e-4
    assert (scale > 0).all()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_what_is_not_finite_stays_so_and_in_its_row(value, implementation, device):
    x, _ = make((3, 40), torch.float32, device)
    x[1, 5] = value
    codes, scale = dispatch_fused.quantise_rows(x, implementation=implementation)
    product = (codes.float() * scale) @ torch.ones(40, device=device)
    assert product.isfinite().tolist() == [True, False, True]


def test_compiled_code_takes_the_reference(device):
    """Without an operator the compiler cannot call the kernel: it got memory that nobody had filled."""
    x, factor = make((4, 48), torch.bfloat16, device)
    compiled = torch.compile(dispatch_fused.quantise_rows, backend="eager", fullgraph=True)
    codes, scale = compiled(x, factor, implementation="triton")
    want_codes, want_scale = run(x, factor, "reference")
    assert torch.equal(codes.view(torch.uint8), want_codes)
    assert torch.equal(scale, want_scale)


def test_no_rows_and_columns_of_a_matrix(device):
    x, _ = make((4, 48), torch.bfloat16, device)
    assert [tuple(part.shape) for part in run(x[:0], None)] == [(0, 48), (0, 1)]
    assert_equals_the_reference(x.T, None)


MUTANTS = [
    Mutant("no factor", "        x *= tl.load(factor_ptr", "        tl.load(factor_ptr"),
    Mutant("largest, not largest magnitude", "tl.max(tl.abs(x), 0)", "tl.max(x, 0)"),
    Mutant("the codes of another row", "tl.store(codes_ptr + row * WIDTH", "tl.store(codes_ptr + 0 * WIDTH"),
    Mutant("all rows write one scale", "tl.store(scale_ptr + row,", "tl.store(scale_ptr,"),
    Mutant(
        "last columns dropped",
        "codes.to(codes_ptr.dtype.element_ty), mask=real)",
        "codes.to(codes_ptr.dtype.element_ty), mask=column < WIDTH // 16 * 16)",
    ),
    Mutant("scale upside down", "tl.div_rn(peak, LARGEST))", "tl.div_rn(LARGEST, peak))"),
]


def everything() -> None:
    """The check that every mutant has to fail."""
    assert_equals_the_reference(*make((4, 1000), torch.float32, "cpu"))


@pytest.mark.modes("interpret")
def test_the_mutants_check_passes_without_a_mutant():
    everything()


@pytest.mark.modes("interpret")  # planted faults may write anywhere
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught(mutant, monkeypatch, tmp_path):
    assert_mutant_is_caught(mutant, op, "kernel", everything, monkeypatch, tmp_path)


def test_what_the_kernel_does_not_take(device):
    with pytest.raises(ValueError, match=r"rows, \[N, I\]"):
        dispatch_fused.quantise_rows(torch.ones(3, device=device))
    with pytest.raises(ValueError, match=r"it must be \(4,\)"):
        dispatch_fused.quantise_rows(torch.ones(3, 4, device=device), torch.ones(3, device=device))
    wide = torch.ones(1, op.MAX_WIDTH + 1, device=device)
    with pytest.raises(ValueError, match=f"rows of 1 to {op.MAX_WIDTH}"):
        dispatch_fused.quantise_rows(wide, implementation="triton")
    codes, _ = dispatch_fused.quantise_rows(wide)
    assert (codes.float() == reference.LARGEST).all()
