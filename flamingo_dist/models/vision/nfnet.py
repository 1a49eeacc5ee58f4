"""NFNet (arXiv 2102.06171) as a frozen encoder: the paper's NFNet-F6, its smaller kin, and a tiny one.

What training needs is folded away once, at construction: the standardisation of the weights with its gain, the
activation's constant and the blocks' beta, which are factors of what the next convolution reads.
"""

from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from flamingo_dist.models.vision.base import FrozenConv, Normalisation, VisionEncoder, flatten_grid
from flamingo_dist.models.vision.config import IMAGENET_MEAN, IMAGENET_STD, VisionConfig
from flamingo_dist.models.vision.nfnet_shape import (
    ALPHA,
    NFNETS,
    BlockShape,
    ConvShape,
    NFNetShape,
    TensorSpec,
)
from flamingo_dist.models.vision.nfnet_weights import Published, Reader, drawn, empty
from flamingo_dist.models.weights.source import WeightSource
from kernels.dispatch import Implementation
from kernels.dispatch_fused import bias_gelu_, gated_residual_

GAMMA = 1.7015043497085571
"""Scales GELU's output to unit variance where its input has it (the published constant)."""
EPSILON = 1e-4
"""Least variance of a weight times its fan-in, in the published standardisation."""


class NFNet(VisionEncoder):
    """All of an NFNet but its classifier: features after the final 1x1 convolution and its activation.

    Input is normalised by ImageNet's mean and standard deviation, as the published code does.
    """

    implementation: Implementation = "reference"
    """Of what follows a convolution, see `fuse`."""

    def __init__(self, config: VisionConfig, source: WeightSource | None = None) -> None:
        """Load or draw the weights.

        Args:
            config: the encoder; without `weights` they are drawn from `nfnet_seed`, and on the meta device
                (`with torch.device("meta")`) none are made.
            source: opened `config.weights`; None where there are none, or none are made.

        Raises:
            ValueError: the source holds other weights.
        """
        super().__init__(config)
        shape = NFNETS[config.name]
        self.normalise = Normalisation(IMAGENET_MEAN, IMAGENET_STD, config.torch_dtype)
        parts = _Parts(shape, _reader(config, shape, source), config.torch_dtype)
        self.stem = nn.ModuleList(
            parts.conv(f"stem_conv{i}", conv, GAMMA if i else 1.0) for i, conv in enumerate(shape.stem)
        )
        blocks = list(shape.blocks())
        self.blocks = nn.ModuleList(_Block(block, parts, last=block is blocks[-1]) for block in blocks)
        self.final = parts.conv("final_conv", shape.final, 1.0)

    def repeated_blocks(self) -> Iterable[nn.Module]:
        """Return the residual blocks."""
        return self.blocks

    def fuse(self) -> None:
        """Take one Triton kernel for what follows a convolution, where it can run."""
        self.implementation = "auto"

    def encode(self, pixels_N3HW: Tensor) -> Tensor:
        """Return features [N, h * w, C] of uint8 pixels [N, 3, H, W]."""
        x = self.normalise(pixels_N3HW).contiguous(memory_format=torch.channels_last)
        for conv in cast(Iterable[FrozenConv], self.stem):
            x = bias_gelu_(conv.without_bias(x), conv.bias, implementation=self.implementation)
        stream = [x]
        del x  # the stream holds it alone, see `_Block.forward`
        for block in self.blocks:
            stream = block(stream, self.implementation)
        x = self.final.without_bias(stream.pop())
        x = bias_gelu_(x, self.final.bias, implementation=self.implementation)
        return flatten_grid(x.mul_(GAMMA))


