"""The gated squared ReLU's kernel against the fp64 reference: result and both gradients."""

import pytest
import torch
from torch import Tensor

from kernels import dispatch_fused
from kernels.gated_relu2 import op, reference
from kernels.gated_relu2.op import BLOCK
from tests.kernels.close import assert_close
from tests.kernels.interpreting import TOLERANCE, Mutant, assert_mutant_is_caught, in_both_orders

pytestmark = pytest.mark.modes("interpret", "cuda")

NAMES = ("h", "du", "dgate")
SHAPES = [(1,), (3, 5, 7), (BLOCK,), (2 * BLOCK + 5,), (3, BLOCK + 8)]


def make(shape: tuple[int, ...], dtype: torch.dtype, device: str, *, gated: bool = True) -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    u = torch.randn(shape, generator=gen, dtype=torch.float64).abs() if shape == (1,) else None
    u = torch.randn(shape, generator=gen, dtype=torch.float64) if u is None else u
    return [u.to(device, dtype), *([torch.tensor(-0.3, dtype=dtype, device=device)] if gated else [])]


def run(function, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    h = function(*inputs)
    weight = torch.randn(h.shape, generator=torch.Generator().manual_seed(1)).to(h.device, h.dtype)
    return h.detach(), *torch.autograd.grad((h * weight).sum(), inputs)


def triton(*inputs: Tensor) -> Tensor:
    return dispatch_fused.gated_relu2(*inputs, implementation="triton")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(shape, gated, dtype, device):
    inputs = make(shape, dtype, device, gated=gated)
    got = in_both_orders(lambda: run(triton, inputs))
    exact = run(reference.gated_relu2, [x.double() for x in inputs])
    assert all(x.dtype == dtype for x in got)
    assert_close(NAMES[: len(got)], got, exact, dtype)


def test_a_closed_gate_has_a_gradient_of_its_own(device):
    u, gate = make((100,), torch.float32, device)
    h, du, dgate = run(triton, [u, torch.zeros_like(gate)])
    assert not h.any()
    assert not du.any()
    assert dgate.item() != 0


def test_columns_of_a_matrix(device):
    u, gate = make((6, 5), torch.float32, device)
    for a, b in zip(run(triton, [u.T, gate]), run(reference.gated_relu2, [u.T, gate]), strict=True):
        torch.testing.assert_close(a, b)


def test_only_the_input_and_the_gate_are_kept(device):
    u, gate = (x.requires_grad_() for x in make((9, 33), torch.bfloat16, device))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        triton(u, gate)
    assert sorted(x.data_ptr() for x in kept) == sorted((u.data_ptr(), gate.data_ptr()))


def test_two_runs_are_equal_bit_for_bit(device):
    inputs = make((5 * BLOCK + 3,), torch.bfloat16, device)
    for name, a, b in zip(NAMES, run(triton, inputs), run(triton, inputs), strict=True):
        assert torch.equal(a, b), name


MUTANTS = [
    Mutant("no gate in the result", "h *= tl.load(gate_ptr).to(tl.float32)", "h *= 1.0"),
    Mutant("no gate in du", "scaled *= tl.load(gate_ptr).to(tl.float32)", "scaled *= 1.0"),
    Mutant(
        "gate in its own gradient",
        "tl.sum(scaled * positive)",
        "tl.sum(scaled * positive) * tl.load(gate_ptr)",
    ),
    Mutant("all programs write one sum", "tl.store(dgate_ptr + block,", "tl.store(dgate_ptr,"),
    Mutant(
        "last elements dropped",
        "h.to(h_ptr.dtype.element_ty), mask=real)",
        "h.to(h_ptr.dtype.element_ty), mask=at < numel // BLOCK * BLOCK)",
    ),
    Mutant("factor of the square left out", "(2.0 * scaled)", "scaled"),
    Mutant(
        "negative inputs squared",
        "    h = positive * positive",
        "    h = tl.load(u_ptr + at, mask=real, other=0.0).to(tl.float32)\n    h *= h",
    ),
]


def everything() -> None:
    """The check that every mutant has to fail: several programs, the last one partly empty."""
    inputs = make((2 * BLOCK + 5,), torch.float32, "cpu")
    got = in_both_orders(lambda: run(triton, inputs))
    assert_close(NAMES, got, run(reference.gated_relu2, [x.double() for x in inputs]), torch.float32)


@pytest.mark.modes("interpret")
def test_the_mutants_check_passes_without_a_mutant():
    everything()


@pytest.mark.modes("interpret")  # planted faults may write anywhere
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught(mutant, monkeypatch, tmp_path):
    assert_mutant_is_caught(mutant, op, "kernel", everything, monkeypatch, tmp_path)


def test_what_the_kernel_does_not_take(device):
    inputs = make((4,), torch.float64, device)
    with pytest.raises(ValueError, match="float64"):
        triton(*inputs)
    with pytest.raises(ValueError, match="0-dim"):
        triton(inputs[0], torch.ones(1))
    assert torch.equal(dispatch_fused.gated_relu2(*inputs), reference.gated_relu2(*inputs))
