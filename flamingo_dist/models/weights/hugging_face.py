"""From a Hugging Face `config.json` to our LM configuration. What we do not compute is refused by name."""

import json
from collections.abc import Callable
from typing import Any, Literal

from flamingo_dist.models.lm_config import LMConfig, RopeScaling
from flamingo_dist.models.weights.ranges import RangeFile, join_url

Stated = dict[str, Any]
_GELU_TANH = ("gelu_new", "gelu_pytorch_tanh")


def hf_lm_config(url: str) -> LMConfig:
    """Return the configuration of the LM in a Hugging Face folder at any fsspec URL; `weights` names the folder.

    Raises:
        ValueError: there is no `config.json`, or it states a model that our LM cannot be.
    """
    folder = url.rsplit("/", 1)[0] if url.endswith(".safetensors") else url
    file = RangeFile(join_url(folder, "config.json"))
    try:
        stated: Stated = json.loads(file.read_all())
    except FileNotFoundError as error:
        raise ValueError(
            f"{url} has no config.json beside the weights; give a Hugging Face folder."
        ) from error
    family = stated.get("model_type")
    if family not in _READERS:
        raise ValueError(f"{url} is a {family!r} model; known are {', '.join(_READERS)}.")
    return LMConfig(weights=url, **_READERS[family](_Reader(url, stated)))


class _Reader:
    """A stated configuration, with the place for messages."""

    def __init__(self, url: str, stated: Stated) -> None:
        self.url, self.stated = url, stated

    def get(self, name: str, default: Any = None) -> Any:
        """Return a value, or `default` where none (or null) is stated; without a default it must be there."""
        value = self.stated.get(name)
        if value is None and default is None:
            raise ValueError(f"{self.url}: config.json does not state {name}.")
        return default if value is None else value

    def refuse(self, wrong: bool, what: str) -> None:
        """Raise `ValueError` where the model does something that we do not compute."""
        if wrong:
            raise ValueError(f"{self.url}: {what} is not supported.")

    def refuse_other_than(self, **values: Any) -> None:
        """Raise `ValueError` where a setting is stated and is not the value given here."""
        for name, value in values.items():
            stated = self.stated.get(name, value)
            self.refuse(stated not in (value, None), f"{name}={stated!r}")

    def activation(self, name: str, default: str) -> Literal["gelu", "gelu_tanh", "relu"]:
        """Return our name of an ungated activation."""
        stated = self.get(name, default)
        known: dict[str, Literal["gelu", "gelu_tanh", "relu"]] = {"gelu": "gelu", "relu": "relu"}
        known |= dict.fromkeys(_GELU_TANH, "gelu_tanh")
        self.refuse(stated not in known, f"{name}={stated!r}")
        return known[stated]


