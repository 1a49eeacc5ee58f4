"""Losses over a frozen head and a few trainable rows, without the whole batch's logits in memory.

A head that is not trained needs no logits in the backward: a token's gradient is its loss's own, times what comes from
above. So the forward goes through the tokens in chunks, and for each makes the logits, the loss and the gradient of
the hidden states; the chunk's logits are then gone. Nothing is computed twice.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from flamingo_dist.models.linear import tp_size

CHUNK_LOGITS = 2**25
"""Logits that stand in memory at once, on a rank: 1,048 tokens of a vocabulary of 32,000, 200 MB in bf16 with their
logarithms in fp32."""


def chunk_tokens(vocabulary: float) -> int:
    """Return how many tokens go by at once where a rank has `vocabulary` rows of the head."""
    return max(1, int(CHUNK_LOGITS // vocabulary))


@dataclass(frozen=True, kw_only=True)
class HeadShard:
    """Rows of the frozen head that lie on one rank."""

    weight_VD: Tensor
    """[V / TP, D], padding rows included."""
    start: int
    """Id of the first row."""
    vocab_size: int
    """Rows of the whole head that stand for a token; ids from here on are the trainable rows."""


def frozen_head_nll(x_ND: Tensor, extra_NX: Tensor, targets_N: Tensor, head: HeadShard) -> Tensor:
    """Return the cross-entropy of each token over the sharded frozen vocabulary and the replicated extra logits.

    Every rank of the tensor-parallel group calls it with the same tokens.

    Args:
        x_ND: hidden states, equal on the ranks, [N, D].
        extra_NX: logits of the trainable rows, equal on the ranks, [N, X].
        targets_N: ids below vocab_size + X, int64 [N].
        head: this rank's rows; they get no gradient.

    Returns:
        fp32 [N], nats. The gradient of `x_ND` is summed over the group.

    Raises:
        ValueError: the head's weight wants a gradient.
    """
    if head.weight_VD.requires_grad:
        raise ValueError("the head's weight requires a gradient, but this loss gives none: freeze it.")
    wanted = torch.is_grad_enabled() and (x_ND.requires_grad or extra_NX.requires_grad)
    nll_N: Tensor = _FrozenHeadNll.apply(x_ND, extra_NX, targets_N, head, wanted)
    return nll_N


class _FrozenHeadNll(torch.autograd.Function):
    """`frozen_head_nll`; the last argument says whether gradients will be asked for."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, extra_NX: Tensor, targets_N: Tensor, head: HeadShard, wanted: bool
    ) -> Tensor:
        wide = torch.promote_types(x_ND.dtype, torch.float32)
        nll_N = x_ND.new_empty(len(x_ND), dtype=wide)
        grads = (torch.empty_like(x_ND), torch.empty_like(extra_NX, dtype=wide)) if wanted else ()
        rows = chunk_tokens(head.weight_VD.shape[0])
        for first in range(0, len(x_ND), rows):
            chunk = slice(first, first + rows)
            parts = (grad[chunk] for grad in grads)
            _chunk(x_ND[chunk], extra_NX[chunk].to(wide), targets_N[chunk], head, nll_N[chunk], *parts)
        if grads:
            _all_reduce(grads[0])
            ctx.save_for_backward(*grads)
            ctx.extra_dtype = extra_NX.dtype
        return nll_N.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dnll_N: Tensor) -> tuple[Tensor | None, ...]:
        dx_ND, dextra_NX = ctx.saved_tensors
        scale_N1 = dnll_N[:, None]
        return (
            (dx_ND * scale_N1).to(dx_ND.dtype),
            (dextra_NX * scale_N1).to(ctx.extra_dtype),
            None,
            None,
            None,
        )


def _chunk(
    x_ND: Tensor,
    extra_NX: Tensor,
    targets_N: Tensor,
    head: HeadShard,
    nll_N: Tensor,
    dx_ND: Tensor | None = None,
    dextra_NX: Tensor | None = None,
) -> None:
    """Write the losses of some tokens and, where wanted, their gradients, this rank's part of x's.

    Args:
        x_ND: hidden states [N, D].
        extra_NX: logits of the trainable rows, at least fp32 [N, X].
        targets_N: ids, int64 [N].
        head: this rank's rows.
        nll_N: receives the losses [N], in the dtype of the extra logits.
        dx_ND: receives the gradient by the hidden states [N, D], or None.
        dextra_NX: receives the gradient by the extra logits [N, X], or None.
    """
    local_NV = F.linear(x_ND, head.weight_VD)
    padding = head.start + local_NV.shape[1] - head.vocab_size
    if padding > 0:  # not -inf: a rank may hold nothing else
        local_NV[:, max(0, local_NV.shape[1] - padding) :] = torch.finfo(local_NV.dtype).min
    log_NV = torch.log_softmax(local_NV, -1, dtype=extra_NX.dtype)
    own_N = local_NV[:, 0].to(extra_NX.dtype) - log_NV[:, 0]  # the logarithm of this rank's sum

    row_N = torch.arange(len(x_ND), device=x_ND.device)
    is_extra_N = targets_N >= head.vocab_size
    place_N = targets_N - head.start
    is_local_N = (place_N >= 0) & (place_N < local_NV.shape[1]) & ~is_extra_N
    place_N = place_N.clamp(0, local_NV.shape[1] - 1)
    extra_N = (targets_N - head.vocab_size).clamp(min=0)
    picked_N = torch.where(is_local_N, local_NV[row_N, place_N].to(extra_NX.dtype), 0.0)
    picked_extra_N = torch.where(is_extra_N, extra_NX[row_N, extra_N], 0.0)
    del local_NV

    beside_N = extra_NX.logsumexp(-1)
    peak_N = torch.maximum(own_N, beside_N)
    _all_reduce(peak_N, dist.ReduceOp.MAX)
    sums_2N = torch.stack([(own_N - peak_N).exp(), picked_N])
    _all_reduce(sums_2N)
    total_N = peak_N + (sums_2N[0] + (beside_N - peak_N).exp()).log()
    torch.sub(total_N, sums_2N[1] + picked_extra_N, out=nll_N)
    if dx_ND is None or dextra_NX is None:
        return
    p_NV = log_NV.add_((own_N - total_N)[:, None]).exp_()
    p_NV[row_N, place_N] -= is_local_N.to(p_NV.dtype)
    torch.mm(p_NV.to(x_ND.dtype), head.weight_VD, out=dx_ND)
    torch.exp(extra_NX - total_N[:, None], out=dextra_NX)
    dextra_NX[row_N, extra_N] -= is_extra_N.to(dextra_NX.dtype)


def _all_reduce(x: Tensor, op: Any = dist.ReduceOp.SUM) -> None:
    """Reduce `x` (any shape) in place over the tensor-parallel group, if there is more than one rank."""
    if tp_size() > 1:
        dist.all_reduce(x, op=op, group=parallel_state.get_tensor_model_parallel_group())
