"""The frozen vocabulary, sharded over the tensor-parallel group, and the trainable rows beside it."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from flamingo_dist.models.head_loss import HeadShard, frozen_head_nll
from flamingo_dist.models.init import tag
from flamingo_dist.models.linear import linear, tp_size
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
        return linear(x, self.weight) if as_head else F.embedding(x, self.weight)


class FrozenVocabulary(VocabParallelEmbedding):
    """The frozen embedding that may also serve as the head (tied weights).

    Both uses go through `forward`: ZeRO-3 gathers a module's weights around its forward alone.
    """

    def __init__(self, config: LMConfig, megatron: TransformerConfig) -> None:
        rows = padded_vocab_size(config.vocab_size, megatron.tensor_model_parallel_size)
        super().__init__(rows, config.width, init_method=lambda _: None, config=megatron)
        tag(self.weight, std=0.02, partition_dim=0)
        self.vocab_size = config.vocab_size

    def forward(
        self,
        x: Tensor,
        extra_NX: Tensor | None = None,
        targets_N: Tensor | None = None,
        *,
        as_head: bool = False,
    ) -> Tensor:
        """Embed ids, or give this rank's part of hidden states' logits, or their losses.

        Args:
            x: ids [...] int64 below `vocab_size`; with `as_head`, hidden states [..., D], [N, D] for losses.
            extra_NX: for losses, the logits of the trainable rows [N, X].
            targets_N: for losses, ids below `vocab_size` + X, int64 [N].
            as_head: whether `x` is hidden states.

        Returns:
            [..., D]; with `as_head` this rank's logits of shape [..., V / TP], without a gradient, or fp32 losses
            [N] in nats.
        """
        if not as_head:
            return super().forward(x)
        if extra_NX is None or targets_N is None:
            return F.linear(x.detach(), self.weight)
        shard = HeadShard(weight_VD=self.weight, start=self.vocab_start_index, vocab_size=self.vocab_size)
        return frozen_head_nll(x, extra_NX, targets_N, shard)


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

    @property
    def _head(self) -> FrozenVocabulary:
        return self.frozen if self.frozen_head is None else self.frozen_head

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Return the logits [B, T, V + X] of the hidden states `x_BTD`, gathered over the TP group, no gradient.

        megatron-core's own gather allocates on a CUDA device, whatever the input's.
        """
        full = self._head(x_BTD, as_head=True).contiguous()
        extra = self.extra_head(x_BTD, as_head=True).detach()
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
        return self._head(x_ND, self.extra_head(x_ND, as_head=True), targets_N, as_head=True)
