"""What every vision encoder offers, and how one is asked for."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

EFFICIENTNET_WIDTH = 1280
"""Channels of EfficientNet-Lite0's head."""
EFFICIENTNET_STRIDE = 32
TINY_STRIDE = 8
"""The tiny encoder halves its input three times."""
STD_FLOOR = 0.1
"""Added to a channel's standard deviation, as a share of the mean one: a channel that hardly ever fires would
otherwise be blown up."""


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Which frozen encoder turns pixels into features."""

    name: Literal["tiny", "efficientnet-lite0"] = "tiny"
    """`tiny`: a few random convolutions, for smoke runs and tests. `efficientnet-lite0`: ImageNet weights."""
    weights: str = ""
    """Path of the state dict (`.pth`) for `efficientnet-lite0`; `tiny` has none."""
    image_size: int = 32
    """Height and width of the input in pixels; a multiple of 8 for `tiny`, of 32 for `efficientnet-lite0`
    (trained at 224)."""
    tiny_width: int = 32
    """Feature channels of `tiny`."""
    tiny_seed: int = 0
    """`tiny` is drawn from this seed alone, so that stored features fit every run."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the encoder computes in. bfloat16 is about 2.5 times as fast on a CPU with AVX512-BF16, and moves
    the features of EfficientNet-Lite0 by about 5 percent of their norm."""
    statistics: str = ""
    """Path of a `.safetensors` file with `mean` and `std`, fp32 [C], of the features of a corpus (`jobs.statistics`
    writes it): features are then standardised channel by channel, so that what all its images share does not
    drown what tells them apart. "" leaves them as the encoder gives them."""

    def __post_init__(self) -> None:
        if self.name not in ("tiny", "efficientnet-lite0"):
            raise ValueError(f"vision encoder {self.name!r}: give 'tiny' or 'efficientnet-lite0'")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"vision dtype {self.dtype!r}: give 'float32' or 'bfloat16'")
        if self.image_size < self._stride or self.image_size % self._stride:
            raise ValueError(
                f"image_size {self.image_size} for {self.name}: give a positive multiple of {self._stride}"
            )
        if self.tiny_width < 8 or self.tiny_width % 4:
            raise ValueError(f"tiny_width {self.tiny_width}: give a multiple of 4, at least 8")
        if (self.name == "tiny") == bool(self.weights):
            raise ValueError(
                f"weights {self.weights!r} for {self.name}: give a path for 'efficientnet-lite0' "
                "and none for 'tiny'"
            )

    @property
    def pad_colour(self) -> tuple[int, int, int]:
        """RGB that the borders of an image which is not square are filled with: white, as transparency is."""
        return (255, 255, 255)

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch's."""
        return torch.float32 if self.dtype == "float32" else torch.bfloat16

    @property
    def _stride(self) -> int:
        return TINY_STRIDE if self.name == "tiny" else EFFICIENTNET_STRIDE

    @property
    def num_features(self) -> int:
        """S, the spatial features of one image; known without building the encoder."""
        return (self.image_size // self._stride) ** 2

    @property
    def width(self) -> int:
        """C, the channels of a feature; known without building the encoder."""
        return self.tiny_width if self.name == "tiny" else EFFICIENTNET_WIDTH

    def fingerprint(self) -> str:
        """Return a short hash of all that decides the features: settings, and the bytes of the weights.

        Raises:
            FileNotFoundError: the weights are not there.
        """
        settings = asdict(self) | {"weights": _sha256(Path(self.weights)) if self.weights else ""}
        del settings["statistics"]
        if self.statistics:
            settings["statistics"] = _sha256(Path(self.statistics))
        if self.name != "tiny":
            # What an encoder does not read must not make its features stale.
            del settings["tiny_width"], settings["tiny_seed"]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class VisionEncoder(nn.Module, ABC):
    """A frozen encoder from pixels to a grid of features.

    Its weights are buffers outside the state dict: they hold no gradient, no optimizer or ZeRO stage meets
    them, a checkpoint does not repeat them, and `VisionConfig` alone decides their values.
    """

    num_features: int
    """S, the spatial features of one image."""
    width: int
    """C, the channels of a feature."""
    mean_C: Tensor | None
    """fp32 [C], subtracted from the features; None where they stay as they are."""
    scale_C: Tensor | None
    """fp32 [C], what the difference is multiplied by."""
    image_size: int
    """Height and width of the input in pixels."""
    pad_colour: tuple[int, int, int]
    """RGB that the borders of an image which is not square are filled with."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.image_size, self.pad_colour = config.image_size, config.pad_colour
        self.num_features, self.width = config.num_features, config.width
        mean_C, scale_C = _standardisation(config)
        self.register_buffer("mean_C", mean_C, persistent=False)
        self.register_buffer("scale_C", scale_C, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the network to its device, but keep the dtype that `VisionConfig` asks for.

        `module.bfloat16()`, which DeepSpeed calls on the whole network, would otherwise make live features
        differ from stored ones.
        """
        super()._apply(lambda tensor: tensor.to(device=fn(tensor).device), recurse)
        return self

    @abstractmethod
    def encode(self, pixels_N3HW: Tensor) -> Tensor:
        """Return the features [N, C, h, w], in the encoder's dtype, of uint8 pixels [N, 3, H, W]."""

    @property
    def dtype(self) -> torch.dtype:
        """What the encoder computes in and returns."""
        return next(b.dtype for name, b in self.named_buffers() if name not in ("mean_C", "scale_C"))

    @torch.no_grad()
    def forward(self, pixels_N3HW: Tensor) -> Tensor:
        """Encode images.

        Args:
            pixels_N3HW: uint8 RGB, [N, 3, image_size, image_size]; N may be 0.

        Returns:
            features_NSC [N, num_features, width] in the encoder's dtype, row by row of the grid; no gradient.

        Raises:
            ValueError: another shape or dtype.
        """
        size = self.image_size
        if pixels_N3HW.shape[1:] != (3, size, size) or pixels_N3HW.dtype != torch.uint8:
            raise ValueError(
                f"pixels of shape {list(pixels_N3HW.shape)} and {pixels_N3HW.dtype}: give uint8 "
                f"[N, 3, {size}, {size}], as data_pipeline.media decodes them"
            )
        if pixels_N3HW.shape[0] == 0:
            shape = (0, self.num_features, self.width)
            return torch.empty(shape, dtype=self.dtype, device=pixels_N3HW.device)
        features_NSC = self.encode(pixels_N3HW).flatten(2).transpose(1, 2)
        if self.mean_C is not None and self.scale_C is not None:
            features_NSC = ((features_NSC.float() - self.mean_C) * self.scale_C).to(self.dtype)
        return features_NSC.contiguous()


def _standardisation(config: VisionConfig) -> tuple[Tensor | None, Tensor | None]:
    """Return the mean [C] and the factor [C] that `config.statistics` asks for, fp32, or None twice.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it holds no statistics of this encoder.
    """
    if not config.statistics:
        return None, None
    if not Path(config.statistics).is_file():
        raise FileNotFoundError(f"no statistics at {config.statistics!r}: `jobs.statistics` writes them")
    held = load_file(config.statistics)
    shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}
    if shapes != {"mean": (config.width,), "std": (config.width,)}:
        raise ValueError(
            f"{config.statistics} holds {shapes}; statistics of {config.name} are mean and std, [{config.width}] each."
        )
    std_C = held["std"].float()
    return held["mean"].float(), 1.0 / (std_C + STD_FLOOR * std_C.mean())


