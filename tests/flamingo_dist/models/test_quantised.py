"""Quantised frozen matrices: how far from the values, products and gradients, and what lives between the passes."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from flamingo_dist.models.linear import column_linear, quantise_, row_linear
from flamingo_dist.models.quantised import LARGEST, QuantisedWeight
from flamingo_dist.models.weights.layout import lm_layout
from tests.flamingo_dist.models.measure_loading import CONFIG

KINDS = ["int8", "fp8"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def matrix(seed: int, outputs: int, inputs: int, spread: float) -> torch.Tensor:
    """Rows of very different sizes, with values far outside of their row's others, and a row of zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator) * 10.0 ** (
        spread * torch.randn(outputs, 1, generator=generator)
    )
    weight[torch.randint(outputs, (1,), generator=generator), 0] *= 50
    weight[-1] = 0
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    outputs=st.integers(2, 40),
    inputs=st.integers(1, 70),
    spread=st.floats(0, 3),
)
def test_values_are_as_near_as_the_codes_are(kind, dtype, seed, outputs, inputs, spread):
    weight = matrix(seed, outputs, inputs, spread).to(dtype)
    stored = QuantisedWeight(weight, kind, inputs_cut=False)
    exact, got = weight.double(), stored.codes_OI.double() * stored.scale_O.double()[:, None]
    scale = stored.scale_O.double()[:, None]
    peak = exact.abs().amax(1)
    torch.testing.assert_close(stored.scale_O.double() * LARGEST[stored.codes_OI.dtype] * (peak > 0), peak)
    if kind == "int8":
        bound = scale / 2
    else:  # e4m3: three bits of mantissa, steps of 2^-9 below 2^-6
        bound = torch.maximum(exact.abs() / 16, scale * 2.0**-10)
    assert ((got - exact).abs() <= bound * (1 + 1e-5)).all()
    assert (got[-1] == 0).all()


def test_chunks_change_nothing(monkeypatch):
    weight = matrix(3, 37, 16, 1.0)
    whole = QuantisedWeight(weight, "int8", inputs_cut=False)
    monkeypatch.setattr("flamingo_dist.models.quantised.CHUNK", 100)
    parts = QuantisedWeight(weight, "int8", inputs_cut=False)
    assert torch.equal(whole.codes_OI, parts.codes_OI)
    assert torch.equal(whole.scale_O, parts.scale_O)


@pytest.mark.parametrize("make", [column_linear, row_linear])
@pytest.mark.parametrize("kind", KINDS)
def test_product_and_gradient_are_those_of_the_dequantised_matrix(kind, make):
    layer = make(24, 40, bias=True).requires_grad_(False)
    layer.weight.copy_(matrix(1, 40, 24, 0.5))
    layer.bias.copy_(torch.randn(40))
    quantise_(layer, kind, CPU)
    weight = layer.quantised.dequantised()
    x = torch.randn(5, 2, 24, requires_grad=True)
    grad = torch.randn(5, 2, 40)
    out, bias = layer(x)
    assert bias is None
    expected = F.linear(x, weight, layer.bias)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    (ours,) = torch.autograd.grad(out, x, grad)
    (theirs,) = torch.autograd.grad(expected, x, grad)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert torch.autograd.gradcheck(lambda x: layer.quantised(x), (x.detach().double().requires_grad_(),))


@pytest.mark.parametrize("kind", KINDS)
def test_in_bf16_the_scale_is_not_rounded(kind):
    """A scale in bf16 would move a channel by up to 1/256 as a whole; the product is rounded as any in bf16 is."""
    stored = QuantisedWeight(matrix(2, 30, 64, 0.0).bfloat16(), kind, inputs_cut=False)
    x = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    out = stored(x)
    assert out.dtype == torch.bfloat16
    exact = x.detach().double() @ stored.dequantised().double().T
    torch.testing.assert_close(out.double(), exact, rtol=2**-7, atol=1e-2)
    slope = (out.double() * exact).sum(0) / exact.square().sum(0).clamp(min=1e-9)
    torch.testing.assert_close(slope[:-1], torch.ones_like(slope[:-1]), atol=4e-4, rtol=0)
    out.sum().backward()
    expected = stored.dequantised().double().sum(0).expand_as(x)
    torch.testing.assert_close(x.grad.double(), expected, rtol=2**-5, atol=0.1)


