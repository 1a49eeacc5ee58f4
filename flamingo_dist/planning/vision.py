"""Parameters, operations and memory of the frozen vision encoders."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from flamingo_dist.models.vision.config import EFFICIENTNET_WIDTH, VisionConfig
from flamingo_dist.models.vision.efficientnet import STAGES
from flamingo_dist.models.vision.nfnet_shape import NFNETS, BlockShape, ConvShape

if TYPE_CHECKING:  # it imports transformers
    from flamingo_dist.models.vision.vit_shape import ViTShape

NORMALISATION = 6
"""Values of the mean and the standard deviation that pixels are normalised by."""


def vision_values(config: VisionConfig) -> int:
    """Count the values that the encoder keeps, whole on every rank.

    An NFNet's gains are folded into its weights: 0.27M fewer than the published count of F6.
    """
    if config.is_vit:
        return _vit_values(config.vit) + NORMALISATION
    values = sum(_numel(conv) + conv.outputs for conv, _ in _convolutions(config))
    for block in _blocks(config):
        values += 2 * block.squeezed * block.outputs + block.squeezed + block.outputs + 1
    return values + (NORMALISATION if config.is_nfnet else 0)


def vision_flops(config: VisionConfig) -> float:
    """Return the operations of encoding one frame: matrix products and convolutions, two for each product."""
    if config.is_vit:
        return _vit_flops(config.vit, config.image_size)
    products = sum(_numel(conv) * size**2 for conv, size in _convolutions(config))
    products += sum(2 * block.squeezed * block.outputs for block in _blocks(config))
    return 2.0 * products


def vision_working_bytes(config: VisionConfig) -> float:
    """Return the peak bytes of one frame while it is encoded: everything that lives at the same time.

    Workspaces of the convolutions are left out, and so are the features that are kept.
    """
    size = config.torch_dtype.itemsize
    area = 3.0 * config.image_size**2
    # Normalised in fp32, then in the encoder's dtype, then laid out anew; the encoders of the laptop runs skip fp32.
    pixels = area * max(4 + size if config.is_vit or config.is_nfnet else 0, 2 * size)
    if config.is_vit:
        return max(pixels, size * (area + _vit_live(config.vit, config.image_size)))
    live = [_conv_live(conv, side) for conv, side in _convolutions(config, blocks=not config.is_nfnet)]
    side = config.image_size // 4
    for block in _blocks(config):
        live.append(_block_live(block, side))
        side //= block.stride
    return max(pixels, size * max(live))


def _numel(conv: ConvShape) -> int:
    out, inputs, height, width = conv.weight
    return out * inputs * height * width


def _convolutions(config: VisionConfig, *, blocks: bool = True) -> Iterator[tuple[ConvShape, int]]:
    """Give every convolution and the side of its output.

    Args:
        config: a convolutional encoder.
        blocks: whether an NFNet's blocks are wanted.
    """
    side = config.image_size
    for conv in _in_order(config, blocks=blocks):
        side //= conv.stride
        # A shortcut comes after its block's first strided convolution, at the side that this has left.
        yield conv, side


def _in_order(config: VisionConfig, *, blocks: bool) -> Iterator[ConvShape]:
    if config.name == "tiny":
        widths = (3, config.width // 4, config.width // 2, config.width)
        for i in range(3):
            yield ConvShape(inputs=widths[i], outputs=widths[i + 1], kernel=3, stride=2)
    elif config.is_nfnet:
        shape = NFNETS[config.name]
        yield from shape.stem
        for block in shape.blocks() if blocks else ():
            yield from block.convs.values()
        if blocks:
            yield shape.final
    else:
        yield from _lite0()


def _lite0() -> Iterator[ConvShape]:
    yield ConvShape(inputs=3, outputs=32, kernel=3, stride=2)
    width = 32
    for repeats, kernel, stride, expansion, out in STAGES:
        for repeat in range(repeats):
            inner, step = width * expansion, stride if repeat == 0 else 1
            if expansion > 1:
                yield ConvShape(inputs=width, outputs=inner)
            yield ConvShape(inputs=inner, outputs=inner, kernel=kernel, stride=step, groups=inner)
            yield ConvShape(inputs=inner, outputs=out)
            width = out
    yield ConvShape(inputs=width, outputs=EFFICIENTNET_WIDTH)


def _blocks(config: VisionConfig) -> Iterator[BlockShape]:
    """Give the blocks of an NFNet; none for other encoders."""
    if config.is_nfnet:
        yield from NFNETS[config.name].blocks()


def _conv_live(conv: ConvShape, side: int) -> float:
    """Return the values alive in a convolution to `side`: input, its padded copy where it strides, output."""
    read = conv.inputs * (side * conv.stride) ** 2
    padded = conv.inputs * (side * conv.stride + 1) ** 2 if conv.stride > 1 else 0
    return read + padded + conv.outputs * side**2


def _block_live(block: BlockShape, side: int) -> float:
    """Return the values alive at the peak of an NFNet block that reads a grid of `side`."""
    small = side // block.stride
    x, out = block.inputs * side**2, block.outputs * small**2
    pooled = block.inputs * small**2 if block.stride > 1 else 0
    has_shortcut = "conv_shortcut" in block.convs  # then x itself is gone when the block begins
    residual = out if has_shortcut else x
    wide, narrow = block.inner * side**2, block.inner * small**2
    padded = block.inner * (side + 1) ** 2 if block.stride > 1 else 0
    return max(
        x + pooled + residual if has_shortcut else 0,  # the shortcut reads the activation's result
        x + residual + wide,  # so does the first convolution
        residual + wide + padded + narrow,
        residual + narrow + out,
        residual + 2 * out,  # the result lies where the last convolution's was; beside it its activation
    )


def _vit_values(vit: "ViTShape") -> int:
    width, norm = vit.width, 2 * vit.width
    positions = (vit.image_size // vit.patch) ** 2 + vit.has_class_token
    embeddings = 3 * vit.patch**2 * width + positions * width
    embeddings += width if vit.has_class_token else 0
    embeddings += norm if vit.name == "clip" else width  # a norm before the blocks; else the patches' bias
    biases = 2 * vit.ffn_width + width if vit.ffn_gated else vit.ffn_width + width
    biases += (3 * width if vit.qkv_bias else 0) + width
    scales = 2 * width if vit.name == "dinov2" else 0
    block = 4 * width**2 + _ffn(vit) + biases + 2 * norm + scales
    return embeddings + vit.layers * block + norm


def _ffn(vit: "ViTShape") -> int:
    return vit.width * vit.ffn_width * (3 if vit.ffn_gated else 2)


def _vit_flops(vit: "ViTShape", image_size: int) -> float:
    patches = (image_size // vit.patch) ** 2
    tokens = patches + vit.has_class_token
    linear = tokens * (4 * vit.width**2 + _ffn(vit))
    attention = 2 * tokens**2 * vit.width
    return 2.0 * (patches * 3 * vit.patch**2 * vit.width + vit.layers * (linear + attention))


def _vit_live(vit: "ViTShape", image_size: int) -> float:
    """Return the values alive in a block of a transformer.

    The embeddings, which transformers holds to the end, the block's input, the stream after attention and its norm,
    and the hidden ones of the feed-forward layer. quick_gelu is written out in three operations, so three hidden
    tensors live at once, as in gated layers. Attention, whose five are as wide as the stream, is mostly less.
    """
    hidden = vit.ffn_width * (3 if vit.ffn_gated or vit.activation == "quick_gelu" else 2)
    tokens = (image_size // vit.patch) ** 2 + vit.has_class_token
    return float(tokens * (4 * vit.width + max(hidden, 5 * vit.width)))
