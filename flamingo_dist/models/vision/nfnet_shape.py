"""The shapes of the published NFNets (arXiv 2102.06171): layers, and the names of their weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

ALPHA = 0.2
"""Share of every residual branch."""
STEM = (16, 32, 64)
"""Widths of the stem's first three convolutions; the fourth has half the first stage's width."""
STEM_STRIDES = (2, 1, 1, 2)
STAGE_STRIDES = (1, 2, 2, 2)
STRIDE = 32
"""Pixels of a feature's side."""

TensorKind = Literal["conv", "linear", "gain", "vector", "scalar"]


@dataclass(frozen=True, kw_only=True)
class ConvShape:
    """One weight-standardised convolution."""

    inputs: int
    """Channels read."""
    outputs: int
    """Channels written."""
    kernel: int = 1
    """Side of the kernel."""
    stride: int = 1
    """Step."""
    groups: int = 1
    """Groups that the channels fall into."""

    @property
    def weight(self) -> tuple[int, int, int, int]:
        """Shape of the weight: outputs, inputs of a group, kernel, kernel."""
        return (self.outputs, self.inputs // self.groups, self.kernel, self.kernel)


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """One residual block."""

    number: int
    """Counted through all stages, from 0."""
    stage: int
    """Its stage, from 0."""
    position: int
    """Its place in the stage, from 0."""
    inputs: int
    """Channels read."""
    outputs: int
    """Channels written."""
    inner: int
    """Channels of the bottleneck."""
    groups: int
    """Groups of its 3x3 convolutions."""
    stride: int
    """Step of its first 3x3 convolution and of the shortcut."""
    beta: float
    """What its input is multiplied by: the reciprocal of the standard deviation that it has in a fresh network."""

    @property
    def squeezed(self) -> int:
        """Hidden width of squeeze-and-excite."""
        return max(1, self.outputs // 2)

    @property
    def convs(self) -> dict[str, ConvShape]:
        """Its convolutions, by their published names."""
        inner, groups = self.inner, self.groups
        convs = {
            "conv0": ConvShape(inputs=self.inputs, outputs=inner),
            "conv1": ConvShape(inputs=inner, outputs=inner, kernel=3, stride=self.stride, groups=groups),
            "conv1b": ConvShape(inputs=inner, outputs=inner, kernel=3, groups=groups),
            "conv2": ConvShape(inputs=inner, outputs=self.outputs),
        }
        if self.stride > 1 or self.inputs != self.outputs:
            convs["conv_shortcut"] = ConvShape(inputs=self.inputs, outputs=self.outputs)
        return convs

    @property
    def haiku(self) -> str:
        """Its name in the published haiku code."""
        return "nf_block" + (f"_{self.number}" if self.number else "")

    @property
    def timm(self) -> str:
        """Its name in timm."""
        return f"stages.{self.stage}.{self.position}"


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor of a checkpoint: its names, and its shape as torch lays it out."""

    haiku: str
    """Name in the published haiku files, without the leading `NFNet/~/`."""
    timm: str
    """Name in timm's files."""
    shape: tuple[int, ...]
    """Convolutions [out, in, k, k], linear layers [out, in], gains and biases [out]."""
    kind: TensorKind
    """Decides how a layout stores it, and how it is drawn where no weights are given."""


@dataclass(frozen=True, kw_only=True)
class NFNetShape:
    """A whole network up to the last feature grid; the classifier is left out."""

    depths: tuple[int, int, int, int]
    """Blocks of every stage."""
    widths: tuple[int, int, int, int] = (256, 512, 1536, 1536)
    """Channels of every stage."""
    group_width: int = 128
    """Channels of a group of the 3x3 convolutions."""

    @property
    def features(self) -> int:
        """Channels after the final 1x1 convolution."""
        return 2 * self.widths[-1]

    @property
    def stem(self) -> list[ConvShape]:
        """The four convolutions before the first block."""
        widths = (3, *STEM, self.widths[0] // 2)
        return [
            ConvShape(inputs=widths[i], outputs=widths[i + 1], kernel=3, stride=stride)
            for i, stride in enumerate(STEM_STRIDES)
        ]

    @property
    def final(self) -> ConvShape:
        """The 1x1 convolution after the last block."""
        return ConvShape(inputs=self.widths[-1], outputs=self.features)

    def blocks(self) -> Iterator[BlockShape]:
        """Give all blocks in order."""
        inputs, number, variance = self.widths[0] // 2, 0, 1.0
        for stage, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            groups = width // 2 // self.group_width
            for position in range(depth):
                yield BlockShape(
                    number=number,
                    stage=stage,
                    position=position,
                    inputs=inputs,
                    outputs=width,
                    inner=groups * self.group_width,
                    groups=groups,
                    stride=STAGE_STRIDES[stage] if position == 0 else 1,
                    beta=variance**-0.5,
                )
                # A stage's first block takes its shortcut from the scaled input, which starts the count anew.
                variance = (1.0 if position == 0 else variance) + ALPHA**2
                inputs, number = width, number + 1

    def tensors(self) -> Iterator[TensorSpec]:
        """Give every tensor that the features depend on."""
        for i, conv in enumerate(self.stem):
            yield from _conv_tensors(f"stem_conv{i}", f"stem.conv{i + 1}", conv)
        for block in self.blocks():
            yield from _block_tensors(block)
        yield from _conv_tensors("final_conv", "final_conv", self.final)


TIMM_CONVS = {
    "conv0": "conv1",
    "conv1": "conv2",
    "conv1b": "conv2b",
    "conv2": "conv3",
    "conv_shortcut": "downsample.conv",
}
"""timm's names of a block's convolutions by the published ones."""


def _conv_tensors(haiku: str, timm: str, conv: ConvShape) -> Iterator[TensorSpec]:
    yield TensorSpec(haiku=f"{haiku}/w", timm=f"{timm}.weight", shape=conv.weight, kind="conv")
    yield TensorSpec(haiku=f"{haiku}/gain", timm=f"{timm}.gain", shape=(conv.outputs,), kind="gain")
    yield TensorSpec(haiku=f"{haiku}/bias", timm=f"{timm}.bias", shape=(conv.outputs,), kind="vector")


def _block_tensors(block: BlockShape) -> Iterator[TensorSpec]:
    for name, conv in block.convs.items():
        yield from _conv_tensors(f"{block.haiku}/~/{name}", f"{block.timm}.{TIMM_CONVS[name]}", conv)
    sizes = ((block.squeezed, block.outputs), (block.outputs, block.squeezed))
    for name, layer, shape in zip(("linear", "linear_1"), ("fc1", "fc2"), sizes, strict=True):
        haiku, timm = f"{block.haiku}/~/squeeze_excite/~/{name}", f"{block.timm}.attn_last.{layer}"
        yield TensorSpec(haiku=f"{haiku}/w", timm=f"{timm}.weight", shape=shape, kind="linear")
        yield TensorSpec(haiku=f"{haiku}/b", timm=f"{timm}.bias", shape=shape[:1], kind="vector")
    yield TensorSpec(
        haiku=f"{block.haiku}/skip_gain", timm=f"{block.timm}.skipinit_gain", shape=(), kind="scalar"
    )


NFNETS = {
    f"nfnet-f{n}": NFNetShape(depths=(n + 1, 2 * (n + 1), 6 * (n + 1), 3 * (n + 1))) for n in range(8)
} | {"nfnet-tiny": NFNetShape(depths=(1, 2, 3, 1), widths=(32, 32, 48, 64), group_width=8)}
"""The published variants F0 to F7, and one of the same layers that is small enough for tests."""
