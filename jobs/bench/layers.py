"""Contenders for a whole layer: the model's own, with one implementation of the attention or another.

The inputs of a case are the stream, the latents (or features and latents) and the layer's parameters, so that the
backward includes every weight gradient. megatron-core is needed; it is imported late.
"""

import copy
import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from jobs.bench.cases import Case, Expected, spanwise
from jobs.bench.compare import Subject
from jobs.bench.contender import Built, Contender, LeftOutError, check_launch, compile_
from jobs.bench.rows import Row
from jobs.bench.shapes import PerceiverShape, XattnShape
from jobs.bench.xattn import eager_openflamingo, varlen

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""As for the core, but the stream is rounded twice, and an update is a fifth of it."""
GATE = math.atanh(0.7)
"""Gates are open: at 0, where training starts, the layer would be checked against nothing."""

Build = Callable[[str], nn.Module]
"""Builds the layer with an implementation's name."""


def missing() -> str:
    """Return why layers cannot be built here, or an empty string."""
    if importlib.util.find_spec("megatron") is None:
        return "megatron-core is not installed, and the model's linear layers are its"
    return ""


def layer_subject(
    shape: XattnShape | PerceiverShape, device: torch.device, dtype: torch.dtype, row: Row
) -> Subject:
    """Return the comparison of the layer around an operation, with inputs and fp64 values.

    Args:
        shape: of the attention.
        device: where to.
        dtype: of inputs and parameters.
        row: fields that all rows share.
    """
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        x = torch.randn(*size, generator=generator, device=device, dtype=torch.float32).to(dtype)
        return x.requires_grad_()

    layer = _builder(shape, device, dtype)("reference")
    fill(layer, generator)
    index = None
    if isinstance(shape, XattnShape):
        stream = draw(shape.rows, shape.batch, shape.stream)
        given = {"x": stream, "latents": draw(shape.batch, shape.images, shape.latents, shape.media_width)}
        index = torch.tensor(shape.media_index(), dtype=torch.int32, device=device)
        index = index.expand(shape.batch, -1).contiguous()
    else:
        stream = draw(shape.media, shape.latents, shape.stream)
        given = {"x": stream, "features": draw(shape.media, shape.features, shape.stream)}
    named = given | dict(layer.named_parameters())
    case = Case(
        shape=shape, names=tuple(named), inputs=tuple(named.values()),
        upstream=(draw(*stream.shape).detach(),), index_BT=index,
    )  # fmt: skip
    return Subject(case=case, want=_expected(case, layer), row=row, cost=None, tolerance=TOLERANCE[dtype])


def _expected(case: Case, layer: nn.Module) -> Expected:
    """Return the fp64 values; output and stream gradient are measured by what the layer adds to them."""
    exact = copy.deepcopy(layer).double()
    inputs = [x.detach().double().requires_grad_() for x in case.inputs[:2]]
    with core(_spanwise(case)):
        out = _apply(exact, case, *inputs)
    parameters = list(exact.parameters())
    upstream = case.upstream[0].double()
    grads = torch.autograd.grad(
        out, [*inputs, *parameters], upstream, allow_unused=True, materialize_grads=True
    )
    values = (out.detach(), *grads)
    scales = [float(x.norm()) for x in values]
    scales[0] = float((values[0] - inputs[0].detach()).norm())
    scales[1] = float((values[1] - upstream).norm())
    for place, name in enumerate(case.names):
        if "gate" in name:  # one sum of many terms of either sign
            scales[place + 1] = float(upstream.norm()) * scales[0] / max(float(upstream.numel()) ** 0.5, 1.0)
    return Expected(names=("out", *(f"d{name}" for name in case.names)), values=values, scales=tuple(scales))


def _apply(layer: nn.Module, case: Case, x: Tensor, other: Tensor) -> Tensor:
    """Run a layer on its stream and latents or features; both of the shapes in `layer_subject`, result as x."""
    if isinstance(case.shape, XattnShape):
        out: Tensor = layer(x, other, case.index_BT)
    else:
        out = layer(other, x, None)
    return out


