"""The frozen vocabulary, sharded over the tensor-parallel group, and the trainable rows beside it."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from flamingo_dist.models.init import tag
from flamingo_dist.models.linear import sum_grad_over_tp, tp_size
from flamingo_dist.models.lm_config import LMConfig

IGNORE = -100
"""Target of a position that carries no loss."""


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Return the smallest multiple of `tp_size` that holds `vocab_size` rows."""
    return -(-vocab_size // tp_size) * tp_size


class ExtraRows(nn.Module):
    """Trainable rows for the tokens that the frozen LM does not know, replicated on every rank.

    `<image>` at `vocab_size`, `<EOC>` at `vocab_size + 1`, then those of `LMConfig.further_tokens`.
    """

    def __init__(self, config: LMConfig, dtype: torch.dtype) -> None:
        super().__init__()
        rows = torch.empty(config.extra_tokens, config.width, dtype=dtype)
        self.weight = tag(nn.Parameter(rows), std=0.02)

    def forward(self, x: Tensor, *, as_head: bool = False) -> Tensor:
        """Look rows up, or project on them.

        Args:
            x: indices into the rows, int64 of any shape [N]; with `as_head`, hidden states [..., D].
            as_head: whether to project.

        Returns:
            [N, D], or with `as_head` logits of shape [..., X], X the number of rows.
        """
        return F.linear(x, self.weight) if as_head else F.embedding(x, self.weight)


class FrozenVocabulary(VocabParallelEmbedding):
    """The frozen embedding that may also serve as the head (tied weights).

    Both uses go through `forward`: ZeRO-3 gathers a module's weights around its forward alone.
    """

    def __init__(self, config: LMConfig, megatron: TransformerConfig) -> None:
        rows = padded_vocab_size(config.vocab_size, megatron.tensor_model_parallel_size)
        super().__init__(rows, config.width, init_method=lambda _: None, config=megatron)
        tag(self.weight, std=0.02, partition_dim=0)

    def forward(self, x: Tensor, *, as_head: bool = False) -> Tensor:
        """Embed ids, or project hidden states on this rank's part of the vocabulary.

        Args:
            x: ids [...] int64 below `vocab_size`; with `as_head`, hidden states [..., D].
            as_head: whether to project.

        Returns:
            [..., D], or with `as_head` this rank's logits of shape [..., V / TP].
        """
        if as_head:
            return F.linear(sum_grad_over_tp(x), self.weight)
        return super().forward(x)


class Vocabulary(nn.Module):
    """Embedding and head over the frozen vocabulary and the trainable rows.

    The paper says that `<EOC>` is learnt but not how it gets a logit under a frozen tied softmax. Here the
    head has trainable rows of its own, apart from the input rows, as IDEFICS has them.
    """

    def __init__(self, config: LMConfig, megatron: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.frozen = FrozenVocabulary(config, megatron)
        self.frozen_head = None if config.tied else FrozenVocabulary(config, megatron)
        self.extra = ExtraRows(config, megatron.params_dtype)
        self.extra_head = ExtraRows(config, megatron.params_dtype)

    def forward(self, x: Tensor, *, as_head: bool = False, targets_N: Tensor | None = None) -> Tensor:
        """Embed ids, or give the logits or the losses of hidden states.

        Args:
            x: ids int64 [B, T]; with `as_head`, hidden states [B, T, D]; with `targets_N`, [N, D].
            as_head: whether to return logits.
            targets_N: ids below `vocab_size + extra_tokens`, int64 [N]; returns their losses.

        Returns:
            [B, T, D], logits [B, T, V + X], or fp32 losses [N] in nats.
        """
        if targets_N is not None:
            return self.nll(x, targets_N)
        return self.logits(x) if as_head else self.embed(x)

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Embed `tokens_BT` (int64 [B, T], below `vocab_size + extra_tokens`) into [B, T, D]."""
        first_extra = self.config.vocab_size
        is_extra = tokens_BT >= first_extra
        frozen = self.frozen(tokens_BT.masked_fill(is_extra, 0))
        extra = self.extra((tokens_BT - first_extra).clamp(min=0))
        return torch.where(is_extra[..., None], extra, frozen)

    def _local_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return this rank's logits [..., V / TP], padding rows at -inf, and the extra ones [..., 2]."""
        head = self.frozen if self.frozen_head is None else self.frozen_head
        local = head(x, as_head=True)
        surplus = head.vocab_end_index - self.config.vocab_size
        if surplus > 0:
            is_padding = torch.arange(local.shape[-1], device=x.device) >= local.shape[-1] - surplus
            local = local.masked_fill(is_padding, float("-inf"))
        return local, self.extra_head(x, as_head=True)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Return the logits [B, T, V + X] of the hidden states `x_BTD`, gathered over the TP group, no gradient.

        megatron-core's own gather allocates on a CUDA device, whatever the input's.
        """
        local, extra = self._local_logits(x_BTD)
        full, extra = local.detach().contiguous(), extra.detach()
        if tp_size() > 1:
            parts = [torch.empty_like(full) for _ in range(tp_size())]
            dist.all_gather(parts, full, group=parallel_state.get_tensor_model_parallel_group())
            full = torch.cat(parts, dim=-1)
        return torch.cat([full[..., : self.config.vocab_size], extra], dim=-1)

    def nll(self, x_ND: Tensor, targets_N: Tensor) -> Tensor:
        """Return the negative log-likelihoods of `targets_N` under the full vocabulary.

        Args:
            x_ND: hidden states, [N, D].
            targets_N: ids below `vocab_size + extra_tokens`, int64 [N].

        Returns:
            fp32 [N], nats.
        """
        local, extra = self._local_logits(x_ND)
        return parallel_nll(
            local.float(),
            extra.float(),
            targets_N,
            vocab_size=self.config.vocab_size,
            vocab_start=self.frozen.vocab_start_index,
        )


def parallel_nll(
    local_NV: Tensor, extra_NE: Tensor, targets_N: Tensor, *, vocab_size: int, vocab_start: int
) -> Tensor:
    """Cross-entropy over logits sharded over the tensor-parallel group plus a few replicated ones.

    megatron-core's `vocab_parallel_cross_entropy` wants equal shards and no replicated columns; this one
    takes the extra columns as they are.

    Args:
        local_NV: this rank's logits, fp32 [N, V / TP].
        extra_NE: logits of the extra tokens, equal on every rank, fp32 [N, E].
        targets_N: int64 [N], below vocab_size + E.
        vocab_size: rows of the frozen vocabulary.
        vocab_start: id of this rank's first row.

    Returns:
        fp32 [N], nats.
    """
    peak_N = torch.maximum(local_NV.detach().amax(-1), extra_NE.detach().amax(-1))
    if tp_size() > 1:
        group = parallel_state.get_tensor_model_parallel_group()
        dist.all_reduce(peak_N, op=dist.ReduceOp.MAX, group=group)
    # megatron-core's reduction returns its input unreduced if that is not contiguous; sums and picks are.
    local_sum_N = (local_NV - peak_N[:, None]).exp().sum(-1)
    total_N = reduce_from_tensor_model_parallel_region(local_sum_N)
    total_N = total_N + (extra_NE - peak_N[:, None]).exp().sum(-1)

    is_extra = targets_N >= vocab_size
    index_N = targets_N - vocab_start
    is_local = (index_N >= 0) & (index_N < local_NV.shape[-1]) & ~is_extra
    picked = local_NV.gather(-1, index_N.clamp(0, local_NV.shape[-1] - 1)[:, None])[:, 0]
    target_N = reduce_from_tensor_model_parallel_region(torch.where(is_local, picked, 0.0))
    picked = extra_NE.gather(-1, (targets_N - vocab_size).clamp(min=0)[:, None])[:, 0]
    target_N = target_N + torch.where(is_extra, picked, 0.0)
    return total_N.log() + peak_N - target_N
