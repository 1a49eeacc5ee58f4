"""Cores of the frozen LM's self-attention, for megatron-core's layer spec, and what generation keeps of them."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from flamingo_dist.models.gated_block import MediaKV
from flamingo_dist.models.init import tag
from flamingo_dist.models.linear import column_linear, tp_share
from flamingo_dist.models.positions import shift_distances
from kernels.sdpa import attention


class KeyValueCache:
    """Keys and values of the tokens seen so far, one pair per LM block, for generation."""

    def __init__(self, *, keeps: bool = True) -> None:
        """Start empty; with `keeps` off, what a forward adds is forgotten with it."""
        self.keeps = keeps
        self.entries: dict[int, tuple[Tensor, Tensor]] = {}
        self.length = 0
        self.media: dict[int, MediaKV] = {}
        """Keys and values of the media, by LM block; they do not change from token to token."""
        self.distances: dict[int, Tensor] = {}
        """Projected distances [S, H, K] of relative positions, by LM block; a distance keeps its projection."""

    def extend(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new tokens' keys and values and return all of them.

        Args:
            layer: number of the LM block.
            k_BGTK: new keys, [B, G, T, K] with G key/value heads of this rank.
            v_BGTK: new values, [B, G, T, K].

        Returns:
            Keys and values of all tokens, each [B, G, T_all, K].
        """
        if layer in self.entries:
            k_old, v_old = self.entries[layer]
            k_BGTK = torch.cat([k_old, k_BGTK], dim=2)
            v_BGTK = torch.cat([v_old, v_BGTK], dim=2)
        if self.keeps:
            self.entries[layer] = (k_BGTK, v_BGTK)
        return k_BGTK, v_BGTK

    def reorder(self, rows_B: Tensor) -> None:
        """Keep the batch rows `rows_B` ([B] int64, repeats allowed), as beam search needs."""
        self.entries = {i: (k[rows_B], v[rows_B]) for i, (k, v) in self.entries.items()}
        for media in self.media.values():
            if media.k_BMRHK is not None and media.v_BMRHK is not None:
                media.k_BMRHK, media.v_BMRHK = media.k_BMRHK[rows_B], media.v_BMRHK[rows_B]

    def fork(self, row: int, copies: int) -> "KeyValueCache":
        """Return a cache for one forward, of `copies` rows that each continue row `row` of this one.

        The rows are views of one; what the forward joins to them lives as long as its layer.
        """

        def spread(tensor: Tensor) -> Tensor:
            return tensor[row : row + 1].expand(copies, *tensor.shape[1:])

        forked = KeyValueCache(keeps=False)
        forked.length, forked.distances = self.length, dict(self.distances)
        forked.entries = {i: (spread(k), spread(v)) for i, (k, v) in self.entries.items()}
        for i, media in self.media.items():
            if media.k_BMRHK is not None and media.v_BMRHK is not None:
                forked.media[i] = MediaKV(k_BMRHK=spread(media.k_BMRHK), v_BMRHK=spread(media.v_BMRHK))
        return forked


class CausalAttention(nn.Module):
    """Causal self-attention core on `scaled_dot_product_attention`, with grouped queries.

    Right padding needs no mask: a causal row never sees what stands after it. A given bias, such as ALiBi's, is
    added to the scores.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, **_: Any) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.cache: KeyValueCache | None = None
        """Set for the time of one cached forward by `LanguageModel.caching`."""

    def forward(
        self,
        q_TBHK: Tensor,
        k_TBGK: Tensor,
        v_TBGK: Tensor,
        attention_mask: Tensor | None = None,
        *_: Any,
        attention_bias: Tensor | None = None,
        **__: Any,
    ) -> Tensor:
        """Attend causally.

        Args:
            q_TBHK: queries, [T, B, H, K].
            k_TBGK: keys, [T, B, G, K]; G divides H.
            v_TBGK: values, [T, B, G, K].
            attention_mask: bool [B, 1, T, T] of packed rows, True may attend, causal already; None is causal.
            attention_bias: what `score_bias` needs of positions, from `LanguageModel.embed`, or None.

        Returns:
            [T, B, H*K].
        """
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q_TBHK, k_TBGK, v_TBGK))
        if self.cache is not None:
            k, v = self.cache.extend(self.layer_number, k, v)
        mask, (total, new) = attention_mask, (k.shape[2], q.shape[2])
        if self.cache is not None or (attention_bias is not None and mask is None):
            mask = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
        if attention_bias is not None and mask is not None:
            q, bias = self.score_bias(q, attention_bias)
            mask = bias.masked_fill(~mask, float("-inf"))
        out = attention(q, k, v, mask=mask, is_causal=mask is None)
        return out.permute(2, 0, 1, 3).flatten(2)

    def score_bias(self, q_BHTK: Tensor, attention_bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return the queries to score keys with, and what is added to the scores.

        Args:
            q_BHTK: queries, [B, H, T, K].
            attention_bias: ALiBi's bias, [1, H, T, S] floating.

        Returns:
            [B, H, T, K], and [1 or B, H, T, S].
        """
        return q_BHTK, attention_bias.to(q_BHTK.dtype)


class RelativeAttention(CausalAttention):
    """Attention with Transformer-XL's relative positions (Dai et al. 2019), as Gopher and Chinchilla have them.

    Score of query i and key j: (q_i + u) k_j + (q_i + v) W_R r_(i-j), with r the sinusoid of a distance, and W_R,
    u and v of this layer. Heads, and so W_R's rows, u and v, are tensor-parallel.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, **_: Any) -> None:
        super().__init__(config, layer_number)
        heads, self.head_dim, dtype = config.num_attention_heads, config.kv_channels, config.params_dtype
        self.position = column_linear(
            config.hidden_size, heads * self.head_dim, sum_input_grad=False, dtype=dtype
        )
        shape = (tp_share(heads, "lm.num_heads"), self.head_dim)
        self.content_bias = tag(nn.Parameter(torch.empty(shape, dtype=dtype)), std=0.02, partition_dim=0)
        self.position_bias = tag(nn.Parameter(torch.empty(shape, dtype=dtype)), std=0.02, partition_dim=0)

    def score_bias(self, q_BHTK: Tensor, attention_bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return the queries to score keys with, and the positions' scores.

        Args:
            q_BHTK: queries, [B, H, T, K].
            attention_bias: sinusoids of the distances 0 ... S - 1, fp32 [S, D].

        Returns:
            [B, H, T, K], and [B, H, T, S] scaled as the keys' scores will be.
        """
        r_SHK = self._projected(attention_bias)
        scores_BHTS = torch.einsum("bhtk,shk->bhts", q_BHTK + self.position_bias[:, None], r_SHK.flip(0))
        bias_BHTS = shift_distances(scores_BHTS) * self.head_dim**-0.5
        return q_BHTK + self.content_bias[:, None], bias_BHTS

    def _projected(self, sinusoids_SD: Tensor) -> Tensor:
        """Return W_R of the sinusoids [S, D] as [S, H, K]; a cache keeps what earlier tokens needed."""
        known = None if self.cache is None else self.cache.distances.get(self.layer_number)
        fresh = sinusoids_SD if known is None else sinusoids_SD[known.shape[0] :]
        r_SHK: Tensor = self.position(fresh.to(self.content_bias.dtype))[0].unflatten(-1, (-1, self.head_dim))
        if known is not None:
            r_SHK = torch.cat([known, r_SHK])
        if self.cache is not None:
            self.cache.distances[self.layer_number] = r_SHK
        return r_SHK