def _builder(shape: XattnShape | PerceiverShape, device: torch.device, dtype: torch.dtype) -> Build:
    """Return what builds the layer, empty, on `device`."""

    def build(implementation: Any) -> nn.Module:
        from flamingo_dist.models.gated_block import GatedBlockConfig, GatedCrossAttentionBlock
        from flamingo_dist.models.resampler import PerceiverLayer, ResamplerConfig

        with torch.device(device):
            if isinstance(shape, XattnShape):
                gated = GatedBlockConfig(
                    width=shape.stream,
                    media_width=shape.media_width,
                    heads=shape.heads,
                    head_dim=shape.head_dim,
                    ffw_hidden=4 * shape.stream,
                    gate_init=GATE,
                    implementation=implementation,
                )
                return GatedCrossAttentionBlock(gated, dtype=dtype)
            resampler = ResamplerConfig(
                feature_width=shape.stream,
                width=shape.stream,
                heads=shape.heads,
                head_dim=shape.head_dim,
                latents=shape.latents,
                implementation=implementation,
            )
            return PerceiverLayer(resampler, dtype=dtype)

    return build


@torch.no_grad()
def fill(module: nn.Module, generator: torch.Generator) -> None:
    """Fill by the parameters' tags, on their own device (the run's own filling draws on the CPU)."""
    from flamingo_dist.models.init import tag_of

    for parameter in module.parameters():
        tag = tag_of(parameter)
        if tag.std is None:
            parameter.fill_(tag.value)
        else:
            parameter.normal_(0.0, tag.std, generator=generator)


def _with_weights(case: Case, implementation: str) -> nn.Module:
    """Return the layer under another implementation on the case's own parameters."""
    assert isinstance(case.shape, XattnShape | PerceiverShape)
    layer = _builder(case.shape, case.device, case.dtype)(implementation)
    for name, value in zip(case.names[2:], case.inputs[2:], strict=True):
        parent, _, leaf = name.rpartition(".")
        assert isinstance(value, nn.Parameter), name
        layer.get_submodule(parent)._parameters[leaf] = value
    return layer


@contextmanager
def core(function: Callable[..., Tensor] | None) -> Iterator[None]:
    """Let gated blocks call `function` for their cross-attention inside."""
    import flamingo_dist.models.gated_block as block

    before = vars(block)["gated_xattn"]
    vars(block)["gated_xattn"] = before if function is None else function
    try:
        yield
    finally:
        vars(block)["gated_xattn"] = before


def _spanwise(case: Case) -> Callable[..., Tensor] | None:
    if not isinstance(case.shape, XattnShape):
        return None
    shape = case.shape

    def attend(q: Tensor, k: Tensor, v: Tensor, index_BT: Tensor, gate: Tensor | None, **_: Any) -> Tensor:
        del index_BT
        return spanwise(q, k, v, shape, gate)

    return attend


def _layer(case: Case, *, implementation: str, compiled: bool = False) -> Built:
    """Make the model's layer ready."""
    if implementation == "triton":
        check_launch(case)
    layer = _with_weights(case, implementation)
    run: Callable[..., Tensor] = partial(_apply, layer, case)
    run = compile_(run, case.device) if compiled else run
    return Built(call=lambda x, other, *_: (run(x, other),))


def _layer_with_core(case: Case, *, build: Callable[[Case], Built]) -> Built:
    """Make the layer ready with another cross-attention inside; the rest is the reference's."""
    built = build(case)
    layer = _with_weights(case, "reference")

    def attend(q: Tensor, k: Tensor, v: Tensor, index_BT: Tensor, gate: Tensor, **_: Any) -> Tensor:
        del index_BT
        return built.call(q, k, v, gate)[0]

    def call(x: Tensor, other: Tensor, *_: Tensor) -> tuple[Tensor]:
        with core(attend):
            return (_apply(layer, case, x, other),)

    return replace(built, call=call)


def _openflamingo(case: Case) -> Built:
    return Built(call=lambda q, k, v, gate: eager_openflamingo(q, k, v, gate, _index(case)))


def _index(case: Case) -> Tensor:
    if case.index_BT is None:
        raise LeftOutError("no cross-attention")
    return case.index_BT


PERCEIVER = (
    Contender(name="triton", build=partial(_layer, implementation="triton"), ours=True),
    Contender(name="reference", build=partial(_layer, implementation="reference")),
    Contender(
        name="compiled triton", ours=True, compiled=True,
        build=partial(_layer, implementation="triton", compiled=True),
    ),
    Contender(
        name="compiled reference", compiled=True, build=partial(_layer, implementation="reference", compiled=True)
    ),
)  # fmt: skip
"""The Resampler's layer: the reference concatenates and runs torch's fused attention."""

XATTN = (
    *PERCEIVER,
    Contender(name="B0 core", build=partial(_layer_with_core, build=_openflamingo)),
    Contender(name="B5 core", build=partial(_layer_with_core, build=partial(varlen, holes=False))),
)
"""GATED XATTN-DENSE: the reference's core is B3, torch's fused attention under a dense mask."""