def _llama(r: _Reader) -> Stated:
    r.refuse_other_than(hidden_act="silu", attention_bias=False, mlp_bias=False, use_sliding_window=False)
    heads = r.get("num_attention_heads")
    scaling = r.stated.get("rope_parameters") or r.stated.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    r.refuse(kind not in ("default", "llama3"), f"rope_type={kind!r}")
    r.refuse(scaling.get("partial_rotary_factor", 1.0) != 1.0, "partial_rotary_factor")
    stretch = RopeScaling()
    if kind == "llama3":
        stretch = RopeScaling(
            factor=scaling["factor"],
            low_freq=scaling["low_freq_factor"],
            high_freq=scaling["high_freq_factor"],
            original_positions=scaling["original_max_position_embeddings"],
        )
    return {
        "vocab_size": r.get("vocab_size"),
        "num_layers": r.get("num_hidden_layers"),
        "width": r.get("hidden_size"),
        "num_heads": heads,
        "num_kv_heads": r.get("num_key_value_heads", heads),
        "head_dim": r.get("head_dim", r.get("hidden_size") // heads),
        "ffn_width": r.get("intermediate_size"),
        "norm_eps": r.get("rms_norm_eps", 1e-6),
        "rope_base": float(scaling.get("rope_theta") or r.get("rope_theta", 10000.0)),
        "rope_scaling": stretch,
        "tied": r.get("tie_word_embeddings", False),
    }


def _qwen2(r: _Reader) -> Stated:
    return _llama(r) | {"bias": "qkv"}


def _qwen3(r: _Reader) -> Stated:
    # Qwen3's heads are 128 wide whatever the width is.
    return _llama(r) | {"qk_norm": "head", "head_dim": r.get("head_dim", 128)}


def _opt(r: _Reader) -> Stated:
    r.refuse_other_than(
        do_layer_norm_before=True,
        _remove_final_layer_norm=False,
        enable_bias=True,
        layer_norm_elementwise_affine=True,
        word_embed_proj_dim=r.get("hidden_size"),
    )
    heads, width = r.get("num_attention_heads"), r.get("hidden_size")
    return {
        "vocab_size": r.get("vocab_size"),
        "num_layers": r.get("num_hidden_layers"),
        "width": width,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": width // heads,
        "ffn_width": r.get("ffn_dim"),
        "activation": r.activation("activation_function", "relu"),
        "norm": "layer",
        "bias": "all",
        "positions": "learned",
        "max_positions": r.get("max_position_embeddings", 2048),
        "position_offset": 2,
        "tied": r.get("tie_word_embeddings", True),
        "naming": "opt",
    }


def _gpt2(r: _Reader) -> Stated:
    r.refuse_other_than(
        scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False
    )
    heads, width = r.get("n_head"), r.get("n_embd")
    return {
        "vocab_size": r.get("vocab_size"),
        "num_layers": r.get("n_layer"),
        "width": width,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": width // heads,
        "ffn_width": r.get("n_inner", 4 * width),
        "activation": r.activation("activation_function", "gelu_new"),
        "norm": "layer",
        "norm_eps": r.get("layer_norm_epsilon", 1e-5),
        "bias": "all",
        "positions": "learned",
        "max_positions": r.get("n_positions", 1024),
        "tied": r.get("tie_word_embeddings", True),
        "naming": "gpt2",
    }


def _mpt(r: _Reader) -> Stated:
    attention = _Reader(r.url, r.stated.get("attn_config") or {})
    attention.refuse_other_than(
        attn_type="multihead_attention", softmax_scale=None, prefix_lm=False, alibi=True
    )
    r.refuse_other_than(no_bias=True, logit_scale=None)
    qk_norm, clip = attention.get("qk_ln", False), attention.stated.get("clip_qkv")
    return _mosaic(r, "expansion_ratio", attention.get("alibi_bias_max", 8), qk_norm, clip) | {
        "naming": "mpt",
        "norm_eps": r.get("layer_norm_epsilon", 1e-5),
        "tied": r.get("tie_word_embeddings", True),
    }


def _mosaic_gpt(r: _Reader) -> Stated:
    """MPT-1B, from before MPT had its name: the attention's settings stand beside the others."""
    r.refuse_other_than(alibi=True, no_bias=True, logit_scale=None, softmax_scale=None, prefix_lm=False)
    qk_norm, clip = r.get("attn_qk_ln", False), r.stated.get("attn_clip_qkv")
    return _mosaic(r, "mlp_ratio", r.get("alibi_bias_max", 8), qk_norm, clip) | {"naming": "mosaic_gpt"}


def _mosaic(r: _Reader, ratio: str, alibi_max: float, qk_norm: bool, clip: float | None) -> Stated:
    heads, width = r.get("n_heads"), r.get("d_model")
    return {
        "vocab_size": r.get("vocab_size"),
        "num_layers": r.get("n_layers"),
        "width": width,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": width // heads,
        "ffn_width": r.get(ratio, 4) * width,
        "activation": "gelu",
        "norm": "layer_no_bias",
        "positions": "alibi",
        "alibi_max": float(alibi_max),
        "qk_norm": "width" if qk_norm else "none",
        "clip_qkv": clip or None,
    }


_READERS: dict[str, Callable[[_Reader], Stated]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "opt": _opt,
    "gpt2": _gpt2,
    "mpt": _mpt,
    "mosaic_gpt": _mosaic_gpt,
}
