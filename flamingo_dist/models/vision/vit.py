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
from flamingo_dist.models.weights.source import WeightSource

ABSENT = "no safetensors in {!r}: give a Hugging Face folder with them; pickles are not read."
"""What is said where there are none."""
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

    def __init__(self, config: VisionConfig, source: WeightSource | None) -> None:
        """Load the weights; on the meta device (`with torch.device("meta")`) none are made.

        Args:
            config: the encoder.
            source: opened `config.weights`; None where no values are made.

        Raises:
            FileNotFoundError: the folder's configuration is not there.
            ValueError: it holds another kind of model, or tensors are missing, superfluous or of another shape.
        """
        super().__init__(config)
        shape = config.vit
        self.normalise = Normalisation(shape.mean, shape.std, config.torch_dtype)
        self._skipped = int(shape.has_class_token and not config.class_token)
        # DINOv2 looks at the image's size by itself.
        resized = config.image_size != shape.image_size and shape.name != "dinov2"
        self._options = {"interpolate_pos_encoding": True} if resized else {}
        self.model = _freeze(_load(shape, config, source))
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


def _load(shape: ViTShape, config: VisionConfig, source: WeightSource | None) -> Any:
    """Return transformers' module with the source's weights, all of them and no others; without one, with no values."""
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
    options: Any = {"attn_implementation": "sdpa", "dtype": config.torch_dtype}
    if source is None:
        with torch.device("meta"):  # fake tensors do not survive what some classes draw
            model = model_class._from_config(vision, **options)
        return _without_values(_freeze(model))
    # transformers knows what its classes called these tensors in every version; it gets the vision part alone.
    names = [name for name in source.shapes() if not name.startswith(UNUSED)]
    with _quiet():
        model, report = model_class.from_pretrained(
            None,
            config=vision,
            state_dict={name: source.read(name).to(config.torch_dtype) for name in names},
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are reported to us
            **options,
        )
    _check(config, report)
    return model


def _without_values(frozen: Any) -> Any:
    """Put the buffers of `frozen` on the default device, without values: meta, or the fake one of a dry run."""
    for part in frozen.modules():
        for name, buffer in list(part.named_buffers(recurse=False)):
            part.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype), persistent=False)
    return frozen


def _check(config: VisionConfig, report: dict[str, Any]) -> None:
    """Check what transformers found amiss and would have gone on with.

    Raises:
        ValueError: a tensor is missing, superfluous or of another shape; the message names it.
    """
    wrong = [f"{n} of shape {list(a)} instead of {list(b)}" for n, a, b in report["mismatched_keys"]]
    faults = [
        f"{verb} {shortened(sorted(names))}"
        for verb, names in (
            ("lacks", report["missing_keys"]),
            ("holds the unknown", report["unexpected_keys"]),
            ("holds", wrong),
        )
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
