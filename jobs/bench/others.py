"""Contenders for the Resampler's attention and the element-wise functions.

The Resampler's inputs are q, k_lat, v_lat [N, R, H, K] and k_feat, v_feat [N, J, H, K]; a stream is [rows, D].
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from jobs.bench.cases import EPS, Case
from jobs.bench.contender import Built, Contender, Function, check_launch, compile_, sdpa_backend
from kernels.dispatch import perceiver_attn
from kernels.dispatch_fused import add_layernorm, gated_relu2


def eager_perceiver(q: Tensor, k_feat: Tensor, v_feat: Tensor, k_lat: Tensor, v_lat: Tensor) -> tuple[Tensor]:
    """Run the published eager code: concatenation, whole scores, softmax.

    Args:
        q: [N, R, H, K].
        k_feat: [N, J, H, K].
        v_feat: [N, J, H, K].
        k_lat: [N, R, H, K].
        v_lat: [N, R, H, K].
    """
    q, k, v = _concatenated(q, k_feat, v_feat, k_lat, v_lat)
    scores = torch.einsum("bhid,bhjd->bhij", q * q.shape[-1] ** -0.5, k)
    scores = scores - scores.amax(dim=-1, keepdim=True).detach()
    return (torch.einsum("bhij,bhjd->bhid", scores.softmax(dim=-1), v).transpose(1, 2),)


def sdpa_perceiver(q: Tensor, k_feat: Tensor, v_feat: Tensor, k_lat: Tensor, v_lat: Tensor) -> tuple[Tensor]:
    """Run torch's fused attention on concatenations; shapes as in `eager_perceiver`, [N, R, H, K] and [N, J, H, K]."""
    return (F.scaled_dot_product_attention(*_concatenated(q, k_feat, v_feat, k_lat, v_lat)).transpose(1, 2),)


def _concatenated(
    q: Tensor, k_feat: Tensor, v_feat: Tensor, k_lat: Tensor, v_lat: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v, [N, H, rows, K]."""
    k, v = torch.cat((k_feat, k_lat), dim=1), torch.cat((v_feat, v_lat), dim=1)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def eager_add_layernorm(x: Tensor, a: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Run two operators; x and a [N, D], weight and bias [D]."""
    y = x + a
    return y, F.layer_norm(y, weight.shape, weight, bias, EPS)


def eager_gated_relu2(u: Tensor, gate: Tensor) -> tuple[Tensor]:
    """Run three operators; u [N, D], gate 0-dim."""
    return (F.relu(u).square() * gate,)


def _triton_perceiver(*inputs: Tensor) -> tuple[Tensor]:
    return (perceiver_attn(*inputs, implementation="triton"),)


def _triton_add_layernorm(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    return add_layernorm(*inputs, eps=EPS, implementation="triton")


def _triton_gated_relu2(u: Tensor, gate: Tensor) -> tuple[Tensor]:
    return (gated_relu2(u, gate, implementation="triton"),)


def _plain(case: Case, *, function: Function) -> Built:
    del case
    return Built(call=function)


def _compiled(case: Case, *, function: Function) -> Built:
    backend = "inductor" if case.device.type == "cuda" else "aot_eager"
    return Built(call=compile_(function, case.device), note=f"torch.compile, {backend}")


def _sdpa(case: Case) -> Built:
    return Built(call=sdpa_perceiver, note=sdpa_backend(*_concatenated(*case.inputs)))


def _ours(case: Case, *, function: Function) -> Built:
    check_launch(case)
    return Built(call=function)


def _three(ours: Function, eager: Function) -> tuple[Contender, ...]:
    return (
        Contender(name="triton", build=partial(_ours, function=ours), ours=True),
        Contender(name="eager", build=partial(_plain, function=eager)),
        Contender(name="compiled", build=partial(_compiled, function=eager), compiled=True),
    )


PERCEIVER = (*_three(_triton_perceiver, eager_perceiver), Contender(name="SDPA concat", build=_sdpa))
ADD_LAYERNORM = _three(_triton_add_layernorm, eager_add_layernorm)
GATED_RELU2 = _three(_triton_gated_relu2, eager_gated_relu2)
