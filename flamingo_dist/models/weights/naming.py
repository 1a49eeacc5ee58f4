"""What the families call their tensors."""

from dataclasses import dataclass, replace

from flamingo_dist.models.lm_config import Naming


@dataclass(frozen=True, kw_only=True)
class Names:
    """A family's tensor names, without `.weight` and `.bias`."""

    roots: tuple[str, ...]
    """What stands before all names but the head's: as the causal LM is saved, then as other exports have it."""
    embedding: str
    """Token embedding."""
    final_norm: str
    """Norm before the head."""
    block: str
    """What stands before a block's names, with its number to be put in."""
    input_norm: str
    """Norm before attention."""
    mlp_norm: str
    """Norm before the feed-forward part."""
    qkv: tuple[str, ...]
    """Queries, keys and values: three matrices, or one with all queries first."""
    proj: str
    """Output projection of attention."""
    up: tuple[str, ...]
    """Gate and up projection where the feed-forward part is gated, or up projection."""
    down: str
    """Down projection."""
    qk_norms: tuple[str, str] = ("self_attn.q_norm", "self_attn.k_norm")
    """Norms of queries and keys."""
    positions: str = ""
    """Table of learned positions."""
    relative: tuple[str, str, str] = ("self_attn.r_proj", "self_attn.r_w_bias", "self_attn.r_r_bias")
    """Relative positions: projection, content bias u, position bias v. No public LM of this kind has LLaMA's names;
    these are Transformer-XL's."""
    transposed: bool = False
    """Whether matrices are stored [in, out] (GPT-2's Conv1D)."""
    ignored: str = r"rotary_emb\.inv_freq$"
    """Pattern of stored tensors that are no weights."""


LLAMA = Names(
    roots=("model.", ""),
    embedding="embed_tokens",
    final_norm="norm",
    block="layers.{}.",
    input_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    proj="self_attn.o_proj",
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
)
OPT = Names(
    roots=("model.decoder.", "decoder.", ""),
    embedding="embed_tokens",
    final_norm="final_layer_norm",
    block="layers.{}.",
    input_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    proj="self_attn.out_proj",
    up=("fc1",),
    down="fc2",
    positions="embed_positions",
)
GPT2 = Names(
    roots=("transformer.", ""),
    embedding="wte",
    final_norm="ln_f",
    block="h.{}.",
    input_norm="ln_1",
    mlp_norm="ln_2",
    qkv=("attn.c_attn",),
    proj="attn.c_proj",
    up=("mlp.c_fc",),
    down="mlp.c_proj",
    positions="wpe",
    transposed=True,
    ignored=r"\.attn\.(bias|masked_bias)$",
)
MPT = Names(
    roots=("transformer.", "", "model.transformer."),
    embedding="wte",
    final_norm="norm_f",
    block="blocks.{}.",
    input_norm="norm_1",
    mlp_norm="norm_2",
    qkv=("attn.Wqkv",),
    proj="attn.out_proj",
    up=("ffn.up_proj",),
    down="ffn.down_proj",
    qk_norms=("attn.q_ln", "attn.k_ln"),
)
MOSAIC_GPT = replace(
    MPT, final_norm="ln_f", input_norm="ln_1", mlp_norm="ln_2", up=("mlp.mlp_up",), down="mlp.mlp_down"
)
NAMES: dict[Naming, Names] = {
    "llama": LLAMA,
    "opt": OPT,
    "gpt2": GPT2,
    "mpt": MPT,
    "mosaic_gpt": MOSAIC_GPT,
}
