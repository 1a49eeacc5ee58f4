"""What a Hugging Face folder says of its vision transformer, without building it."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import transformers

from flamingo_dist.models.vision.files import read_json

ViTName = Literal["clip", "siglip", "dinov2"]
MODEL_TYPES = {
    "clip": ("clip", "clip_vision_model"),
    "siglip": ("siglip", "siglip_vision_model"),
    "dinov2": ("dinov2",),
}
"""What `model_type` may say in `config.json`: the whole model or its vision part."""


@dataclass(frozen=True, kw_only=True)
class ViTShape:
    """One vision transformer."""

    name: ViTName
    """Which of transformers' classes."""
    width: int
    """C, channels of a token."""
    layers: int
    """Blocks."""
    heads: int
    """Attention heads."""
    ffn_width: int
    """Hidden width of the feed-forward layers."""
    ffn_gated: bool
    """Whether they are gated (SwiGLU), with three matrices."""
    activation: str
    """Of the feed-forward layers, by transformers' name."""
    qkv_bias: bool
    """Whether queries, keys and values have biases."""
    patch: int
    """Side of a patch in pixels."""
    image_size: int
    """Side of the images it was trained on, in pixels."""
    mean: tuple[float, float, float]
    """Mean of the pixels from 0 to 255, per channel."""
    std: tuple[float, float, float]
    """Their standard deviation."""

    @property
    def has_class_token(self) -> bool:
        """Whether a class token stands before the patches."""
        return self.name != "siglip"

    @property
    def norm_of_last_hidden_state(self) -> bool:
        """Whether transformers' `last_hidden_state` has gone through the final LayerNorm."""
        return self.name != "clip"


def vit_config(name: ViTName, folder: str) -> Any:
    """Return transformers' configuration of the vision part.

    Raises:
        FileNotFoundError: the folder has no `config.json`.
        ValueError: it holds another kind of model.
    """
    stated = _read_json(folder, "config.json")
    kind = stated.get("model_type")
    if kind not in MODEL_TYPES[name]:
        raise ValueError(
            f"{folder} holds a model of type {kind!r}; the vision encoder {name!r} takes "
            f"{' or '.join(MODEL_TYPES[name])}."
        )
    config_class = {
        "clip": transformers.CLIPVisionConfig,
        "siglip": transformers.SiglipVisionConfig,
        "dinov2": transformers.Dinov2Config,
    }[name]
    return config_class.from_dict(stated.get("vision_config", stated))


def vit_shape(name: ViTName, folder: str) -> ViTShape:
    """Read the shape and the normalisation of the vision transformer in a Hugging Face folder at any fsspec URL.

    A remote folder is read once a process.

    Raises:
        FileNotFoundError: a configuration file is not there.
        ValueError: it holds another kind of model, or says no mean and standard deviation.
    """
    stamp = tuple(path.stat().st_mtime_ns for path in sorted(Path(folder).glob("*config.json")))
    return _vit_shape(name, folder, stamp)


@lru_cache(maxsize=16)
def _vit_shape(name: ViTName, folder: str, _stamp: tuple[int, ...]) -> ViTShape:
    config = vit_config(name, folder)
    mean, std = _normalisation(folder)
    ffn_width = getattr(config, "intermediate_size", None) or int(config.hidden_size * config.mlp_ratio)
    gated = bool(getattr(config, "use_swiglu_ffn", False))
    if gated:  # DINOv2's giant: two thirds of the width, to the next multiple of 8
        ffn_width = (int(ffn_width * 2 / 3) + 7) // 8 * 8
    return ViTShape(
        name=name,
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        ffn_width=ffn_width,
        ffn_gated=gated,
        activation=config.hidden_act,
        qkv_bias=bool(getattr(config, "qkv_bias", True)),
        patch=config.patch_size,
        image_size=config.image_size,
        mean=mean,
        std=std,
    )


def _normalisation(folder: str) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return mean and standard deviation of pixels from 0 to 255, as the folder's image processor normalises."""
    said = read_json(folder, "preprocessor_config.json")
    if said is None:  # transformers 5 saves a processor's parts in one file
        said = _read_json(folder, "processor_config.json", instead_of="preprocessor_config.json").get(
            "image_processor", {}
        )
    try:
        factor = float(said.get("rescale_factor", 1 / 255))
        pairs = zip(said["image_mean"], said["image_std"], strict=True)
        red, green, blue = ((float(m) / factor, float(s) / factor) for m, s in pairs)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"{folder}: preprocessor_config.json must say image_mean and image_std, three numbers each ({error!r})."
        ) from error
    return (red[0], green[0], blue[0]), (red[1], green[1], blue[1])


def _read_json(folder: str, name: str, *, instead_of: str | None = None) -> dict[str, Any]:
    held = read_json(folder, name)
    if held is None:
        raise FileNotFoundError(
            f"no {instead_of or name} in {folder!r}: `weights` is a Hugging Face folder, local or at any fsspec URL, "
            "with config.json, preprocessor_config.json and safetensors."
        )
    return held
