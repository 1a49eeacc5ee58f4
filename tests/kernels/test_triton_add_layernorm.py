"""The residual LayerNorm's kernel against the fp64 reference: both results and all gradients."""

import pytest
import torch
from torch import Tensor

from kernels import dispatch_fused
from kernels.add_layernorm import op, reference
from kernels.add_layernorm.op import MAX_GATED_WIDTH, MAX_WIDTH
from tests.kernels.close import assert_close
from tests.kernels.interpreting import TOLERANCE, Mutant, assert_mutant_is_caught, in_both_orders, relative

pytestmark = pytest.mark.modes("interpret", "cuda")

NAMES = ("y", "z", "dx", "da", "dweight", "dbias", "dgate")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHAPES = [((3,), 48), ((2, 3), 100), ((1,), MAX_WIDTH), ((5,), 1536), ((2,), 1)]  # rows and width


def make(
    rows: tuple[int, ...], width: int, dtypes: tuple[torch.dtype, ...], device: str, *, gated: bool
) -> list[Tensor]:
    """Stream, branch, weight, bias and the gate; `dtypes` are those of stream, branch and vectors."""
    gen = torch.Generator().manual_seed(0)
    stream, branch, vector = dtypes
    made = [
        torch.randn(*rows, width, generator=gen).to(device, stream) * 2 + 0.5,
        torch.randn(*rows, width, generator=gen).to(device, branch),
        torch.randn(width, generator=gen).to(device, vector),
        torch.randn(width, generator=gen).to(device, vector),
    ]
    return made + ([torch.randn(width, generator=gen).to(device, branch)] if gated else [])


