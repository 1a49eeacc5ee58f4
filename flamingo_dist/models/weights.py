"""Weights of a published language model, read slice by slice for one tensor-parallel rank.

Two sources speak Hugging Face's LLaMA names: a folder of safetensors, and a GGUF file (dequantised on
reading). `lm_shard` then gives any parameter of our Megatron blocks from either.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from flamingo_dist.models.lm_config import LMConfig

Rows = slice
ALL = slice(None)


class WeightSource(Protocol):
    """Tensors by Hugging Face LLaMA names."""

    def names(self) -> set[str]:
        """Return the names of all tensors."""

    def read(self, name: str, rows: Rows = ALL, columns: Rows = ALL) -> Tensor:
        """Return the slice `[rows, columns]` (or `[rows]` of a vector) of the tensor `name`."""


class SafetensorsSource:
    """A folder with `config.json` and one or more `.safetensors` files; only the asked slices are read."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{folder} holds no .safetensors file; give a folder of a Hugging Face model.")
        self._file_of: dict[str, Path] = {}
        for file in files:
            with safe_open(file, framework="pt") as handle:
                self._file_of.update(dict.fromkeys(handle.keys(), file))

    def names(self) -> set[str]:
        """Return the names of all tensors but the derived rotary buffers of old exports."""
        return {name for name in self._file_of if not name.endswith("rotary_emb.inv_freq")}

    def read(self, name: str, rows: Rows = ALL, columns: Rows = ALL) -> Tensor:
        """Return the slice `[rows, columns]` of the tensor `name`."""
        with safe_open(self._file_of[name], framework="pt") as handle:
            stored = handle.get_slice(name)
            return stored[rows] if len(stored.get_shape()) == 1 else stored[rows, columns]


_GGUF_NAMES = {
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
_GGUF_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class GGUFSource:
    """A GGUF file of the LLaMA family.

    GGUF stores the rows of Q and K for interleaved rotary pairs (2i, 2i+1); they are put back into the
    half-split order that Hugging Face and Megatron rotate.
    """

    def __init__(self, path: str) -> None:
        from gguf import GGUFReader

        reader = GGUFReader(path)
        self.metadata: dict[str, Any] = {k: f.contents() for k, f in reader.fields.items()}
        self._tensors = {_hf_name(t.name): t for t in reader.tensors}

    def names(self) -> set[str]:
        """Return the names of all tensors, as Hugging Face calls them."""
        return set(self._tensors)

    def read(self, name: str, rows: Rows = ALL, columns: Rows = ALL) -> Tensor:
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
    if stem in _GGUF_TOP:
        return f"{_GGUF_TOP[stem]}.weight"
    _, block, part = stem.split(".")
    return f"model.layers.{block}.{_GGUF_NAMES[part]}.weight"


def open_weights(path: str) -> WeightSource:
    """Open a `.gguf` file or a folder of safetensors.

    Raises:
        ValueError: neither is at `path`.
    """
    if path.endswith(".gguf"):
        if not Path(path).is_file():
            raise ValueError(f"{path} does not exist; give a .gguf file or a folder of safetensors.")
        return GGUFSource(path)
    return SafetensorsSource(path)


def read_lm_config(path: str) -> LMConfig:
    """Return the LM configuration that a GGUF file or a Hugging Face folder states.

    Raises:
        ValueError: the model is not of the LLaMA family.
    """
    if path.endswith(".gguf"):
        return _gguf_config(path)
    stated = json.loads((Path(path) / "config.json").read_text())
    if stated.get("model_type") != "llama":
        raise ValueError(f"{path} is a {stated.get('model_type')!r} model; only 'llama' can be read.")
    scaling = stated.get("rope_parameters") or stated.get("rope_scaling") or {}
    if scaling.get("rope_type", "default") != "default":
        raise ValueError(
            f"{path} scales its rotary positions ({scaling['rope_type']}), which is not supported."
        )
    heads = stated["num_attention_heads"]
    return LMConfig(
        vocab_size=stated["vocab_size"],
        num_layers=stated["num_hidden_layers"],
        width=stated["hidden_size"],
        num_heads=heads,
        num_kv_heads=stated.get("num_key_value_heads") or heads,
        head_dim=stated.get("head_dim") or stated["hidden_size"] // heads,
        ffn_width=stated["intermediate_size"],
        norm_eps=stated["rms_norm_eps"],
        rope_base=scaling.get("rope_theta") or stated.get("rope_theta", 10000.0),
        tied=stated.get("tie_word_embeddings", False),
        weights=path,
    )


def _gguf_config(path: str) -> LMConfig:
    source = GGUFSource(path)
    meta = source.metadata
    if meta["general.architecture"] != "llama":
        raise ValueError(f"{path} is a {meta['general.architecture']!r} model; only 'llama' can be read.")
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
        tied="lm_head.weight" not in source.names(),
        weights=path,
    )


