"""From a Hugging Face `config.json` to our LM configuration. What we do not compute is refused by name."""

import warnings
from collections.abc import Callable
from typing import Any, Literal

from flamingo_dist.from_json import json_object
from flamingo_dist.models.lm_config import LMConfig, RopeScaling
from flamingo_dist.models.weights.ranges import RangeFile, join_url

Stated = dict[str, Any]
_GELU_TANH = ("gelu_new", "gelu_pytorch_tanh")


def config_url(url: str) -> str:
    """Return the URL of the `config.json` that lies beside the weights at `url`, a folder or one of its files."""
    return join_url(url.rsplit("/", 1)[0] if url.endswith(".safetensors") else url, "config.json")


def hf_lm_config(url: str) -> LMConfig:
    """Return the configuration of the LM in a Hugging Face folder at any fsspec URL; `weights` names the folder.

    Raises:
        ValueError: there is no `config.json`, or it states a model that our LM cannot be.
    """
    stated = _stated(url)
    if stated is None:
        raise ValueError(f"{url} has no config.json beside the weights; give a Hugging Face folder.")
    family = str(stated.get("model_type"))
    if family not in _READERS:
        raise ValueError(f"{url} is a {family!r} model; known are {', '.join(_READERS)}.")
    return LMConfig(weights=url, **_READERS[family](_Reader(url, stated)))


def stated_lm_config(url: str) -> LMConfig | None:
    """Return what `hf_lm_config` does, or None where no `config.json` is there or it is of no known family.

    Warns of an unknown family: what the run computes cannot be compared with it.

    Raises:
        ValueError: it cannot be read, or states a model of a known family that our LM cannot be.
    """
    stated = _stated(url)
    if stated is None:
        return None
    family = str(stated.get("model_type"))
    if family not in _READERS:
        warnings.warn(
            f"{config_url(url)} states a {family!r} model, which is none of {', '.join(_READERS)}: only names and "
            "shapes of its weights were compared with model.lm; see to the other settings yourself.",
            stacklevel=2,
        )
        return None
    return LMConfig(weights=url, **_READERS[family](_Reader(url, stated)))


def _stated(url: str) -> Stated | None:
    """Return what the `config.json` beside the weights at `url` states, or None where there is none."""
    where = config_url(url)
    try:
        return json_object(RangeFile(where).read_all(), where)
    except (FileNotFoundError, NotADirectoryError):
        return None


class _Reader:
    """A stated configuration, with the place for messages."""

    def __init__(self, url: str, stated: Stated, inside: str = "") -> None:
        self.url, self.stated, self.inside = url, stated, inside

    def get(self, name: str, default: Any = None) -> Any:
        """Return a value, or `default` where none (or null) is stated; without a default it must be there."""
        value = self.stated.get(name)
        if value is None and default is None:
            raise ValueError(f"{self.url}: config.json does not state {self.inside}{name}.")
        return default if value is None else value

    def count(self, name: str, default: int | None = None) -> int:
        """Return a whole number from 1 on."""
        value = self.get(name, default)
        if type(value) is not int or value < 1:
            raise self._wrong(name, value, "a whole number from 1 on")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Return a number."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong(name, value, "a number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Return true or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def part(self, *names: str) -> "_Reader":
        """Return the object under the first of these names that is stated; an empty one where none is."""
        for name in names:
            value = self.stated.get(name)
            if value and not isinstance(value, dict):
                raise self._wrong(name, value, "an object")
            if value:
                return _Reader(self.url, value, f"{name}.")
        return _Reader(self.url, {}, f"{names[0]}.")

    def _wrong(self, name: str, value: Any, wanted: str) -> ValueError:
        return ValueError(
            f"{self.url}: config.json states {self.inside}{name}={value!r}, but it must be {wanted}."
        )

    def refuse(self, wrong: bool, what: str) -> None:
        """Raise `ValueError` where the model does something that we do not compute."""
        if wrong:
            raise ValueError(f"{self.url}: {what} is not supported.")

    def refuse_other_than(self, **values: Any) -> None:
        """Raise `ValueError` where a setting is stated and is not the value given here."""
        for name, value in values.items():
            stated = self.stated.get(name, value)
            self.refuse(stated not in (value, None), f"{self.inside}{name}={stated!r}")

    def activation(self, name: str, default: str) -> Literal["gelu", "gelu_tanh", "relu"]:
        """Return our name of an ungated activation."""
        stated = self.get(name, default)
        known: dict[str, Literal["gelu", "gelu_tanh", "relu"]] = {"gelu": "gelu", "relu": "relu"}
        known |= dict.fromkeys(_GELU_TANH, "gelu_tanh")
        self.refuse(not isinstance(stated, str) or stated not in known, f"{name}={stated!r}")
        return known[stated]


