"""The vision tower of an IDEFICS checkpoint, kept beside the network as a CLIP vision model in Hugging Face's layout.

IDEFICS passes all tokens of the last block to its resampler, the class token included, without the final LayerNorm.
That is the encoder that `SETTINGS` asks for.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flamingo_dist.models.exchange.rules import TensorSource, check_tensors
from flamingo_dist.models.exchange.tensors import write_tensors
from flamingo_dist.models.vision import VisionConfig
from flamingo_dist.models.vision.files import read_json
from flamingo_dist.models.weights.safetensors import SafetensorsSource

SETTINGS: Mapping[str, Any] = {"name": "clip", "class_token": True}
"""Settings of `VisionConfig` for a tower, beside `weights` and `image_size`."""
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
_PREFIX = "vision_model."
_IGNORED = "embeddings.position_ids"
_SETTINGS = (
    "embed_dim",
    "image_size",
    "patch_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "hidden_act",
    "layer_norm_eps",
)


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A vision tower."""

    stated: Mapping[str, Any]
    """Its configuration, as IDEFICS' `vision_config` has it."""
    source: TensorSource
    """Its tensors."""
    prefix: str
    """What stands before their names in the source."""

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shapes of a tower of this configuration, by the names that CLIP and IDEFICS share."""
        from transformers import IdeficsVisionConfig
        from transformers.models.idefics.vision import IdeficsVisionTransformer

        with torch.device("meta"):
            module = IdeficsVisionTransformer(IdeficsVisionConfig(**self.stated))
        return {name: value.shape for name, value in module.state_dict().items()}

    def check(self) -> None:
        """Check that the source holds exactly this tower under the prefix.

        Raises:
            ValueError: naming what is missing, surplus or of another shape.
        """
        wanted = {self.prefix + name: shape for name, shape in self.shapes().items()}
        found = {n: s for n, s in self.source.shapes().items() if n.startswith(self.prefix)}
        check_tensors(found, wanted, self.source.where, ignored=[n for n in found if n.endswith(_IGNORED)])

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors by the names that CLIP and IDEFICS share."""
        for name in self.shapes():
            yield name, self.source.read(self.prefix + name)

    @property
    def last_bias(self) -> str:
        """Name of the bias that is added to every token last."""
        return f"encoder.layers.{self.stated['num_hidden_layers'] - 1}.mlp.fc2.bias"


def write_tower(folder: Path, tower: Tower, processor: Mapping[str, Any] | None = None) -> None:
    """Write a tower into the new folder `folder` as a CLIP vision model.

    Args:
        folder: made here.
        tower: what to write.
        processor: contents of `preprocessor_config.json`, or None for CLIP's mean and standard deviation.
    """
    folder.mkdir(parents=True)
    write_tensors(folder, ((_PREFIX + name, tensor) for name, tensor in tower.read()))
    stated = {key: value for key, value in tower.stated.items() if key not in ("embed_dim", "model_type")}
    stated |= {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"]}
    stated["hidden_size"] = tower.stated["embed_dim"]
    (folder / "config.json").write_text(json.dumps(stated, indent=1))
    known = processor or {}
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "CLIPImageProcessor",
                "image_mean": known.get("image_mean", CLIP_MEAN),
                "image_std": known.get("image_std", CLIP_STD),
            }
        )
    )


def tower_of(vision: VisionConfig) -> Tower:
    """Return the tower that an encoder's settings name, for a layout that holds its own.

    Raises:
        ValueError: the encoder is none that IDEFICS has.
    """
    for setting, wanted in SETTINGS.items():
        given = getattr(vision, setting, None)
        if given != wanted:
            raise ValueError(
                f"vision.{setting}={given!r} does not exist in IDEFICS, whose vision tower is {dict(SETTINGS)}."
            )
    stated = read_json(vision.weights, "config.json")
    if stated is None:
        raise ValueError(f"vision.weights={vision.weights!r} has no config.json; give a Hugging Face folder.")
    stated = stated.get("vision_config", stated)
    source = SafetensorsSource(vision.weights)
    prefix = _PREFIX if any(name.startswith(_PREFIX) for name in source.shapes()) else ""
    settings = tower_settings({"embed_dim": stated["hidden_size"], **stated})
    return Tower(stated=settings, source=source, prefix=prefix)


def tower_settings(stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides a tower's shape, out of IDEFICS' `vision_config`."""
    return {key: stated[key] for key in _SETTINGS if key in stated}
