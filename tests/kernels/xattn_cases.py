"""Spans and inputs for tests of gated cross-attention, and the check against the fp64 reference."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.gated_xattn import op, reference
from tests.kernels.interpreting import TOLERANCE, in_both_orders, relative

NAMES = ("out", "dq", "dk", "dv", "dgate")

LAYOUTS = {
    "odd lengths": (51, [(0, 17), (17, 50), (50, 51)]),
    "holes": (45, [(3, 20), (23, 40)]),
    "empty images": (46, [(5, 5), (5, 22), (22, 22), (30, 41), (41, 41)]),
    "skewed": (62, [(0, 1), (1, 60), (60, 62)]),
    "nothing is seen": (20, [(0, 0), (7, 7)]),
    "all rows, one image": (32, [(0, 32)]),
    "long hole": (70, [(0, 2), (60, 61)]),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    rows: int
    spans: list[tuple[int, int]]
    heads: int = 2
    width: int = 16
    latents: int = 5
    dtype: torch.dtype = torch.float32
    gate: float | None = 0.7
    seed: int = 0
    device: str = "cpu"

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        """q, k, v, spans, gate, do: k and v are views of one projection's output."""
        gen = torch.Generator().manual_seed(self.seed)

        def rand(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=gen).to(self.dtype).to(self.device)

        q = rand(self.rows, self.heads, self.width)
        k, v = rand(len(self.spans), self.latents, 2, self.heads, self.width).unbind(2)
        spans = torch.tensor(self.spans, dtype=torch.int32, device=self.device).reshape(-1, 2)
        gate = None if self.gate is None else torch.tensor(self.gate, dtype=self.dtype, device=self.device)
        return q, k, v, spans, gate, rand(*q.shape)


def index_of(spans: Tensor, rows: int) -> Tensor:
    """[1, A]: the media index that gives these spans ([I, 2])."""
    index = torch.zeros(1, rows, dtype=torch.int64)
    for number, (start, end) in enumerate(spans.tolist()):
        index[0, start:end] = number + 1
    return index


def wanted(case: Case) -> tuple[tuple[Tensor, ...], float]:
    """Output and gradients of the reference in fp64, and the norm of the terms that the gate's gradient sums."""
    q, k, v, spans, gate, do = case.inputs()
    exact = [x.double().cpu().requires_grad_() for x in (q, k, v)]
    if gate is not None:
        exact.append(gate.double().cpu().requires_grad_())
    out = reference.gated_xattn(
        exact[0][None], exact[1][None], exact[2][None], index_of(spans.cpu(), case.rows), *exact[3:] or [None]
    )[0]
    terms = 0.0
    if gate is not None:
        tanh = exact[3].detach().tanh()
        terms = (out.detach() / tanh * (1 - tanh**2) * do.double().cpu()).norm().item() if tanh else 0.0
    return (out.detach(), *torch.autograd.grad((out * do.double().cpu()).sum(), exact)), terms


def got(case: Case, chunks: int | None = None) -> tuple[Tensor, ...]:
    """Output and gradients of the kernels; without a gate no gradient of it."""
    q, k, v, spans, gate, do = case.inputs()
    out = op.forward(q[None], k, v, spans, gate, chunks=chunks)[0]
    dq, dk, dv, dgate = op.backward(do[None], q[None], k, v, spans, gate, chunks=chunks)
    return out, dq[0], dk, dv, *([] if gate is None else [dgate])


def check(case: Case, chunks: int | None = None) -> None:
    """Assert that the kernels agree with the reference, write everything and do not race."""
    results = in_both_orders(lambda: got(case, chunks))
    exact, gate_terms = wanted(case)
    for name, a, b in zip(NAMES, results, exact, strict=False):
        assert a.dtype == case.dtype, name
        assert a.shape == b.shape, name
        error = relative(a, b, gate_terms if name == "dgate" else 0.0)
        assert error < TOLERANCE[case.dtype], f"{name}: relative error {error:.2e}"
    hole = index_of(torch.tensor(case.spans), case.rows)[0] == 0
    assert not results[0][hole].any(), "rows without an image must be exactly zero"
    assert not results[1][hole].any(), "rows without an image must give no gradient"
    for number, (start, end) in enumerate(case.spans):
        assert start < end or not (results[2][number].any() or results[3][number].any()), "unseen image"
