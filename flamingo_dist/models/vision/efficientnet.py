"""EfficientNet-Lite0 as a frozen encoder, BatchNorm folded into the convolutions."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from flamingo_dist.models.vision.base import FrozenConv, VisionEncoder, flatten_grid
from flamingo_dist.models.vision.config import VisionConfig
from flamingo_dist.models.weights.source import WeightSource

BN_EPSILON = 1e-3

STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
"""Each stage's number of blocks, kernel, stride of its first block, expansion and width. The encoder reads kernels and
widths off the weights."""

ABSENT = (
    "no EfficientNet-Lite0 weights at {!r}: `jobs.demo.fetch.fetch_parts` fetches them (Parts.vision_encoder is "
    "the path)"
)
"""What is said where there are none."""
CPU_CHUNK = 4
"""Images at a time on a CPU: more do not fit its caches (70 images a second and core instead of 50)."""


class EfficientNetLite0(VisionEncoder):
    """The convolutional part of EfficientNet-Lite0: 1280 channels at 1/32 of the resolution.

    Input is scaled as in training: (pixel - 127) / 128.
    """

    def __init__(self, config: VisionConfig, source: WeightSource) -> None:
        """Load the weights from `source`, which is opened `config.weights`.

        Raises:
            ValueError: it holds other weights.
        """
        super().__init__(config)
        convs = FoldedConvs(_check(source, config.weights), config.torch_dtype)
        self.stem = convs.make("_conv_stem", "_bn0", stride=2)
        blocks: list[nn.Module] = []
        for repeats, _, stride, expansion, _ in STAGES:
            for repeat in range(repeats):
                first = repeat == 0
                prefix = f"_blocks.{len(blocks)}"
                first_stride = stride if first else 1
                block = _Block(convs, prefix, stride=first_stride, expand=expansion > 1, residual=not first)
                blocks.append(block)
        self.blocks = nn.ModuleList(blocks)
        self.head = convs.make("_conv_head", "_bn1")

    def repeated_blocks(self) -> Iterable[nn.Module]:
        """Return the inverted bottlenecks."""
        return self.blocks

    def encode(self, pixels_N3HW: Tensor) -> Tensor:
        """Return features [N, h * w, 1280] of uint8 pixels [N, 3, H, W]."""
        if pixels_N3HW.device.type != "cpu" or len(pixels_N3HW) <= CPU_CHUNK:
            return self._encode(pixels_N3HW)
        return torch.cat([self._encode(chunk) for chunk in torch.split(pixels_N3HW, CPU_CHUNK)])

    def _encode(self, pixels_N3HW: Tensor) -> Tensor:
        x = (pixels_N3HW.to(self.dtype) - 127.0) / 128.0
        x = nn.functional.relu6(self.stem(x.contiguous(memory_format=torch.channels_last)), inplace=True)
        for block in self.blocks:
            x = block(x)
        return flatten_grid(nn.functional.relu6(self.head(x), inplace=True))


class _Block(nn.Module):
    """Inverted bottleneck: expand, convolve each channel, project back; no squeeze-and-excite in Lite."""

    def __init__(
        self, convs: "FoldedConvs", prefix: str, *, stride: int, expand: bool, residual: bool
    ) -> None:
        super().__init__()
        self.expand = convs.make(f"{prefix}._expand_conv", f"{prefix}._bn0") if expand else None
        self.depthwise = convs.make(
            f"{prefix}._depthwise_conv", f"{prefix}._bn1", stride=stride, depthwise=True
        )
        self.project = convs.make(f"{prefix}._project_conv", f"{prefix}._bn2")
        self.residual = residual

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Map [N, in, h, w] to [N, out, h / stride, w / stride]."""
        y = x_NCHW
        if self.expand is not None:
            y = nn.functional.relu6(self.expand(y), inplace=True)
        out: Tensor = self.project(nn.functional.relu6(self.depthwise(y), inplace=True))
        return x_NCHW + out if self.residual else out


class FoldedConvs:
    """Makes convolutions out of a state dict's convolutions and the BatchNorms that follow them."""

    def __init__(self, source: WeightSource, dtype: torch.dtype) -> None:
        """Hold where the tensors are, and what the convolutions compute in."""
        self._source, self._dtype = source, dtype

    def make(self, conv: str, norm: str, *, stride: int = 1, depthwise: bool = False) -> FrozenConv:
        """Return `conv` followed by `norm` as one convolution.

        Args:
            conv: name of the convolution in the state dict, without ".weight".
            norm: name of the BatchNorm.
            stride: 1 or 2.
            depthwise: one filter for each channel.
        """
        names = ("weight", "bias", "running_mean", "running_var")
        gain, shift, mean, variance = (self._source.read(f"{norm}.{name}").float() for name in names)
        scale = gain * torch.rsqrt(variance + BN_EPSILON)
        weight = self._source.read(f"{conv}.weight").float() * scale[:, None, None, None]
        bias = shift - mean * scale
        groups = weight.shape[0] if depthwise else 1
        return FrozenConv(weight, bias, self._dtype, stride=stride, groups=groups)


def _check(source: WeightSource, where: str) -> WeightSource:
    """Return the source, if it holds a state dict of this network.

    Raises:
        ValueError: it does not.
    """
    blocks = sum(repeats for repeats, *_ in STAGES)
    expected = {f"_blocks.{blocks - 1}._project_conv.weight", "_conv_stem.weight", "_conv_head.weight"}
    if missing := expected - source.shapes().keys():
        raise ValueError(f"{where} is no state dict of EfficientNet-Lite0: it lacks {sorted(missing)}")
    return source
