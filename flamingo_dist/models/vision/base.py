"""What every vision encoder offers, and the convolution of the frozen ones."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from flamingo_dist.models.vision.config import VisionConfig
from flamingo_dist.models.vision.files import open_tensors

STD_FLOOR = 0.1
"""Added to a channel's standard deviation, as a share of the mean one: a channel that hardly ever fires would
otherwise be blown up."""


class VisionEncoder(nn.Module, ABC):
    """A frozen encoder from pixels to a grid of features.

    Its weights are buffers outside the state dict: they hold no gradient, no optimizer or ZeRO stage meets
    them, a checkpoint does not repeat them, and `VisionConfig` alone decides their values.
    """

    num_features: int
    """S, the features of one image."""
    width: int
    """C, the channels of a feature."""
    mean_C: Tensor | None
    """fp32 [C], subtracted from the features; None where they stay as they are."""
    scale_C: Tensor | None
    """fp32 [C], what the difference is multiplied by."""
    image_size: int
    """Height and width of the input in pixels."""
    dtype: torch.dtype
    """What the encoder computes in and returns."""
    pad_colour: tuple[int, int, int]
    """RGB that the borders of an image which is not square are filled with."""
    is_compiled: bool = False
    """Whether `compile_blocks` was called, so that every further number of images costs a compilation."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.image_size, self.pad_colour = config.image_size, config.pad_colour
        self.num_features, self.width = config.num_features, config.width
        self.dtype = config.torch_dtype
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

    def repeated_blocks(self) -> Iterable[nn.Module]:
        """Return the blocks that most of the work is in; none where there are no such blocks."""
        return ()

    def fuse(self) -> None:
        """Take fused kernels where the encoder has any; most have none."""

    def compile_blocks(self, backend: str) -> None:
        """Let torch.compile make kernels of each of `repeated_blocks`, for every number of images anew.

        Numbers of images as a variable are no way out: at NFNet-F6 torch.compile reasoned about them for minutes.
        `encode_in_batches` keeps them few.

        Args:
            backend: of torch.compile.
        """
        for block in self.repeated_blocks():
            block.compile(backend=backend, dynamic=False)
            self.is_compiled = True

    @abstractmethod
    def encode(self, pixels_N3HW: Tensor) -> Tensor:
        """Return the features [N, S, C], in the encoder's dtype, of uint8 pixels [N, 3, H, W]."""

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
        features_NSC = self.encode(pixels_N3HW)
        if self.mean_C is not None and self.scale_C is not None:
            features_NSC = ((features_NSC.float() - self.mean_C) * self.scale_C).to(self.dtype)
        return features_NSC.contiguous()


class Normalisation(nn.Module):
    """Subtracts a mean from pixels and divides by a standard deviation, in fp32."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> None:
        """Hold the figures.

        Args:
            mean: of the channels' pixels, from 0 to 255.
            std: their standard deviations.
            dtype: of the result.
        """
        super().__init__()
        self.dtype = dtype
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, pixels_N3HW: Tensor) -> Tensor:
        """Normalise uint8 pixels [N, 3, H, W]; the result has the same shape."""
        return pixels_N3HW.float().sub_(self.mean).div_(self.std).to(self.dtype)


def flatten_grid(features_NCHW: Tensor) -> Tensor:
    """Return a grid [N, C, h, w] as features [N, h * w, C], row by row."""
    return features_NCHW.flatten(2).transpose(1, 2)


def is_without_values() -> bool:
    """Return whether tensors made now hold no values: on the meta device, or fake ones of a dry run."""
    made = torch.empty(0)
    return made.is_meta or isinstance(made, FakeTensor)


def _standardisation(config: VisionConfig) -> tuple[Tensor | None, Tensor | None]:
    """Return the mean [C] and the factor [C] that `config.statistics` asks for, fp32, or None twice.

    Where tensors hold no values the file is not opened, as those of weights are not.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it holds no statistics of this encoder.
    """
    if not config.statistics:
        return None, None
    if is_without_values():
        return torch.empty(config.width), torch.empty(config.width)
    absent = f"no statistics at {config.statistics!r}: `jobs.statistics` writes them"
    held = open_tensors(config.statistics, absent=absent)
    shapes = dict(held.shapes())
    if shapes != {"mean": (config.width,), "std": (config.width,)}:
        raise ValueError(
            f"{config.statistics} holds {shapes}; statistics of {config.name} are mean and std, [{config.width}] each."
        )
    std_C = held.read("std").float()
    return held.read("mean").float(), 1.0 / (std_C + STD_FLOOR * std_C.mean())


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
        return self._convolve(x_NCHW, self.bias)

    def without_bias(self, x_NCHW: Tensor) -> Tensor:
        """Convolve as `forward` does, [N, in, h, w] to [N, out, ...], and leave the bias to the caller."""
        return self._convolve(x_NCHW, None)

    def _convolve(self, x_NCHW: Tensor, bias_C: Tensor | None) -> Tensor:
        padding = self.kernel // 2
        if self.stride > 1:
            height, width = x_NCHW.shape[-2:]
            x_NCHW = nn.functional.pad(x_NCHW, (*self._same(width), *self._same(height)))
            padding = 0
        return nn.functional.conv2d(x_NCHW, self.weight, bias_C, self.stride, padding, 1, self.groups)

    def _same(self, length: int) -> tuple[int, int]:
        """Return the padding before and after one side of that length."""
        outputs = -(-length // self.stride)
        total = max((outputs - 1) * self.stride + self.kernel - length, 0)
        return total // 2, total - total // 2
