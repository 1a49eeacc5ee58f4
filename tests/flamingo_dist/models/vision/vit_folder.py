"""Small Hugging Face folders of vision transformers with random weights."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
MEAN_RGB = (128, 102, 76)
SIZE, PATCH = 28, 7
TEXT = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "vocab_size": 9,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def make(name: str, **changes: Any) -> Any:
    """The vision part of a whole model of that kind, and the whole."""
    shape = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": SIZE,
        "patch_size": PATCH,
    } | changes
    torch.manual_seed(0)
    if name == "dinov2":
        model: Any = transformers.Dinov2Model(transformers.Dinov2Config(**shape, layerscale_value=0.7))
        vision = model
    else:
        config_class, model_class = {
            "clip": (transformers.CLIPConfig, transformers.CLIPModel),
            "siglip": (transformers.SiglipConfig, transformers.SiglipModel),
        }[name]
        shape = {"intermediate_size": 40} | shape
        model = model_class(config_class(vision_config=shape, text_config=TEXT))
        vision = model.vision_model
    with torch.no_grad():
        # Fresh biases are 0 and fresh norms 1: a mistake there would not show.
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return vision.eval(), model


def save(name: str, folder: Path, *, part: bool = False, **changes: Any) -> Any:
    """Save the whole model, or its vision part alone, with a processor's configuration; return the vision part."""
    vision, whole = make(name, **changes)
    (vision if part else whole).save_pretrained(folder)
    said = {"image_mean": MEAN, "image_std": STD, "rescale_factor": 1 / 255}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return vision