class _Block(nn.Module):
    """A residual block: bottleneck with two grouped 3x3 convolutions, squeeze-and-excite, skip gain."""

    scale: Tensor

    def __init__(self, block: BlockShape, parts: "_Parts", *, last: bool) -> None:
        super().__init__()
        self.last = last
        convs = block.convs
        # The convolutions that read the block's input read GELU's output: times its constant and beta.
        entry = GAMMA * block.beta

        def conv(name: str, factor: float) -> FrozenConv:
            return parts.conv(f"{block.haiku}/~/{name}", convs[name], factor)

        self.shortcut = conv("conv_shortcut", entry) if "conv_shortcut" in convs else None
        self.pools = block.stride > 1
        self.conv0 = conv("conv0", entry)
        self.inner = nn.ModuleList(conv(name, GAMMA) for name in ("conv1", "conv1b", "conv2"))
        self.squeeze = parts.linear(f"{block.haiku}/~/squeeze_excite/~/linear")
        self.excite = parts.linear(f"{block.haiku}/~/squeeze_excite/~/linear_1")
        # The published code doubles the gate to make up for the sigmoid's half.
        scale = 2.0 * ALPHA * parts.read(f"{block.haiku}/skip_gain")
        self.register_buffer("scale", scale.to(parts.dtype), persistent=False)

    def forward(self, stream: list[Tensor], implementation: Implementation) -> list[Tensor]:
        """Run the block.

        Args:
            stream: x and gelu(x), both [N, in, h, w]; a block with a shortcut reads the latter alone. The list is
                emptied, so that each of the two is freed once the convolutions that read it have run.
            implementation: of what follows a convolution.

        Returns:
            The block's result [N, out, h / stride, w / stride] and GELU of it, which the last block leaves out.
        """
        y = stream.pop()
        if self.shortcut is None:
            residual, residual_bias = stream.pop(), None
        else:
            stream.clear()
            residual = self.shortcut.without_bias(nn.functional.avg_pool2d(y, 2) if self.pools else y)
            residual_bias = self.shortcut.bias
        y, bias = self.conv0.without_bias(y), self.conv0.bias
        for conv in cast(Iterable[FrozenConv], self.inner):
            y, bias = conv.without_bias(bias_gelu_(y, bias, implementation=implementation)), conv.bias
        squeezed = nn.functional.relu(self.squeeze(y.mean((2, 3)) + bias))
        gate_NC = torch.sigmoid(self.excite(squeezed)) * self.scale
        out, activated = gated_residual_(
            residual,
            residual_bias,
            y,
            bias,
            gate_NC,
            activate=not self.last,
            implementation=implementation,
        )
        return [out] if activated is None else [out, activated]


class _Linear(nn.Module):
    """A linear layer with fixed weights."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", weight.to(dtype).contiguous(), persistent=False)
        self.register_buffer("bias", bias.to(dtype), persistent=False)

    def forward(self, x_NC: Tensor) -> Tensor:
        """Map [N, in] to [N, out]."""
        return nn.functional.linear(x_NC, self.weight, self.bias)


class _Parts:
    """Makes the layers of a network by their published names."""

    def __init__(self, shape: NFNetShape, reader: Reader, dtype: torch.dtype) -> None:
        self._specs: Mapping[str, TensorSpec] = {spec.haiku: spec for spec in shape.tensors()}
        self._reader, self.dtype = reader, dtype

    def read(self, name: str) -> Tensor:
        """Return one tensor in torch's layout, fp32."""
        return self._reader(self._specs[name])

    def conv(self, name: str, shape: ConvShape, factor: float) -> FrozenConv:
        """Return a convolution that reads its input times `factor`, its weights standardised."""
        weight, bias = self.read(f"{name}/w"), self.read(f"{name}/bias")
        if not weight.is_meta:  # ten operations without a result would be a second for F6
            weight = (standardised(weight, self.read(f"{name}/gain")) * factor).float()
        return FrozenConv(weight, bias, self.dtype, stride=shape.stride, groups=shape.groups)

    def linear(self, name: str) -> _Linear:
        """Return a linear layer."""
        return _Linear(self.read(f"{name}/w"), self.read(f"{name}/b"), self.dtype)


def standardised(weight: Tensor, gain: Tensor) -> Tensor:
    """Return scaled weight standardisation as published.

    Args:
        weight: of shape [out, in, k, k].
        gain: of shape [out].

    Returns:
        fp64, of shape [out, in, k, k]: every output's weights with mean 0 and norm `gain`.
    """
    weight = weight.double()
    variance = weight.var((1, 2, 3), correction=0, keepdim=True)
    scale = (variance * weight[0].numel()).clamp(min=EPSILON).rsqrt() * gain.double()[:, None, None, None]
    return (weight - weight.mean((1, 2, 3), keepdim=True)) * scale


def _reader(config: VisionConfig, shape: NFNetShape, source: WeightSource | None) -> Reader:
    if source is not None:
        return Published(source, config.weights, shape)
    return (
        empty
        if config.weights or torch.get_default_device().type == "meta"
        else drawn(shape, config.nfnet_seed)
    )