def run(function, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    y, z = function(*inputs)
    gen = torch.Generator().manual_seed(1)
    loss = sum(
        (out * torch.randn(out.shape, generator=gen).to(out.device, out.dtype)).sum() for out in (y, z)
    )
    return y.detach(), z.detach(), *torch.autograd.grad(loss, inputs)


def triton(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    return dispatch_fused.add_layernorm(*inputs, implementation="triton")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gated", [False, True], ids=["no gate", "gate"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(shape, gated, dtype, device):
    rows, width = shape
    inputs = make(rows, min(width, MAX_GATED_WIDTH) if gated else width, (dtype,) * 3, device, gated=gated)
    got = in_both_orders(lambda: run(triton, inputs))
    exact = run(reference.add_layernorm, [x.double() for x in inputs])
    assert all(x.dtype == dtype for x in got)
    if width == 1:  # x - mean is 0: what is left of the gradients of the norm is rounding
        got, exact = (x[:3] for x in (got, exact))
    assert_close(NAMES[: len(got)], got, exact, dtype)


@pytest.mark.parametrize("rows", [4, 11, 23])
def test_programs_that_walk_over_several_rows(rows, device, monkeypatch):
    """Four programs: one row each; some with a row more than others; the last with fewer."""
    monkeypatch.setattr(op, "programs_for", lambda rows, warps: min(rows, 4))
    inputs = make((rows,), 40, (F32,) * 3, device, gated=True)
    got = in_both_orders(lambda: run(triton, inputs))
    assert_close(NAMES, got, run(reference.add_layernorm, [x.double() for x in inputs]), F32)


@pytest.mark.parametrize("dtypes", [(F32, BF16, BF16), (BF16, F32, F32), (F32, F16, F16)], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["no gate", "gate"])
def test_the_stream_keeps_its_dtype(dtypes, gated, device):
    inputs = make((6,), 80, dtypes, device, gated=gated)
    got = in_both_orders(lambda: run(triton, inputs))
    exact = run(reference.add_layernorm, [x.double() for x in inputs])
    want = (dtypes[0], dtypes[2], dtypes[0], dtypes[1], dtypes[2], dtypes[2], dtypes[1])
    assert [x.dtype for x in got] == list(want[: len(got)])
    assert_close(
        NAMES[: len(got)], got, exact, min(dtypes, key=lambda d: torch.finfo(d).bits and -TOLERANCE[d])
    )
    if dtypes[0] == F32:
        assert relative(got[0], exact[0]) < TOLERANCE[F32]


def test_a_constant_row_stays_finite(device):
    inputs = [
        x.zero_() if i < 2 else x for i, x in enumerate(make((2,), 32, (F32,) * 3, device, gated=False))
    ]
    y, z, *grads = run(triton, inputs)
    assert not y.any()
    assert torch.equal(z, inputs[3].expand_as(z))
    assert all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("used", [0, 1], ids=["y alone", "z alone"])
def test_one_result_alone(used, device):
    inputs = make((4,), 40, (F32,) * 3, device, gated=True)
    grads = []
    for function in (triton, reference.add_layernorm):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = function(*leaves)[used]
        grads.append(
            torch.autograd.grad(out.square().sum(), leaves, allow_unused=True, materialize_grads=True)
        )
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_rows_that_are_not_contiguous(device):
    inputs = make((4, 6), 24, (F32,) * 3, device, gated=True)
    moved = [inputs[0].transpose(0, 1), inputs[1].transpose(0, 1), *inputs[2:]]
    for a, b in zip(run(triton, moved), run(reference.add_layernorm, moved), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spread", ["expanded", "strided"])
@pytest.mark.parametrize("which", [2, 3, 4], ids=["weight", "bias", "gate"])
def test_vectors_that_are_not_contiguous(which, spread, device):
    inputs = make((4,), 24, (F32,) * 3, device, gated=True)
    vector = inputs[which]
    inputs[which] = vector[:1].expand(24) if spread == "expanded" else vector.repeat_interleave(3)[::3]
    assert not inputs[which].is_contiguous()
    got, want = (run(function, inputs) for function in (triton, reference.add_layernorm))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_two_runs_are_equal_bit_for_bit(gated, device, monkeypatch):
    monkeypatch.setattr(op, "programs_for", lambda rows, warps: min(rows, 4))
    inputs = make((50,), 64, (F32, BF16, BF16), device, gated=gated)
    for a, b in zip(run(triton, inputs), run(triton, inputs), strict=True):
        assert torch.equal(a, b)


MUTANTS = [
    Mutant(
        "no gate in the sum",
        "a *= tl.load(gate_ptr + column, mask=real, other=0.0).to(tl.float32)",
        "a *= 1.0",
    ),
    Mutant(
        "no gate in da", "dx *= tl.load(gate_ptr + column, mask=real, other=0.0).to(tl.float32)", "dx *= 1.0"
    ),
    Mutant("padding columns counted", "centred = tl.where(real, y - mean, 0.0)", "centred = y - mean"),
    Mutant(
        "last row dropped",
        "tl.minimum(first + rows_a_program, rows)",
        "tl.minimum(first + rows_a_program, rows - 1)",
    ),
    Mutant("sums of one row alone", "dweight += dz * normed", "dweight = dz * normed"),
    Mutant("all programs write one sum", "partials_ptr + program * D + column", "partials_ptr + column"),
    Mutant("mean of the gradient left out", " - shift)", ")"),
    Mutant("projection on the row left out", "dnormed - normed * along", "dnormed"),
    Mutant("the stream's gradient left out", "dx = dy + rstd *", "dx = 0.0 * dy + rstd *"),
    Mutant("every program takes the first rows", "first = program * rows_a_program", "first = program * 0"),
]


def everything() -> None:
    """The check that every mutant has to fail: a gate, a width that is no power of two, several rows a program."""
    inputs = make((11,), 40, (F32,) * 3, "cpu", gated=True)
    got = in_both_orders(lambda: run(triton, inputs))
    assert_close(NAMES, got, run(reference.add_layernorm, [x.double() for x in inputs]), F32)


@pytest.mark.modes("interpret")
def test_the_mutants_check_passes_without_a_mutant(monkeypatch):
    monkeypatch.setattr(op, "programs_for", lambda rows, warps: min(rows, 4))
    everything()


@pytest.mark.modes("interpret")  # planted faults may write anywhere
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught(mutant, monkeypatch, tmp_path):
    monkeypatch.setattr(op, "programs_for", lambda rows, warps: min(rows, 4))
    assert_mutant_is_caught(mutant, op, "kernel", everything, monkeypatch, tmp_path)


def test_what_the_kernel_does_not_take(device):
    wide = make((1,), MAX_WIDTH + 1, (F32,) * 3, device, gated=False)
    with pytest.raises(ValueError, match="rows of 1 to 8192, not of 8193"):
        triton(*wide)
    wide_gated = make((1,), MAX_GATED_WIDTH + 1, (F32,) * 3, device, gated=True)
    with pytest.raises(ValueError, match="gated rows of 1 to 4096, not of 4097"):
        triton(*wide_gated)
    double = make((1,), 8, (torch.float64,) * 3, device, gated=False)
    with pytest.raises(ValueError, match="float64"):
        triton(*double)
    for inputs in (wide, wide_gated, double):
        for a, b in zip(dispatch_fused.add_layernorm(*inputs), reference.add_layernorm(*inputs), strict=True):
            assert torch.equal(a, b)
