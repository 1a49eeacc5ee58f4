"""The plain-PyTorch references of the element-wise functions against their definitions, written out."""

import pytest
import torch
from torch import Tensor

from kernels.add_layernorm import reference as add_layernorm
from kernels.conv_epilogue import reference as conv_epilogue
from kernels.dispatch_fused import add_layernorm as dispatched_add_layernorm
from kernels.dispatch_fused import bias_gelu_, gated_residual_
from kernels.dispatch_fused import gated_relu2 as dispatched_gated_relu2
from kernels.gated_relu2 import reference as gated_relu2


def rand(*shape: int, seed: int) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=gen, dtype=torch.float64).requires_grad_()


def compare(function, naive, inputs: list[Tensor]) -> None:
    results = []
    for run in (function, naive):
        out = run(*inputs)
        outs = out if isinstance(out, tuple) else (out,)
        loss = sum((o * rand(*o.shape, seed=9).detach()).sum() for o in outs)
        results.append((*outs, *torch.autograd.grad(loss, inputs)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("gated", [False, True])
def test_add_layernorm_is_its_definition(gated):
    inputs = [
        rand(2, 3, 7, seed=0),
        rand(2, 3, 7, seed=1),
        *(rand(7, seed=s) for s in range(2, 5 if gated else 4)),
    ]
    compare(dispatched_add_layernorm, add_layernorm.naive, inputs)


@pytest.mark.parametrize("gated", [False, True])
def test_gated_relu2_is_its_definition(gated):
    inputs = [rand(4, 5, seed=0), *([rand(seed=1)] if gated else [])]
    compare(dispatched_gated_relu2, gated_relu2.naive, inputs)


@pytest.mark.parametrize("biased", [False, True])
def test_what_follows_a_convolution_is_its_definition(biased):
    x, residual, bias, second, gate = (
        rand(*shape, seed=seed) for seed, shape in enumerate([(2, 3, 4, 5), (2, 3, 4, 5), (3,), (3,), (2, 3)])
    )
    compare(
        lambda x, bias: bias_gelu_(x.clone(), bias),  # it overwrites what it is given
        conv_epilogue.naive_bias_gelu,
        [x, bias],
    )

    def fused(residual, y, bias, gate, *second):
        given = (residual.clone(), second[0] if second else None, y.clone(), bias, gate)
        return gated_residual_(*given, activate=True)

    def naive(residual, y, bias, gate, *second):
        return conv_epilogue.naive_gated_residual(residual, second[0] if second else None, y, bias, gate)

    given = [residual, x, bias, gate, *([second] if biased else [])]
    compare(fused, naive, given)
    with torch.no_grad():  # then it is in place
        for a, b in zip(fused(*given), naive(*given), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_grids_that_do_not_fit_are_refused():
    x, vector, gate = torch.ones(2, 3, 4, 5), torch.ones(3), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"pass \[N, C, H, W\]"):
        bias_gelu_(x[0], vector)
    for change, name in enumerate(("residual", "residual_bias", None, "bias", "gate")):
        given = [x, vector, x, vector, gate]
        given[change] = torch.ones(7)
        with pytest.raises(ValueError, match=f"^{name} is" if name else "a grid of shape"):
            gated_residual_(*given, activate=False)


def test_the_stream_keeps_its_dtype():
    x, a = torch.randn(3, 8), torch.randn(3, 8).bfloat16()
    vector = torch.ones(8, dtype=torch.bfloat16)
    y, z = dispatched_add_layernorm(x, a, vector, vector)
    assert torch.equal(y, x + a.float())
    assert z.dtype == torch.bfloat16


@pytest.mark.parametrize("change", ["a", "weight", "bias dtype", "gate", "implementation", "triton"])
def test_what_does_not_fit_raises(change):
    x, a, weight, bias, gate = torch.ones(2, 4), torch.ones(2, 4), *(torch.ones(4) for _ in range(3))
    options = {}
    if change == "a":
        a = a[:1]
    elif change == "weight":
        weight = weight[:3]
    elif change == "bias dtype":
        bias = bias.double()
    elif change == "gate":
        gate = gate[:1]
    elif change == "implementation":
        options = {"implementation": "cuda"}
    else:
        options = {"implementation": "triton"}  # a CPU without the interpreter
    with pytest.raises(ValueError, match=r"must|choose|cannot run"):
        dispatched_add_layernorm(x, a, weight, bias, gate, **options)


@pytest.mark.parametrize("change", ["gate", "implementation", "triton"])
def test_a_gate_that_is_no_scalar_raises(change):
    options = {} if change == "gate" else {"implementation": change}
    gate = torch.ones(2) if change == "gate" else None
    with pytest.raises(ValueError, match=r"0-dim|choose|cannot run"):
        dispatched_gated_relu2(torch.ones(3, 2), gate, **options)
