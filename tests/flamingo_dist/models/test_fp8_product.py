"""Products with fp8 codes: forward and gradient against what the codes stand for, row by row."""

import pytest
import torch
from torch import nn

from flamingo_dist.models.fp8_product import check_fp8_device
from flamingo_dist.models.linear import column_linear, quantise_, row_linear
from flamingo_dist.models.quantised import QuantisedWeight
from kernels.row_fp8.reference import quantise_rows

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def stored(outputs: int = 48, inputs: int = 32) -> QuantisedWeight:
    """A matrix whose channels are powers of ten apart."""
    weight = torch.randn(outputs, inputs) * 10.0 ** torch.linspace(-1, 1, outputs)[:, None]
    return QuantisedWeight(weight, "fp8", inputs_cut=False, products="fp8")


def of_codes(x_NI: torch.Tensor, factor_I: torch.Tensor | None = None) -> torch.Tensor:
    """What the rows' codes stand for, fp64 [N, I]."""
    codes, scale = quantise_rows(x_NI, factor_I)
    return codes.double() * scale.double()


@pytest.mark.parametrize("make", [column_linear, row_linear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_and_gradient_are_those_of_the_codes(make, dtype):
    layer = make(32, 48, bias=True, dtype=dtype).requires_grad_(False)
    layer.weight.copy_(torch.randn(48, 32) * 10.0 ** torch.linspace(-1, 1, 48)[:, None])
    layer.bias.copy_(torch.randn(48))
    quantise_(layer, "fp8", CPU, products="fp8")
    codes, scale = layer.quantised.codes_OI.double(), layer.quantised.scale_O
    x = torch.randn(5, 2, 32, dtype=dtype, requires_grad=True)
    grad = torch.randn(5, 2, 48).to(dtype)
    out, bias = layer(x)
    assert bias is None
    assert out.dtype == dtype
    (dx,) = torch.autograd.grad(out, x, grad)
    assert dx.dtype == dtype
    rounding = {torch.float32: 1e-6, torch.bfloat16: 5e-3}[dtype]
    want = of_codes(x.detach().view(10, 32)) @ (codes * scale.double()[:, None]).T + layer.bias.double()
    torch.testing.assert_close(
        out.double().view(10, 48), want, rtol=rounding, atol=rounding * want.abs().max()
    )
    want = of_codes(grad.view(10, 48), scale) @ codes
    torch.testing.assert_close(
        dx.double().view(10, 32), want, rtol=rounding, atol=rounding * want.abs().max()
    )


def test_both_are_near_those_of_the_matrix():
    """Of two operands with three bits of mantissa each a sum keeps about 1 in 30 (measured: 3.6 and 3.7%)."""
    weight, x = torch.randn(256, 128), torch.randn(64, 128, requires_grad=True)
    out = QuantisedWeight(weight, "fp8", inputs_cut=False, products="fp8")(x)
    grad = torch.randn_like(out)
    (dx,) = torch.autograd.grad(out, x, grad)
    for got, want in ((out, x @ weight.T), (dx, grad @ weight)):
        assert 0.01 < (got - want).norm() / want.norm() < 0.05


def test_a_row_is_the_same_in_any_company():
    """A token must not feel later ones through a scale of the whole tensor, nor the rows it shares a batch with."""
    matrix, x = stored(), torch.randn(7, 32)
    with torch.no_grad():
        whole = matrix(x)
        assert torch.equal(matrix(x[:3]), whole[:3])
        x[4:] *= 1e4
        assert torch.equal(matrix(x)[:4], whole[:4])
    assert matrix(torch.empty(2, 0, 32)).shape == (2, 0, 48)
    x = torch.empty(0, 32, requires_grad=True)
    matrix(x).sum().backward()
    assert x.grad.shape == (0, 32)


def test_what_is_not_finite_is_seen():
    x = torch.randn(3, 32)
    x[1, 4] = float("inf")
    assert stored()(x).isfinite().all(1).tolist() == [True, False, True]


def test_nothing_is_kept_for_the_backward():
    matrix, kept = stored(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda t: t):
        matrix(torch.randn(3, 32, requires_grad=True))
    assert kept == []


def test_the_transposed_codes_follow_the_others():
    module = nn.Sequential(stored())
    assert torch.equal(module[0].codes_IO.float(), module[0].codes_OI.float().T)
    module.bfloat16()
    assert module[0].codes_IO.dtype == torch.float8_e4m3fn
    assert module.to("meta")[0].codes_IO.is_meta
    assert not module.state_dict()
    assert QuantisedWeight(torch.randn(16, 16), "fp8", inputs_cut=False).codes_IO is None


@pytest.mark.parametrize(("outputs", "inputs"), [(40, 32), (32, 40)])
def test_a_matrix_that_does_not_fit_the_matrix_units_is_refused(outputs, inputs):
    with pytest.raises(ValueError, match=rf"\[{outputs}, {inputs}\] on this rank; .* needs multiples of 16"):
        stored(outputs, inputs)


def test_a_gpu_without_fp8_is_refused(monkeypatch):
    check_fp8_device(CPU)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    for capability in ((9, 0), (8, 9), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        check_fp8_device(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(ValueError, match="cannot run on A100: it has no fp8 matrix units"):
        check_fp8_device(torch.device("cuda"))
