"""The Resampler's attention kernel against the fp64 reference: results and all gradients."""

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.perceiver_attn import op, reference
from kernels.perceiver_attn.op import choose_splits, perceiver_attn_op
from kernels.perceiver_attn.tiles import forward_tiles
from tests.kernels.close import assert_close
from tests.kernels.interpreting import TOLERANCE, Mutant, assert_mutant_is_caught, in_both_orders

pytestmark = pytest.mark.modes("interpret", "cuda")

NAMES = ("out", "dq", "dk_feat", "dv_feat", "dk_lat", "dv_lat")
# N, R, J, H, K: every head width and its parts, R below, at and above a tile, J around and below a block.
SHAPES = [
    (2, 16, 37, 2, 96),
    (1, 8, 70, 3, 16),
    (1, 64, 129, 1, 64),
    (1, 128, 33, 1, 80),
    (1, 64, 64, 1, 128),
    (1, 70, 31, 1, 48),
    (2, 5, 1, 1, 24),
]


def make(shape: tuple[int, ...], dtype: torch.dtype, device: str, *, masked: bool) -> list[Tensor]:
    """Five inputs, keys and values as views of one projection's output, and a mask with a medium of padding alone."""
    n, r, j, h, k = shape
    gen = torch.Generator().manual_seed(0)

    def rand(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen, dtype=torch.float64).to(dtype).to(device)

    q, features, latents = rand(n, h, r, k).transpose(1, 2), rand(n, j, 2, h, k), rand(n, r, 2, h, k)
    mask = None
    if masked:
        mask = (torch.rand(n, j, generator=gen) < 0.6).to(device)
        mask[-1] = False
    return [q, features[:, :, 0], features[:, :, 1], latents[:, :, 0], latents[:, :, 1], mask]


def run(function, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    *tensors, mask = inputs
    tensors = [x.detach().requires_grad_() for x in tensors]
    out = function(*tensors, mask)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)
    return out.detach(), *torch.autograd.grad((out * weight).sum(), tensors)