def expected_names(config: LMConfig) -> set[str]:
    """Return the tensor names that a LLaMA model of this configuration has."""
    parts = [
        "input_layernorm",
        "post_attention_layernorm",
        *(f"self_attn.{p}_proj" for p in "qkvo"),
        *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
    ]
    blocks = {f"model.layers.{i}.{p}.weight" for i in range(config.num_layers) for p in parts}
    top = {"model.embed_tokens.weight", "model.norm.weight"}
    return blocks | top | (set() if config.tied else {"lm_head.weight"})


def check_names(source: WeightSource, config: LMConfig) -> None:
    """Check that `source` holds exactly the tensors of `config`.

    Raises:
        ValueError: naming the missing and the surplus tensors.
    """
    expected, found = expected_names(config), source.names()
    # Exports of tied models may repeat the embedding as the head.
    surplus = sorted(found - expected - ({"lm_head.weight"} if config.tied else set()))
    missing = sorted(expected - found)
    if missing or surplus:
        raise ValueError(
            f"weights {config.weights} do not fit the LM configuration: missing {missing[:5]} "
            f"({len(missing)} in all), surplus {surplus[:5]} ({len(surplus)} in all)."
        )


def lm_shard(
    source: WeightSource, name: str, shape: torch.Size, config: LMConfig, *, tp_rank: int, tp_size: int
) -> Tensor:
    """Return one tensor-parallel rank's values of the LM parameter `name`.

    Args:
        source: where the weights are.
        name: the parameter's name inside our LM, such as `layers.3.mlp.linear_fc1.weight`.
        shape: the shape of this rank's parameter.
        config: the LM's configuration.
        tp_rank: this rank in the tensor-parallel group.
        tp_size: size of the tensor-parallel group.

    Raises:
        ValueError: the stored tensor does not give that shape.
    """
    if name.startswith("layers."):
        _, block, part = name.split(".", 2)
        value = _BLOCK_READERS[part](source, f"model.layers.{block}.", config, tp_rank, tp_size)
    elif name == "final_norm.weight":
        value = source.read("model.norm.weight")
    else:
        stored = (
            "lm_head.weight" if name.startswith("vocabulary.frozen_head") else "model.embed_tokens.weight"
        )
        start = tp_rank * shape[0]
        value = source.read(stored, slice(start, min(start + shape[0], config.vocab_size)))
        if value.shape[0] < shape[0]:
            value = torch.nn.functional.pad(value, (0, 0, 0, shape[0] - value.shape[0]))
    if value.shape != shape:
        raise ValueError(
            f"{config.weights}: parameter {name} needs shape {tuple(shape)} on tensor-parallel rank {tp_rank} "
            f"of {tp_size}, the stored tensor gives {tuple(value.shape)}; check the LM configuration."
        )
    return value


def _part(total: int, tp_rank: int, tp_size: int) -> slice:
    size = total // tp_size
    return slice(tp_rank * size, (tp_rank + 1) * size)


def _qkv(source: WeightSource, prefix: str, config: LMConfig, tp_rank: int, tp_size: int) -> Tensor:
    """Megatron's fused layout: for each key/value head its query heads, its key, its value."""
    groups = config.num_kv_heads // tp_size
    parts = []
    for letter, heads in (("q", config.num_heads), ("k", config.num_kv_heads), ("v", config.num_kv_heads)):
        rows = _part(heads * config.head_dim, tp_rank, tp_size)
        weight = source.read(f"{prefix}self_attn.{letter}_proj.weight", rows)
        parts.append(weight.view(groups, -1, config.width))
    return torch.cat(parts, dim=1).flatten(0, 1)


def _fc1(source: WeightSource, prefix: str, config: LMConfig, tp_rank: int, tp_size: int) -> Tensor:
    rows = _part(config.ffn_width, tp_rank, tp_size)
    return torch.cat([source.read(f"{prefix}mlp.{p}_proj.weight", rows) for p in ("gate", "up")])


def _columns(hf_part: str, total: Callable[[LMConfig], int]) -> Callable[..., Tensor]:
    def read(source: WeightSource, prefix: str, config: LMConfig, tp_rank: int, tp_size: int) -> Tensor:
        return source.read(f"{prefix}{hf_part}.weight", ALL, _part(total(config), tp_rank, tp_size))

    return read


def _vector(hf_part: str) -> Callable[..., Tensor]:
    def read(source: WeightSource, prefix: str, *_: Any) -> Tensor:
        return source.read(f"{prefix}{hf_part}.weight")

    return read


_BLOCK_READERS: dict[str, Callable[..., Tensor]] = {
    "input_layernorm.weight": _vector("input_layernorm"),
    "pre_mlp_layernorm.weight": _vector("post_attention_layernorm"),
    "self_attention.linear_qkv.weight": _qkv,
    "self_attention.linear_proj.weight": _columns("self_attn.o_proj", lambda c: c.num_heads * c.head_dim),
    "mlp.linear_fc1.weight": _fc1,
    "mlp.linear_fc2.weight": _columns("mlp.down_proj", lambda c: c.ffn_width),
}
