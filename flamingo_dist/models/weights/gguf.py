"""GGUF files of the LLaMA family, dequantised on reading."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flamingo_dist.models.lm_config import LMConfig
from flamingo_dist.models.weights.source import ALL

_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class GGUFSource:
    """A GGUF file of the LLaMA family, with Hugging Face's names.

    GGUF stores the rows of Q and K for interleaved rotary pairs (2i, 2i+1); they are put back into the
    half-split order that Hugging Face and Megatron rotate.
    """

    def __init__(self, path: str) -> None:
        """Open the file at `path`, on this machine.

        Raises:
            ValueError: there is none.
        """
        from gguf import GGUFReader

        if not Path(path).is_file():
            raise ValueError(f"{path} does not exist; give a .gguf file or a folder of safetensors.")
        reader = GGUFReader(path)
        self.metadata: dict[str, Any] = {k: f.contents() for k, f in reader.fields.items()}
        self._tensors = {_hf_name(t.name): t for t in reader.tensors}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every tensor, by the name that Hugging Face gives it."""
        # GGUF counts axes from the fastest.
        return {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()}

    def read(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """Return the slice `[rows, columns]` of the dequantised tensor `name`, fp32."""
        from gguf import dequantize

        stored = self._tensors[name]
        full = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy())
        heads_key = {"q_proj": "head_count", "k_proj": "head_count_kv"}.get(name.split(".")[-2])
        if heads_key is not None:
            heads = self.metadata[f"llama.attention.{heads_key}"]
            full = full.view(heads, -1, 2, full.shape[-1]).transpose(1, 2).reshape(full.shape)
        return full[rows] if full.dim() == 1 else full[rows, columns]


def _hf_name(gguf_name: str) -> str:
    stem = gguf_name.removesuffix(".weight")
    if stem in _TOP:
        return f"{_TOP[stem]}.weight"
    _, block, part = stem.split(".")
    return f"model.layers.{block}.{_NAMES[part]}.weight"


def gguf_lm_config(path: str) -> LMConfig:
    """Return the LM configuration that the GGUF file at `path` states.

    Raises:
        ValueError: there is no file, or it is of another family.
    """
    source = GGUFSource(path)
    meta = source.metadata
    if meta["general.architecture"] != "llama":
        raise ValueError(
            f"{path} is a {meta['general.architecture']!r} model; of GGUF files only 'llama' can be read."
        )
    heads = meta["llama.attention.head_count"]
    return LMConfig(
        vocab_size=len(meta["tokenizer.ggml.tokens"]),
        num_layers=meta["llama.block_count"],
        width=meta["llama.embedding_length"],
        num_heads=heads,
        num_kv_heads=meta["llama.attention.head_count_kv"],
        head_dim=meta["llama.embedding_length"] // heads,
        ffn_width=meta["llama.feed_forward_length"],
        norm_eps=meta["llama.attention.layer_norm_rms_epsilon"],
        rope_base=meta["llama.rope.freq_base"],
        tied="lm_head.weight" not in source.shapes(),
        weights=path,
    )
