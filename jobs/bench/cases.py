"""Inputs of a shape, and what must come out: outputs and gradients in fp64, computed another way.

The fp64 references go image by image or medium by medium, so that they fit beside the largest shapes, and are written
here rather than taken from `kernels`: a contender is checked against something that shares no line with it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jobs.bench.shapes import AddNormShape, PerceiverShape, Relu2Shape, Shape, XattnShape

EPS = 1e-5
"""Epsilon of the LayerNorm."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A shape with tensors in it."""

    shape: Shape
    names: tuple[str, ...]
    """Names of the inputs."""
    inputs: tuple[Tensor, ...]
    """Differentiable inputs."""
    upstream: tuple[Tensor, ...]
    """Gradients of the outputs."""
    index_BT: Tensor | None = None
    """int32 [B, T]: the image that each row sees, for cross-attention."""

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.inputs[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of inputs and outputs."""
        return self.inputs[0].dtype

    @property
    def attention(self) -> XattnShape:
        """The shape, which must be one of cross-attention."""
        assert isinstance(self.shape, XattnShape), self.shape
        return self.shape


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What must come out, fp64: outputs, then gradients of the inputs."""

    names: tuple[str, ...]
    values: tuple[Tensor, ...]
    scales: tuple[float, ...]
    """What an error is measured against: the norm, except for a gradient that is one sum of many terms."""


def make_case(shape: Shape, *, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Case:
    """Draw random inputs of `shape`.

    Args:
        shape: what to draw.
        device: where to.
        dtype: of all of them.
        seed: of the generator.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size: int) -> Tensor:
        x = torch.randn(*size, generator=generator, device=device, dtype=torch.float32).to(dtype)
        return x.requires_grad_()

    gate = torch.tensor(math.tanh(0.9), device=device, dtype=dtype).requires_grad_()
    index = None
    if isinstance(shape, XattnShape):
        q = draw(shape.batch, shape.rows, shape.heads, shape.head_dim)
        media = (shape.batch, shape.images, shape.latents, shape.heads, shape.head_dim)
        named = {"q": q, "k": draw(*media), "v": draw(*media), "gate": gate}
        outputs: tuple[tuple[int, ...], ...] = (tuple(q.shape),)
        index = torch.tensor(shape.media_index(), dtype=torch.int32, device=device).expand(shape.batch, -1)
        index = index.contiguous()
    elif isinstance(shape, PerceiverShape):
        latents = (shape.media, shape.latents, shape.heads, shape.head_dim)
        features = (shape.media, shape.features, shape.heads, shape.head_dim)
        named = {"q": draw(*latents), "k_feat": draw(*features), "v_feat": draw(*features)}
        named |= {"k_lat": draw(*latents), "v_lat": draw(*latents)}
        outputs = (latents,)
    elif isinstance(shape, AddNormShape):
        rows = (shape.rows, shape.width)
        named = {"x": draw(*rows), "a": draw(*rows), "weight": draw(shape.width), "bias": draw(shape.width)}
        outputs = (rows, rows)
    else:
        assert isinstance(shape, Relu2Shape)
        named = {"u": draw(shape.rows, shape.width), "gate": gate}
        outputs = ((shape.rows, shape.width),)
    return Case(
        shape=shape,
        names=tuple(named),
        inputs=tuple(named.values()),
        upstream=tuple(draw(*size).detach() for size in outputs),
        index_BT=index,
    )


def expected(case: Case) -> Expected:
    """Return the fp64 outputs and gradients of `case`."""
    makers: dict[type, Callable[[Case], Expected]] = {
        XattnShape: _expected_xattn,
        PerceiverShape: _expected_perceiver,
        AddNormShape: _expected_add_norm,
        Relu2Shape: _expected_relu2,
    }
    return makers[type(case.shape)](case)


def spanwise(q: Tensor, k: Tensor, v: Tensor, shape: XattnShape, gate: Tensor | None) -> Tensor:
    """Cross-attention image by image, differentiable: no mask, no padding, no score that is not needed.

    Args:
        q: [B, T, H, K].
        k: [B, M, R, H, K].
        v: [B, M, R, H, K].
        shape: whose spans count.
        gate: 0-dim or None.

    Returns:
        [B, T, H, K].
    """
    parts, at = [], 0
    for image, (start, end) in enumerate(shape.spans()):
        if start == end:
            continue
        if start > at:
            parts.append(0.0 * q[:, at:start])  # in the graph: a batch may hold nothing else
        scores = torch.einsum("bthk,brhk->bhtr", q[:, start:end], k[:, image]) / shape.head_dim**0.5
        parts.append(torch.einsum("bhtr,brhk->bthk", scores.softmax(-1), v[:, image]))
        at = end
    if at < shape.rows:
        parts.append(0.0 * q[:, at:])
    out = torch.cat(parts, dim=1)
    return out if gate is None else out * gate


def _expected_xattn(case: Case) -> Expected:
    q, k, v, gate = (x.detach().double().requires_grad_() for x in case.inputs)
    out = spanwise(q, k, v, case.attention, None)
    upstream = case.upstream[0].double()
    dq, dk, dv = _gradients((out,), (q, k, v), (upstream * gate.detach(),))
    with torch.no_grad():
        deltas = (upstream * out).sum(-1)
        values = (out * gate, dq, dk, dv, deltas.sum())
        # The gate's gradient is one sum of a term a row and head, of either sign: their size is the scale.
        scales = (*(_norm(x) for x in values[:4]), _norm(deltas))
    return Expected(names=("out", "dq", "dk", "dv", "dgate"), values=values, scales=scales)


def _expected_perceiver(case: Case) -> Expected:
    parts: list[tuple[Tensor, ...]] = []
    for n in range(case.inputs[0].shape[0]):
        q, k_feat, v_feat, k_lat, v_lat = (x[n].detach().double().requires_grad_() for x in case.inputs)
        scores = torch.cat(
            [torch.einsum("rhk,jhk->hrj", q, k_feat), torch.einsum("rhk,jhk->hrj", q, k_lat)], dim=-1
        )
        weights = (scores / q.shape[-1] ** 0.5).softmax(-1)
        features = k_feat.shape[0]
        out = torch.einsum("hrj,jhk->rhk", weights[..., :features], v_feat)
        out = out + torch.einsum("hrj,jhk->rhk", weights[..., features:], v_lat)
        inputs = (q, k_feat, v_feat, k_lat, v_lat)
        parts.append((out.detach(), *_gradients((out,), inputs, (case.upstream[0][n].double(),))))
    return _by_norm(case, ("out",), tuple(torch.stack(column) for column in zip(*parts, strict=True)))


def _expected_add_norm(case: Case) -> Expected:
    x, a, weight, bias = (t.detach().double().requires_grad_() for t in case.inputs)
    y = x + a
    # The kernel normalises the sum as computed in fp32; the sum as stored is what the backward pass reads.
    centred = y - y.mean(-1, keepdim=True)
    z = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + EPS) * weight + bias
    grads = _gradients((y, z), (x, a, weight, bias), tuple(u.double() for u in case.upstream))
    return _by_norm(case, ("y", "z"), (y.detach(), z.detach(), *grads))


def _expected_relu2(case: Case) -> Expected:
    u, gate = case.inputs[0].detach().double(), case.inputs[1].detach().double()
    upstream = case.upstream[0].double()
    positive = u.clamp(min=0)
    terms = upstream * positive * positive
    values = (gate * positive * positive, 2 * gate * upstream * positive, terms.sum())
    return Expected(
        names=("out", "du", "dgate"), values=values, scales=(*map(_norm, values[:2]), _norm(terms))
    )


def _by_norm(case: Case, outputs: tuple[str, ...], values: tuple[Tensor, ...]) -> Expected:
    names = (*outputs, *(f"d{name}" for name in case.names))
    return Expected(names=names, values=values, scales=tuple(map(_norm, values)))


def _gradients(outputs: Any, inputs: Any, upstream: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, inputs, upstream, allow_unused=True, materialize_grads=True)


def _norm(x: Tensor) -> float:
    return float(x.norm())