class FrozenConv(nn.Module):
    """A convolution with fixed weights and TensorFlow's SAME padding.

    At stride 2 the odd pixel of padding goes right and below.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self, weight: Tensor, bias: Tensor, dtype: torch.dtype, *, stride: int = 1, groups: int = 1
    ) -> None:
        """Hold the weights, laid out for channels-last convolution.

        Args:
            weight: [out, in / groups, k, k] with odd k, fp32.
            bias: [out], fp32.
            dtype: what to compute in.
            stride: 1 or 2.
            groups: as in `torch.nn.functional.conv2d`.
        """
        super().__init__()
        self.stride, self.groups, self.kernel = stride, groups, weight.shape[-1]
        weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias.to(dtype), persistent=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Convolve x_NCHW [N, in, h, w]; returns [N, out, ceil(h / stride), ceil(w / stride)]."""
        padding = self.kernel // 2
        if self.stride > 1:
            height, width = x_NCHW.shape[-2:]
            x_NCHW = nn.functional.pad(x_NCHW, (*self._same(width), *self._same(height)))
            padding = 0
        return nn.functional.conv2d(x_NCHW, self.weight, self.bias, self.stride, padding, 1, self.groups)

    def _same(self, length: int) -> tuple[int, int]:
        """Return the padding before and after one side of that length."""
        outputs = -(-length // self.stride)
        total = max((outputs - 1) * self.stride + self.kernel - length, 0)
        return total // 2, total - total // 2
