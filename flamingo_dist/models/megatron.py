"""The frozen language model's blocks: megatron-core `TransformerLayer` by spec, on every device.

megatron-core's `GPTModel` needs CUDA (its rotary embedding asks for a device), its layers do not. The spec
here names tensor-parallel linear layers, torch's own norms and a core attention on
`scaled_dot_product_attention`; rotary frequencies are computed here and passed in.
Shapes are sequence-first, as Megatron's are: x_TBD is [T, B, D].
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from flamingo_dist.models.gated_block import MediaKV
from flamingo_dist.models.linear import ColumnLinear, RowLinear
from flamingo_dist.models.lm_config import LMConfig
from kernels.sdpa import attention


class KeyValueCache:
    """Keys and values of the tokens seen so far, one pair per LM block, for generation."""

    def __init__(self) -> None:
        self.entries: dict[int, tuple[Tensor, Tensor]] = {}
        self.length = 0
        self.media: dict[int, MediaKV] = {}
        """Keys and values of the media, by LM block; they do not change from token to token."""

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
        self.entries[layer] = (k_BGTK, v_BGTK)
        return k_BGTK, v_BGTK

    def reorder(self, rows_B: Tensor) -> None:
        """Keep the batch rows `rows_B` ([B] int64, repeats allowed), as beam search needs."""
        self.entries = {i: (k[rows_B], v[rows_B]) for i, (k, v) in self.entries.items()}
        for media in self.media.values():
            if media.k_BMRHK is not None and media.v_BMRHK is not None:
                media.k_BMRHK, media.v_BMRHK = media.k_BMRHK[rows_B], media.v_BMRHK[rows_B]


class CausalAttention(nn.Module):
    """Causal self-attention core on `scaled_dot_product_attention`, with grouped queries.

    Right padding needs no mask: a causal row never sees what stands after it.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, **_: Any) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.cache: KeyValueCache | None = None
        """Set for the time of one cached forward by `cached`."""

    def forward(
        self,
        q_TBHK: Tensor,
        k_TBGK: Tensor,
        v_TBGK: Tensor,
        attention_mask: Tensor | None = None,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        """Attend causally.

        Args:
            q_TBHK: queries, [T, B, H, K].
            k_TBGK: keys, [T, B, G, K]; G divides H.
            v_TBGK: values, [T, B, G, K].
            attention_mask: bool [B, 1, T, T] of packed rows, True may attend, causal already; None is causal.

        Returns:
            [T, B, H*K].
        """
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q_TBHK, k_TBGK, v_TBGK))
        mask = attention_mask
        if self.cache is not None:
            k, v = self.cache.extend(self.layer_number, k, v)
            total, new = k.shape[2], q.shape[2]
            mask = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
        out = attention(q, k, v, mask=mask, is_causal=mask is None)
        return out.permute(2, 0, 1, 3).flatten(2)


def transformer_config(config: LMConfig, *, dtype: torch.dtype, tp_size: int) -> TransformerConfig:
    """Return megatron-core's configuration for the LM `config` with parameters of `dtype`."""
    gated = config.activation == "silu_gated"
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.width,
        num_attention_heads=config.num_heads,
        num_query_groups=config.num_kv_heads,
        kv_channels=config.head_dim,
        ffn_hidden_size=config.ffn_width,
        normalization="RMSNorm" if config.norm == "rms" else "LayerNorm",
        layernorm_epsilon=config.norm_eps,
        gated_linear_unit=gated,
        activation_func=F.silu if gated else F.gelu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp_size,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,
        # Fused parts are CUDA-only (Transformer Engine, Apex); the plain ones run everywhere.
        apply_rope_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )


def layer_spec() -> ModuleSpec:
    """Return the spec of one decoder block: pre-norm self-attention and MLP, no fused part."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=WrappedTorchNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnLinear,
                    core_attention=CausalAttention,
                    linear_proj=RowLinear,
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=WrappedTorchNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def rotary_frequencies(
    length: int, config: LMConfig, *, offset: int = 0, device: torch.device | None = None
) -> Tensor:
    """Return the rotary angles of positions offset ... offset + length - 1.

    Returns:
        fp32 [length, 1, 1, K], half-split layout (angles repeated, as Hugging Face LLaMA has them).
    """
    return rotary_angles(torch.arange(offset, offset + length, device=device), config)[:, None, None, :]


def rotary_angles(positions: Tensor, config: LMConfig) -> Tensor:
    """Return the rotary angles of positions of any shape [N].

    Returns:
        fp32 [N, K], half-split layout.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    inverse = 1.0 / (config.rope_base ** (exponents / config.head_dim))
    angles = positions.float()[..., None] * inverse
    return torch.cat([angles, angles], dim=-1)


def segment_mask(segments_BT: Tensor) -> Tensor:
    """Return who may attend to whom in packed rows: earlier tokens of the same segment, and oneself.

    Args:
        segments_BT: integer [B, T].

    Returns:
        bool [B, 1, T, T], rows are queries.
    """
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    return same_BTT.tril()[:, None]


def segment_positions(segments_BT: Tensor) -> Tensor:
    """Return the position of each token in its own segment.

    Args:
        segments_BT: integer [B, T]; a segment is a run of equal numbers.

    Returns:
        int64 [B, T], from 0.
    """
    places_T = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    begins_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    begins_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    starts_BT = torch.where(begins_BT, places_T, 0).cummax(dim=1).values
    return places_T - starts_BT
