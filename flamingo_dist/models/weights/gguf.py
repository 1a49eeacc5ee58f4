"""GGUF files of the LLaMA family, dequantised on reading."""

import re
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
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)")


class GGUFSource:
    """A GGUF file of the LLaMA family, with Hugging Face's names.

    GGUF stores the rows of Q and K for interleaved rotary pairs (2i, 2i+1); they are put back into the
    half-split order that Hugging Face and Megatron rotate.
    """

    def __init__(self, path: str) -> None:
        """Open the file at `path`, on this machine.

        Raises:
            ValueError: there is none, it is damaged, or of another family.
        """
        from gguf import GGUFReader

        if not Path(path).is_file():
            raise ValueError(f"{path} does not exist; give a .gguf file or a folder of safetensors.")
        self.path = path
        try:
            reader = GGUFReader(path)
            self.metadata: dict[str, Any] = {k: f.contents() for k, f in reader.fields.items()}
        except Exception as error:  # numpy's of many kinds, where a part of the file is not there
            raise ValueError(
                f"{path} cannot be read as GGUF; is it whole? ({type(error).__name__}: {error})"
            ) from error
        family = self.metadata.get("general.architecture")
        if family != "llama":
            raise ValueError(f"{path} is a {family!r} model; of GGUF files only 'llama' can be read.")
        self._tensors = {_hf_name(t.name, path): t for t in reader.tensors}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every tensor, by the name that Hugging Face gives it."""
        # GGUF counts axes from the fastest.
        return {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()}

    def read(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """Return the slice `[rows, columns]` of the dequantised tensor `name`, fp32."""
        from gguf import dequantize

        stored = self._tensors[name]
        full = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy())
        part = name.split(".")[-2]
        if part in ("q_proj", "k_proj"):
            heads = self._heads() if part == "q_proj" else self._kv_heads()
            full = full.view(heads, -1, 2, full.shape[-1]).transpose(1, 2).reshape(full.shape)
        return full[rows] if full.dim() == 1 else full[rows, columns]

    def lm_config(self) -> LMConfig:
        """Return the LM configuration that the file states.

        Raises:
            ValueError: it states too little, or what we do not compute.
        """
        scaling = self.metadata.get("llama.rope.scaling.type", "none")
        if scaling != "none" or self.metadata.get("llama.rope.scale_linear", 1.0) != 1.0:
            raise self._refused(f"rotary positions scaled by {scaling if scaling != 'none' else 'linear'!r}")
        heads, width = self._heads(), self._stated("embedding_length")
        head_dim = self.metadata.get("llama.attention.key_length", width // heads)
        turned = self.metadata.get("llama.rope.dimension_count", head_dim)
        if turned != head_dim:
            raise self._refused(f"rotating {turned} of a head's {head_dim} channels")
        shapes = self.shapes()
        if "model.embed_tokens.weight" not in shapes:
            raise ValueError(f"{self.path} holds no token_embd.weight; is it a part of a split model?")
        return LMConfig(
            vocab_size=shapes["model.embed_tokens.weight"][0],
            num_layers=self._stated("block_count"),
            width=width,
            num_heads=heads,
            num_kv_heads=self._kv_heads(),
            head_dim=head_dim,
            ffn_width=self._stated("feed_forward_length"),
            norm_eps=self._stated("attention.layer_norm_rms_epsilon"),
            rope_base=self.metadata.get("llama.rope.freq_base", 10000.0),
            tied="lm_head.weight" not in shapes,
            weights=self.path,
        )

    def _heads(self) -> int:
        heads: int = self._stated("attention.head_count")
        return heads

    def _kv_heads(self) -> int:
        """Return the key/value heads; files of models without grouped queries need not state them."""
        heads: int = self.metadata.get("llama.attention.head_count_kv", self._heads())
        return heads

    def _stated(self, name: str) -> Any:
        value = self.metadata.get(f"llama.{name}")
        if not isinstance(value, (int, float)):
            raise ValueError(f"{self.path} states llama.{name}={value!r}, but it must be a number.")
        return value

    def _refused(self, what: str) -> ValueError:
        return ValueError(f"{self.path}: {what} is not supported; give the model's Hugging Face folder.")


def _hf_name(gguf_name: str, path: str) -> str:
    """Return Hugging Face's name of a tensor, or raise `ValueError` if it is none of a plain LLaMA's."""
    stem = gguf_name.removesuffix(".weight")
    if stem in _TOP:
        return f"{_TOP[stem]}.weight"
    block = _BLOCK.fullmatch(stem)
    if block is None or block[2] not in _NAMES:
        hint = " (Llama 3's stretched positions, which state no numbers here)" if stem == "rope_freqs" else ""
        raise ValueError(
            f"{path} holds the tensor {gguf_name}{hint}, which is none of a plain LLaMA's; give the model's Hugging "
            "Face folder."
        )
    return f"model.layers.{block[1]}.{_NAMES[block[2]]}.weight"


def gguf_lm_config(path: str) -> LMConfig:
    """Return the LM configuration that the GGUF file at `path` states.

    Raises:
        ValueError: there is no file, it is damaged or of another family, or states what we do not compute.
    """
    return GGUFSource(path).lm_config()
