import pytest
import torch
from torch import Tensor

from kernels.dispatch import perceiver_attn
from kernels.perceiver_attn import reference

N, R, J, H, K = 2, 3, 5, 2, 4
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
MASK = torch.tensor([[True, True, False, True, False], [False] * 5])


def make(dtype: torch.dtype) -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    shapes = [(N, R), (N, J), (N, J), (N, R), (N, R)]
    made = [torch.randn(*shape, H, K, generator=gen, dtype=torch.float64) for shape in shapes]
    return [x.to(dtype).requires_grad_() for x in made]


def run(function, inputs: list[Tensor], mask: Tensor | None) -> tuple[Tensor, ...]:
    out = function(*inputs, mask)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(out.dtype)
    return out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("mask", [None, MASK], ids=["all features", "padding"])
def test_reference_equals_naive_with_gradients(mask, dtype):
    inputs = make(dtype)
    got = run(perceiver_attn, inputs, mask)
    want = run(reference.naive, [x.detach().double().requires_grad_() for x in inputs], mask)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        assert torch.isfinite(a).all()
        assert (a.double() - b).norm() / (b.norm() + 1e-30) < TOLERANCE[dtype] or not b.any()


def test_gradcheck():
    assert torch.autograd.gradcheck(lambda *x: perceiver_attn(*x, MASK), make(torch.float64))


def test_padding_has_no_influence():
    inputs = make(torch.float64)
    out = perceiver_attn(*inputs, MASK)
    for which in (1, 2):
        inputs[which] = torch.where(MASK[:, :, None, None], inputs[which], 1e3)
    torch.testing.assert_close(perceiver_attn(*inputs, MASK), out, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("change", ["queries", "features", "mask", "mask dtype", "implementation"])
def test_what_does_not_fit_raises(change):
    inputs, mask, options = make(torch.float32), MASK, {}
    if change == "queries":
        inputs[0] = inputs[0][:, :1]
    elif change == "features":
        inputs[2] = inputs[2][:, :1]
    elif change == "mask":
        mask = mask[:, :1]
    elif change == "mask dtype":
        mask = mask.int()
    else:
        options = {"implementation": "cuda"}
    with pytest.raises(ValueError, match=r"must|choose"):
        perceiver_attn(*inputs, mask, **options)
