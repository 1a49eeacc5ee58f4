"""Every kernel as an operator of torch's: its rules are kept, it compiles as one graph, and it is recomputed alike."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import dispatch, dispatch_fused
from kernels.add_layernorm.op import add_layernorm_backward_op, add_layernorm_op
from kernels.gated_relu2.op import gated_relu2_backward_op, gated_relu2_op
from kernels.gated_xattn.op import gated_xattn_backward_op, gated_xattn_op, media_spans_op
from kernels.perceiver_attn.op import perceiver_attn_backward_op, perceiver_attn_op

pytestmark = pytest.mark.modes("interpret", "cuda")

F32, BF16 = torch.float32, torch.bfloat16
Calls = list[tuple[Callable[..., Any], tuple[Any, ...]]]
"""Operators with their arguments: a forward, whose tensors want gradients, and its backward."""


def randn(device: str, *shapes: tuple[int, ...], dtype: torch.dtype = F32) -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=gen).to(device, dtype) for shape in shapes]


def wanting(*tensors: Tensor | None) -> list[Tensor | None]:
    return [x if x is None else x.clone().requires_grad_() for x in tensors]


def add_layernorm(device: str, *, gated: bool, branch: torch.dtype) -> Calls:
    (x,) = randn(device, (3, 16))
    a, weight, bias, gate = randn(device, (3, 16), (16,), (16,), (16,), dtype=branch)
    given = (x, a, weight, bias, gate if gated else None)
    y, z, mean, rstd = add_layernorm_op(*given, 1e-5)
    backward = (torch.ones_like(y), torch.ones_like(z), y, a, weight, given[4], mean, rstd)
    return [(add_layernorm_op, (*wanting(*given), 1e-5)), (add_layernorm_backward_op, backward)]


def gated_relu2(device: str, *, gated: bool) -> Calls:
    u, gate = randn(device, (3, 7), ())
    given = (u, gate if gated else None)
    return [(gated_relu2_op, tuple(wanting(*given))), (gated_relu2_backward_op, (torch.ones_like(u), *given))]


def gated_xattn(device: str, *, gated: bool) -> Calls:
    q, k, v, gate = randn(device, (1, 8, 1, 16), (1, 5, 1, 16), (1, 5, 1, 16), ())
    spans = torch.tensor([[1, 6]], dtype=torch.int32, device=device)
    index = torch.tensor([[0, 1, 1, 2, 2, 0]], device=device)
    given = (q, k, v, spans, gate if gated else None)
    return [
        (gated_xattn_op, (*wanting(q, k, v), spans, *wanting(given[4]))),
        (gated_xattn_backward_op, (torch.ones_like(q), *given)),
        (media_spans_op, (index, 2)),
    ]


def perceiver_attn(device: str, *, masked: bool) -> Calls:
    tensors = randn(device, (1, 8, 1, 16), (1, 5, 1, 16), (1, 5, 1, 16), (1, 8, 1, 16), (1, 8, 1, 16))
    mask = torch.tensor([[True, False, True, True, False]], device=device) if masked else None
    out, lse = perceiver_attn_op(*tensors, mask, 1)
    backward = (torch.ones_like(out), *tensors, mask, out, lse, 1)
    return [(perceiver_attn_op, (*wanting(*tensors), mask, 1)), (perceiver_attn_backward_op, backward)]


OPERATORS: dict[str, Callable[[str], Calls]] = {
    **{
        f"add_layernorm-{'gate' if gated else 'plain'}-{str(dtype)[6:]}": partial(
            add_layernorm, gated=gated, branch=dtype
        )
        for gated in (False, True)
        for dtype in (F32, BF16)
    },
    **{f"gated_relu2-{gated}": partial(gated_relu2, gated=gated) for gated in (False, True)},
    **{f"gated_xattn-{gated}": partial(gated_xattn, gated=gated) for gated in (False, True)},
    **{f"perceiver_attn-{masked}": partial(perceiver_attn, masked=masked) for masked in (False, True)},
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_keep_torchs_rules(name, device):
    for operator, arguments in OPERATORS[name](device):
        torch.library.opcheck(operator, arguments)


def functions(device: str) -> dict[str, tuple[Callable[..., Any], list[Tensor]]]:
    """The functions as the network calls them, and the tensors that want gradients."""
    x, a, weight, bias = randn(device, (5, 40), (5, 40), (40,), (40,))
    half = [tensor.to(BF16) for tensor in (a, weight, bias)]
    u, gate = randn(device, (3, 50), ())
    q, k, v = randn(device, (7, 2, 2, 16), (2, 3, 5, 2, 16), (2, 3, 5, 2, 16))
    index = torch.tensor([[0, 1, 1, 0, 3, 3, 3], [2, 2, 2, 2, 2, 0, 0]], device=device)
    shapes = [(1, rows, 1, 16) for rows in (8, 20, 20, 8, 8)]
    mask = torch.arange(20, device=device)[None] % 3 != 1
    norm = partial(dispatch_fused.add_layernorm, implementation="triton")
    return {
        "add_layernorm": (norm, [x, a, weight, bias]),
        "add_layernorm of two dtypes": (norm, [x, *half]),
        "gated_relu2": (partial(dispatch_fused.gated_relu2, implementation="triton"), [u, gate]),
        "gated_xattn": (  # sequence-first in memory, as the network has it
            lambda q, k, v, gate: dispatch.gated_xattn(q, k, v, index, gate, implementation="triton"),
            [q.transpose(0, 1), k, v, gate],
        ),
        "perceiver_attn": (
            lambda *tensors: dispatch.perceiver_attn(*tensors, mask, implementation="triton"),
            randn(device, *shapes),
        ),
    }


def outcome(function: Callable[..., Any], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Results and gradients of a weighted sum of them."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    loss = sum(
        (out * torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)).sum() for out in results
    )
    assert isinstance(loss, Tensor)
    return *(out.detach() for out in results), *torch.autograd.grad(loss, leaves)


DYNAMIC = torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
WRAPS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "compiled": lambda function: torch.compile(function, fullgraph=True, backend="aot_eager"),
    "compiled for any sizes": DYNAMIC,
    "recomputed": lambda function: lambda *x: checkpoint(function, *x, use_reentrant=False),
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("name", functions("cpu"))
def test_compiled_and_recomputed_it_is_the_same_bit_for_bit(name, wrap, device):
    function, inputs = functions(device)[name]
    got, want = outcome(WRAPS[wrap](function), inputs), outcome(function, inputs)
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a, b), f"result {number}"


def test_forward_mode_is_refused_rather_than_zero(device):
    """torch takes a custom operator without a forward-mode rule for one whose derivative is 0."""
    u = torch.tensor([1.0, 2.0, -1.0], device=device)
    for implementation in ("auto", "reference"):
        function = partial(dispatch_fused.gated_relu2, implementation=implementation)
        _, tangent = torch.func.jvp(function, (u,), (torch.ones_like(u),))
        assert tangent.tolist() == [2.0, 4.0, 0.0]
    with pytest.raises(ValueError, match="no forward-mode derivative"):
        torch.func.jvp(partial(function, implementation="triton"), (u,), (torch.ones_like(u),))


def test_a_gate_of_another_dtype_is_taken(device):
    """Under autocast the queries are bf16 and the gate, a parameter, is not."""
    q, k = (x.bfloat16() for x in randn(device, (1, 6, 1, 16), (1, 2, 4, 1, 16)))
    index, gate = torch.tensor([[0, 1, 1, 2, 2, 2]], device=device), torch.tensor(0.5, device=device)
    got, want = [], []
    for results, implementation in ((got, "triton"), (want, "reference")):
        leaf = gate.clone().requires_grad_()
        out = dispatch.gated_xattn(q, k, k, index, leaf, implementation=implementation)
        out.float().square().sum().backward()
        results += [out.detach(), leaf.grad]
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
