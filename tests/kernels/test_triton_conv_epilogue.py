"""The kernels after a convolution against the fp64 definitions; NFNet on them is in test_triton_nfnet.py."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import dispatch_fused
from kernels.conv_epilogue import op, reference
from tests.kernels.close import assert_close
from tests.kernels.interpreting import TOLERANCE, Mutant, assert_mutant_is_caught, in_both_orders

pytestmark = pytest.mark.modes("interpret", "cuda")

SHAPES = [(1, 1, 1, 1), (2, 24, 3, 5), (3, 130, 7, 6), (1, 128, 9, 9), (2, 300, 2, 2), (5, 16, 17, 16)]
"""Images, channels, height, width: tiles partly empty both ways, several tiles both ways, and whole ones."""
NAMES = ("bias_gelu_", "out", "activated", "out, residual without a bias", "its activated", "last out")


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def make(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Residual and its bias, y and its bias, gate."""
    gen = torch.Generator().manual_seed(0)
    sizes = [shape, shape[1:2], shape, shape[1:2], shape[:2]]
    found = [torch.randn(size, generator=gen, dtype=torch.float64).to(device, dtype) for size in sizes]
    return [channels_last(x) if x.dim() == 4 else x for x in found]


def run(inputs: list[Tensor], implementation: str = "triton") -> tuple[Tensor, ...]:
    """All results; both functions overwrite what they are given, so they are given copies."""
    residual, residual_bias, y, bias, gate = inputs
    options: Any = {"implementation": implementation}

    def end(residual_bias: Tensor | None, *, activate: bool) -> tuple[Tensor, Tensor | None]:
        given = (residual.clone(), residual_bias, y.clone(), bias, gate)
        return dispatch_fused.gated_residual_(*given, activate=activate, **options)

    last, nothing = end(None, activate=False)
    assert nothing is None
    activated = dispatch_fused.bias_gelu_(y.clone(), bias, **options)
    return activated, *end(residual_bias, activate=True), *end(None, activate=True), last


def exact(inputs: list[Tensor]) -> tuple[Tensor, ...]:
    residual, residual_bias, y, bias, gate = (x.double() for x in inputs)
    plain = reference.naive_gated_residual(residual, None, y, bias, gate)
    whole = reference.naive_gated_residual(residual, residual_bias, y, bias, gate)
    return reference.naive_bias_gelu(y, bias), *whole, *plain, plain[0]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(shape, dtype, device):
    inputs = make(shape, dtype, device)
    got = in_both_orders(lambda: run(inputs))
    assert all(x.dtype == dtype and x.is_contiguous(memory_format=torch.channels_last) for x in got)
    assert_close(NAMES, got, exact(inputs), dtype)


def test_results_are_rounded_once(device):
    """Sums in bf16 would lose the branch beside a residual of 256, and the bias beside y."""
    ones = channels_last(torch.ones(1, 8, 2, 2, dtype=torch.bfloat16, device=device))
    vector = torch.full((8,), 2.0**-9, dtype=torch.bfloat16, device=device)
    gate = torch.full((1, 8), -256.0, dtype=torch.bfloat16, device=device)
    out, _ = dispatch_fused.gated_residual_(
        256 * ones, None, ones.clone(), vector, gate, activate=False, implementation="triton"
    )
    assert torch.equal(out, -0.5 * ones)


def test_large_values_neither_overflow_nor_vanish(device):
    x = torch.tensor([-3e38, -1e13, -40.0, 0.0, 40.0, 1e13, 3e38], device=device).view(1, 7, 1, 1)
    got = dispatch_fused.bias_gelu_(x.clone(), torch.zeros(7, device=device), implementation="triton")
    assert got.flatten().tolist() == [0.0, 0.0, 0.0, 0.0, *x.flatten()[4:].tolist()]


def test_results_lie_in_the_memory_of_the_convolutions(device):
    residual, residual_bias, y, bias, gate = make((2, 24, 3, 5), torch.float32, device)
    before = residual.clone()
    assert dispatch_fused.bias_gelu_(y, bias, implementation="triton").data_ptr() == y.data_ptr()
    out, activated = dispatch_fused.gated_residual_(
        residual, residual_bias, y, bias, gate, activate=True, implementation="triton"
    )
    assert out.data_ptr() == y.data_ptr() != activated.data_ptr()
    assert torch.equal(residual, before)