def _llama(r: _Reader) -> Stated:
    r.refuse_other_than(hidden_act="silu", attention_bias=False, mlp_bias=False, use_sliding_window=False)
    heads = r.count("num_attention_heads")
    scaling = r.part("rope_parameters", "rope_scaling")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    r.refuse(kind not in ("default", "llama3"), f"rope_type={kind!r}")
    scaling.refuse_other_than(partial_rotary_factor=1.0)
    r.refuse_other_than(partial_rotary_factor=1.0)
    stretch = RopeScaling()
    if kind == "llama3":
        stretch = RopeScaling(
            factor=scaling.number("factor"),
            low_freq=scaling.number("low_freq_factor"),
            high_freq=scaling.number("high_freq_factor"),
            original_positions=scaling.count("original_max_position_embeddings"),
        )
    return {
        "vocab_size": r.count("vocab_size"),
        "num_layers": r.count("num_hidden_layers"),
        "width": r.count("hidden_size"),
        "num_heads": heads,
        "num_kv_heads": r.count("num_key_value_heads", heads),
        "head_dim": r.count("head_dim", r.count("hidden_size") // heads),
        "ffn_width": r.count("intermediate_size"),
        "norm_eps": r.number("rms_norm_eps", 1e-6),
        "rope_base": scaling.number("rope_theta", r.number("rope_theta", 10000.0)),
        "rope_scaling": stretch,
        "tied": r.flag("tie_word_embeddings", False),
    }


def _qwen2(r: _Reader) -> Stated:
    return _llama(r) | {"bias": "qkv"}


def _qwen3(r: _Reader) -> Stated:
    # Qwen3's heads are 128 wide whatever the width is.
    return _llama(r) | {"qk_norm": "head", "head_dim": r.count("head_dim", 128)}


def _opt(r: _Reader) -> Stated:
    r.refuse_other_than(
        do_layer_norm_before=True,
        _remove_final_layer_norm=False,
        enable_bias=True,
        layer_norm_elementwise_affine=True,
        word_embed_proj_dim=r.count("hidden_size"),
    )
    heads, width = r.count("num_attention_heads"), r.count("hidden_size")
    return {
        "vocab_size": r.count("vocab_size"),
        "num_layers": r.count("num_hidden_layers"),
        "width": width,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": width // heads,
        "ffn_width": r.count("ffn_dim"),
        "activation": r.activation("activation_function", "relu"),
        "norm": "layer",
        "bias": "all",
        "positions": "learned",
        "max_positions": r.count("max_position_embeddings", 2048),
        "position_offset": 2,
        "tied": r.flag("tie_word_embeddings", True),
        "naming": "opt",
    }


def _gpt2(r: _Reader) -> Stated:
    r.refuse_other_than(
        scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False
    )
    heads, width = r.count("n_head"), r.count("n_embd")
    return {
        "vocab_size": r.count("vocab_size"),
        "num_layers": r.count("n_layer"),
        "width": width,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": width // heads,
        "ffn_width": r.count("n_inner", 4 * width),
        "activation": r.activation("activation_function", "gelu_new"),
        "norm": "layer",
        "norm_eps": r.number("layer_norm_epsilon", 1e-5),
        "bias": "all",
        "positions": "learned",
        "max_positions": r.count("n_positions", 1024),
        "tied": r.flag("tie_word_embeddings", True),
        "naming": "gpt2",
    }


def _mpt(r: _Reader) -> Stated:
    attention = r.part("attn_config")
    attention.refuse_other_than(
        attn_type="multihead_attention", softmax_scale=None, prefix_lm=False, alibi=True
    )
    r.refuse_other_than(no_bias=True, logit_scale=None)
    qk_norm, clip = attention.flag("qk_ln", False), attention.number("clip_qkv", 0.0)
    return _mosaic(r, "expansion_ratio", attention.number("alibi_bias_max", 8), qk_norm, clip) | {
        "naming": "mpt",
        "norm_eps": r.number("layer_norm_epsilon", 1e-5),
        "tied": r.flag("tie_word_embeddings", True),
    }


def _mosaic_gpt(r: _Reader) -> Stated:
    """MPT-1B, from before MPT had its name: the attention's settings stand beside the others."""
    r.refuse_other_than(alibi=True, no_bias=True, logit_scale=None, softmax_scale=None, prefix_lm=False)
    qk_norm, clip = r.flag("attn_qk_ln", False), r.number("attn_clip_qkv", 0.0)
    return _mosaic(r, "mlp_ratio", r.number("alibi_bias_max", 8), qk_norm, clip) | {"naming": "mosaic_gpt"}


def _mosaic(r: _Reader, ratio: str, alibi_max: float, qk_norm: bool, clip: float) -> Stated:
    heads, width = r.count("n_heads"), r.count("d_model")
    return {
        "vocab_size": r.count("vocab_size"),
        "num_layers": r.count("n_layers"),
        "width": width,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": width // heads,
        "ffn_width": r.count(ratio, 4) * width,
        "activation": "gelu",
        "norm": "layer_no_bias",
        "positions": "alibi",
        "alibi_max": alibi_max,
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
