"""The frozen LM's product in fp8 on this mode's device: rows from the kernel, the product from torch."""

from collections.abc import Iterator

import pytest
import torch

from flamingo_dist.models.fp8_product import FIRST_CAPABILITY, fp8_product
from kernels.row_fp8.reference import quantise_rows
from tests.kernels.interpreting import TOLERANCE, relative, rounding_to_fp8

pytestmark = pytest.mark.modes("interpret", "cuda")


@pytest.fixture(autouse=True)
def _rounding(device: str) -> Iterator[None]:
    if device == "cuda" and torch.cuda.get_device_capability() < FIRST_CAPABILITY:
        pytest.skip("this GPU has no fp8 matrix units")
    with rounding_to_fp8():
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(37, 80, 48), (1, 16, 16), (130, 48, 528)])
def test_product_and_gradient_are_those_of_the_codes(rows, outputs, inputs, dtype, device):
    gen = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(rows, n, generator=gen).to(device, dtype) for n in (inputs, outputs))
    weight, scale = quantise_rows(torch.randn(outputs, inputs, generator=gen).to(device))
    x.requires_grad_()
    out = fp8_product(x, weight, weight.t().contiguous(), scale[:, 0])
    out.backward(grad)
    assert out.dtype == x.grad.dtype == dtype
    codes, own = (y.double() for y in quantise_rows(x.detach()))
    assert relative(out, (codes * own) @ (weight.double() * scale.double()).T) < TOLERANCE[torch.bfloat16]
    codes, own = (y.double() for y in quantise_rows(grad, scale[:, 0]))
    assert relative(x.grad, (codes * own) @ weight.double()) < TOLERANCE[torch.bfloat16]