def test_vectors_need_be_neither_contiguous_nor_of_the_same_dtype(device):
    inputs = make((2, 24, 3, 5), torch.float32, device)
    strided = [x if x.dim() == 4 else x.repeat_interleave(2, -1).double()[..., ::2] for x in inputs]
    for name, a, b in zip(NAMES, run(strided), run(inputs), strict=True):
        assert torch.equal(a, b), name


def test_no_images(device):
    assert [x.shape[0] for x in run(make((0, 24, 3, 5), torch.bfloat16, device))] == [0] * len(NAMES)


MUTANTS = [
    Mutant("no bias before GELU", "other=0.0).to(tl.float32) + bias[None, :]", "other=0.0).to(tl.float32)"),
    Mutant("GELU's cube left out", "(x + 0.044715 * x * x * x)", "x"),
    Mutant("no bias of the branch", "(y + bias[None, :]) * gate", "y * gate"),
    Mutant("gate of the first image", "gate_ptr + image * channels + column", "gate_ptr + column"),
    Mutant("residual's bias never read", "if HAS_RESIDUAL_BIAS:", "if False:"),
    Mutant("residual's bias always read", "if HAS_RESIDUAL_BIAS:", "if True:"),
    Mutant("out where its activation belongs", "_gelu(out).to(activated_ptr", "out.to(activated_ptr"),
    Mutant(
        "an image's last pixel dropped",
        "(row < pixels)[:, None] & in_width",
        "(row < pixels - 1)[:, None] & in_width",
    ),
    Mutant(
        "last channels dropped",
        "in_width = column < channels",
        "in_width = column < channels // COLUMNS * COLUMNS",
    ),
    Mutant("all images the first", "(image * pixels + row)", "(image * 0 + row)"),
    Mutant(
        "last pixels dropped", "(row < pixels)[:, None] & (", "(row < pixels // ROWS * ROWS)[:, None] & ("
    ),
    Mutant(
        "all tiles the first channels",
        "% tiles * COLUMNS + tl.arange(0, COLUMNS)\n    row",
        "* 0 + tl.arange(0, COLUMNS)\n    row",
    ),
]


def everything() -> None:
    """The check that every mutant has to fail: several images, tiles partly empty both ways."""
    for shape in ((3, 130, 7, 6), (2, 300, 2, 2)):
        inputs = make(shape, torch.float32, "cpu")
        assert_close(NAMES, in_both_orders(lambda given=inputs: run(given)), exact(inputs), torch.float32)


@pytest.mark.modes("interpret")
def test_the_mutants_check_passes_without_a_mutant():
    everything()


@pytest.mark.modes("interpret")  # planted faults may write anywhere
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught(mutant, monkeypatch, tmp_path):
    assert_mutant_is_caught(mutant, op, "kernel", everything, monkeypatch, tmp_path)


UNFIT = {
    "float64": lambda x: x.double(),
    "channels-last": lambda x: x.contiguous(),
    "no derivative": lambda x: x.clone().requires_grad_() * 1.0,
}


@pytest.mark.parametrize("reason", UNFIT)
def test_what_the_kernels_do_not_take_goes_to_the_reference(reason, device):
    inputs = [UNFIT[reason](x) if x.dim() == 4 else x for x in make((2, 24, 3, 5), torch.float32, device)]
    with pytest.raises(ValueError, match=reason):
        run(inputs)
    assert_close(NAMES, run(inputs, "auto"), exact(inputs), torch.float32)


def test_every_second_channel_of_a_grid_is_not_taken(device):
    wide = channels_last(torch.zeros(2, 48, 3, 5, device=device))
    assert op.unsupported(wide) is None
    assert "without gaps" in str(op.unsupported(wide[:, ::2]))


def test_grids_that_differ(device):
    residual, _, y, bias, gate = make((2, 24, 3, 5), torch.float32, device)
    with pytest.raises(ValueError, match="share dtype"):
        dispatch_fused.gated_residual_(
            residual.half(), None, y, bias, gate, activate=True, implementation="triton"
        )