def exact(inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return run(
        reference.perceiver_attn, [x if x is None or x.dtype == torch.bool else x.double() for x in inputs]
    )


def kernel(splits: int = 0):
    return lambda *inputs: perceiver_attn_op(*inputs, splits)[0]


def triton(*inputs: Tensor) -> Tensor:
    return dispatch.perceiver_attn(*inputs, implementation="triton")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("masked", [False, True], ids=["all features", "padding"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(shape, masked, dtype, device):
    inputs = make(shape, dtype, device, masked=masked)
    got = in_both_orders(lambda: run(triton, inputs))
    assert all(x.dtype == dtype for x in got)
    assert_close(NAMES, got, exact(inputs), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("masked", [False, True], ids=["all features", "padding"])
@pytest.mark.parametrize("splits", [2, 3, 7])
def test_any_split_of_the_keys_equals_the_reference(splits, masked, dtype, device):
    inputs = make((2, 16, 130, 1, 32), dtype, device, masked=masked)
    got = in_both_orders(lambda: run(kernel(splits), inputs))
    assert_close(NAMES, got, exact(inputs), dtype)


def test_padding_is_never_read(device):
    inputs = make((2, 8, 40, 1, 16), torch.float32, device, masked=True)
    clean = run(triton, inputs)
    poisoned = [torch.where(inputs[5][:, :, None, None], x, torch.nan) for x in inputs[1:3]]
    for name, a, b in zip(NAMES, run(triton, [inputs[0], *poisoned, *inputs[3:]]), clean, strict=True):
        assert torch.equal(a, b), name
    for name, gradient in zip(NAMES[2:4], clean[2:4], strict=True):
        assert not gradient[~inputs[5]].any(), name


@pytest.mark.parametrize("splits", [1, 3])
def test_two_runs_are_equal_bit_for_bit(splits, device):
    inputs = make((2, 32, 200, 2, 64), torch.bfloat16, device, masked=True)
    for name, a, b in zip(NAMES, run(kernel(splits), inputs), run(kernel(splits), inputs), strict=True):
        assert torch.equal(a, b), name


def test_large_scores_stay_finite(device):
    inputs = make((1, 16, 40, 1, 16), torch.float32, device, masked=False)
    inputs[0] = inputs[0] * 300
    assert_close(NAMES[:1], run(triton, inputs)[:1], exact(inputs)[:1], torch.float16)
    assert all(torch.isfinite(x).all() for x in run(triton, inputs))


MUTANTS = [
    Mutant("forward sees padding", "seen_J = seen_J & (tl.load(", "seen_J = seen_J | (tl.load("),
    Mutant("backward sees padding", "seen_J = inside_J & (flags", "seen_J = inside_J | (flags"),
    Mutant(
        "forward drops the last keys",
        "seen_J = rows_J < J\n        if HAS_MASK:\n            seen_J = seen_J",
        "seen_J = rows_J < J // BLOCK_J * BLOCK_J\n        if HAS_MASK:\n            seen_J = seen_J",
    ),
    Mutant(
        "backward drops the last keys",
        "inside_J = tl.arange(0, BLOCK_J) < J - start",
        "inside_J = tl.arange(0, BLOCK_J) < J // BLOCK_J * BLOCK_J - start",
    ),
    Mutant(
        "forward without the latents",
        "range(0, _own_latents(split, R), BLOCK_J):\n        rows_L = start + tl.arange(0, BLOCK_J)\n        peak",
        "range(R, _own_latents(split, R), BLOCK_J):\n        rows_L = start + tl.arange(0, BLOCK_J)\n        peak",
    ),
    Mutant(
        "old sums are not rescaled", "total = total * shrink + tl.sum(p, 1)", "total = total + tl.sum(p, 1)"
    ),
    Mutant(
        "second part of the head left out of the scores",
        "s += dot(q1, tl.trans(k1)",
        "s += 0.0 * dot(q1, tl.trans(k1)",
    ),
    Mutant(
        "second part of the head left out of dp",
        "dp += dot(do1, tl.trans(v1)",
        "dp += 0.0 * dot(do1, tl.trans(v1)",
    ),
    Mutant("delta left out", "(dp - delta[:, None])", "dp"),
    Mutant("no scale in dq and dk", "(dp - delta[:, None]) * scale)", "(dp - delta[:, None]))"),
    Mutant(
        "one share is left out of the sum",
        "    for split in range(0, splits):\n        share",
        "    for split in range(0, splits - 1):\n        share",
    ),
    Mutant("every share attends to the latents", "tl.where(split == 0, R, 0)", "R"),
    Mutant("all shares write one dq", "    row += split.to(tl.int64) * query_rows\n", ""),
    Mutant("all query tiles write one dk", "(tile.to(tl.int64) * feature_rows + (n * J", "((n * J"),
    Mutant("a head writes its neighbour's dk", "(n * J + start) * H + h", "(n * J + start) * H + 0 * h"),
    Mutant("every block of keys reads the first", "kf_ptr + first_row * skf_j", "kf_ptr"),
    Mutant("blocks of keys in the wrong place", "dkf_ptr + at, dvf_ptr + at", "dkf_ptr + at, dvf_ptr"),
]


def everything() -> None:
    """The check that every mutant has to fail: padding, tails, two parts of a head, several shares and tiles."""
    inputs = make((2, 20, 70, 2, 48), torch.float32, "cpu", masked=True)
    got = in_both_orders(lambda: run(kernel(2), inputs))
    assert_close(NAMES, got, exact(inputs), torch.float32)


@pytest.mark.modes("interpret")
def test_the_mutants_check_passes_without_a_mutant():
    everything()


@pytest.mark.modes("interpret")  # planted faults may write anywhere
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught(mutant, monkeypatch, tmp_path):
    assert_mutant_is_caught(mutant, op, "kernel", everything, monkeypatch, tmp_path)


@pytest.mark.modes("interpret")  # as the mutants, whose check it is
def test_a_dropped_partial_gradient_is_caught(monkeypatch):
    monkeypatch.setattr(op, "_sum_partials", lambda partials, dtype: partials[0].to(dtype))
    with pytest.raises(AssertionError, match="dq|dk|dv"):
        everything()


def test_what_the_kernel_does_not_take(device):
    wide = make((1, 4, 3, 1, 136), torch.float32, device, masked=False)
    with pytest.raises(ValueError, match="heads of 1 to 128, not of 136"):
        triton(*wide)
    double = make((1, 4, 3, 1, 16), torch.float64, device, masked=False)
    with pytest.raises(ValueError, match="float64"):
        triton(*double)
    mixed = make((1, 4, 3, 1, 16), torch.float32, device, masked=False)
    mixed[1] = mixed[1].bfloat16()
    with pytest.raises(ValueError, match="must share dtype and device, given .*bfloat16 on"):
        triton(*mixed)
    far = [torch.empty(1, rows, 1, 128, device="meta") for rows in (4, 2**24, 2**24, 4, 4)]
    with pytest.raises(ValueError, match=r"fewer than 2\*\*31 elements, not 2147483648"):
        triton(*far)
    for inputs in (wide, double):
        torch.testing.assert_close(dispatch.perceiver_attn(*inputs), reference.perceiver_attn(*inputs))


def test_features_that_32_bits_do_not_reach_are_copied():
    """A row's place is its number times the stride, in 32 bits."""
    shapes = [(1, rows, 1, 16) for rows in (4, 4, 4, 4, 4)]
    inputs = [torch.empty(shape, device="meta") for shape in shapes]
    inputs[1] = torch.empty_strided((1, 4, 1, 16), (2**32, 2**30, 16, 1), device="meta")
    tiles = forward_tiles(4, 16, torch.bfloat16, 90)
    launch = op._prepare(*inputs, None, tiles, 1)
    assert [x.stride(1) for x in launch.inputs] == [16] * 5


def test_keys_are_split_where_media_are_few_and_features_many():
    assert choose_splits(programs=320 * 16, features=6750) == 1
    assert choose_splits(programs=16, features=100) == 1
    assert choose_splits(programs=16, features=6750) == 13
    assert choose_splits(programs=128, features=6750) == 2