def test_no_copy_of_a_weight_lives_until_the_backward():
    stored = QuantisedWeight(torch.randn(64, 32), "int8", inputs_cut=False)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda t: t):
        stored(torch.randn(3, 32, requires_grad=True))
    assert kept == []
    assert not stored(torch.randn(3, 32)).requires_grad


@pytest.mark.parametrize(("kind", "products"), [*((kind, "same") for kind in KINDS), ("fp8", "fp8")])
def test_compiled_code_keeps_the_codes_alone(kind, products):
    """The compiler would find that both passes cast the codes, and keep the cast matrix from one to the other."""
    stored = QuantisedWeight(torch.randn(64, 32), kind, inputs_cut=False, products=products)
    x = torch.randn(3, 32).bfloat16().requires_grad_()
    torch._dynamo.reset()
    found = []
    for run in (stored, torch.compile(stored, backend="aot_eager", fullgraph=True)):
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            out = run(x)
        found.append((kept, out, *torch.autograd.grad(out, x, torch.ones_like(out))))
    (_, want, want_grad), (kept, out, grad) = found
    assert {t.data_ptr() for t in kept} <= {t.data_ptr() for t in stored.buffers()}
    assert torch.equal(out, want)
    assert torch.equal(grad, want_grad)


def test_the_operators_of_compiled_code_are_sound():
    """With int8 alone: opcheck compares arguments before and after, which torch cannot for fp8 on a CPU."""
    stored = QuantisedWeight(torch.randn(6, 4), "int8", inputs_cut=False)
    given_OI = (stored.codes_OI, stored.scale_O)
    x = torch.randn(2, 3, 4, requires_grad=True)
    torch.library.opcheck(torch.ops.flamingo.quantised_product.default, (x, *given_OI))
    torch.library.opcheck(torch.ops.flamingo.quantised_input_grad.default, (torch.randn(2, 3, 6), *given_OI))


@pytest.mark.parametrize("kind", KINDS)
def test_casting_the_network_leaves_codes_and_scales(kind):
    module = nn.Sequential(QuantisedWeight(torch.randn(4, 6), kind, inputs_cut=False), nn.Linear(4, 2))
    before = dict(module[0].named_buffers())
    module.bfloat16().to("cpu")
    assert module[1].weight.dtype == torch.bfloat16
    for name, buffer in module[0].named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer.float(), before[name].float())
    assert module.to("meta")[0].codes_OI.is_meta
    assert set(module.state_dict()) == {"1.weight", "1.bias"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad):
    weight = torch.randn(4, 6)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="not finite; int8 cannot hold them"):
        QuantisedWeight(weight, "int8", inputs_cut=False)


def test_only_frozen_layers_change():
    trained, other = column_linear(8, 8), nn.Linear(8, 8).requires_grad_(False)
    for layer in (trained, other):
        quantise_(layer, "int8", CPU)
        assert layer.weight.dtype == torch.float32
    assert trained.quantised is None


def test_peak_memory_is_the_quantised_shard_and_one_layer(tmp_path):
    """As the test of this name for weights in the run's dtype, but what is left of a layer is half of it."""
    tensors = {n: torch.zeros(s, dtype=torch.bfloat16) for n, s in lm_layout(CONFIG).stored.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    layer = sum(t.numel() * 2 for n, t in tensors.items() if ".layers.0." in n)
    command = [sys.executable, "-m", "tests.flamingo_dist.models.measure_loading"]
    command += [str(tmp_path), str(1 << 20), "int8"]
    # Freed blocks go back at once: glibc would keep up to 64 MB of them, as much as the layers of this small LM.
    told = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
    out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=200, env=told)
    grown, shard = map(int, out.stdout.splitlines()[-1].split())
    halved = CONFIG.num_layers * layer / 4  # of two ranks, in bytes of bf16
    assert shard < 1.2 * halved
    assert shard <= grown <= shard + layer, (grown / 2**20, shard / 2**20, layer / 2**20)
