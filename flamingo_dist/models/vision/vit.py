"""CLIP, SigLIP and DINOv2 as frozen encoders, through transformers' own classes."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from flamingo_dist.models.stored_shapes import shortened
from flamingo_dist.models.vision.base import Normalisation, VisionEncoder
from flamingo_dist.models.vision.config import VisionConfig
from flamingo_dist.models.vision.vit_shape import ViTShape, vit_config

UNUSED = (
    "text_model.",
    "text_projection.",
    "visual_projection.",
    "logit_scale",
    "logit_bias",
    "classifier.",
    "vision_model.head.",
    "head.",
    "embeddings.position_ids",
    "vision_model.embeddings.position_ids",
    "embeddings.mask_token",
    "dinov2.embeddings.mask_token",
)
"""Beginnings of the names of what a checkpoint may hold beside the encoder: the text tower, projections, SigLIP's
pooling head, a classifier, and the mask token of DINOv2's training."""


class ViTEncoder(VisionEncoder):
    """A vision transformer; a feature is a patch's token after the last block.

    Pixels are normalised by the mean and the standard deviation that the folder's image processor names.
    """

    def __init__(self, config: VisionConfig) -> None:
        """Load the weights; on the meta device (`with torch.device("meta")`) none are made.

        Raises:
            FileNotFoundError: the folder, its configuration or its weights are not there.
            ValueError: it holds another kind of model, or tensors are missing, superfluous or of another shape.
        """
        super().__init__(config)
        shape = config.vit
        self.normalise = Normalisation(shape.mean, shape.std, config.torch_dtype)
        self._skipped = int(shape.has_class_token and not config.class_token)
        # DINOv2 looks at the image's size by itself.
        resized = config.image_size != shape.image_size and shape.name != "dinov2"
        self._options = {"interpolate_pos_encoding": True} if resized else {}
        self.model = _freeze(_load(shape, config))
        wanted = shape.norm_of_last_hidden_state if config.final_norm is None else config.final_norm
        self._adds_norm = wanted and not shape.norm_of_last_hidden_state
        if shape.norm_of_last_hidden_state and not wanted:
            setattr(self.model, "layernorm" if shape.name == "dinov2" else "post_layernorm", nn.Identity())

    def repeated_blocks(self) -> Iterable[nn.Module]:
        """Return the transformer's blocks: the one long list of modules that transformers' encoders have."""
        lists = [m for m in self.model.modules() if isinstance(m, nn.ModuleList)]
        return max(lists, key=len)

    def encode(self, pixels_N3HW: Tensor) -> Tensor:
        """Return features [N, S, C] of uint8 pixels [N, 3, H, W]: the class token if it is wanted, then patches."""
        output = self.model(pixel_values=self.normalise(pixels_N3HW), **self._options)
        hidden_NSC: Tensor = output.last_hidden_state[:, self._skipped :]
        return self.model.post_layernorm(hidden_NSC) if self._adds_norm else hidden_NSC


def _load(shape: ViTShape, config: VisionConfig) -> Any:
    """Return transformers' module with the folder's weights, all of them and no others."""
    vision = vit_config(shape.name, config.weights)
    if shape.name == "siglip":
        vision.vision_use_head = False  # it pools the tokens that we want one by one
    if shape.name == "dinov2":
        vision.use_mask_token = False
    model_class: Any = {
        "clip": transformers.CLIPVisionModel,
        "siglip": transformers.SiglipVisionModel,
        "dinov2": transformers.Dinov2Model,
    }[shape.name]
    if torch.get_default_device().type == "meta":
        return model_class._from_config(vision, attn_implementation="sdpa", dtype=config.torch_dtype)
    with _quiet():
        try:
            model, report = model_class.from_pretrained(
                config.weights,
                config=vision,
                dtype=config.torch_dtype,
                attn_implementation="sdpa",
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they are reported to us
            )
        except OSError as error:
            raise FileNotFoundError(f"no safetensors in {config.weights!r}: {error}") from error
    _check(config, report)
    return model


def _check(config: VisionConfig, report: dict[str, Any]) -> None:
    """Check what transformers found amiss and would have gone on with.

    Raises:
        ValueError: a tensor is missing, superfluous or of another shape; the message names it.
    """
    extra = [n for n in report["unexpected_keys"] if not n.startswith(UNUSED)]
    wrong = [f"{n} of shape {list(a)} instead of {list(b)}" for n, a, b in report["mismatched_keys"]]
    faults = [
        f"{verb} {shortened(sorted(names))}"
        for verb, names in (("lacks", report["missing_keys"]), ("holds the unknown", extra), ("holds", wrong))
        if names
    ]
    if faults:
        raise ValueError(
            f"{config.weights} {'; it '.join(faults)}: it is no whole {config.name} vision encoder."
        )


def _freeze(module: Any) -> Any:
    """Turn all parameters of `module` into buffers outside the state dict, as every encoder's are."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach(), persistent=False)
    return module


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from reporting what we check ourselves."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
