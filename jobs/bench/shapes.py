"""The shapes that are timed: named ones of the paper's sizes first, then the sweep."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, TypeAlias

Layout = Literal["even", "skewed", "text_first", "no_image"]
"""How a sample's rows are shared among its images: equally; each image half of what is left; a quarter of the rows
before the first image, then equally; no row sees any image (the slots are padding)."""

LAYOUTS: tuple[Layout, ...] = ("even", "skewed", "text_first", "no_image")


@dataclass(frozen=True, kw_only=True)
class XattnShape:
    """Image-causal cross-attention of a batch."""

    op: ClassVar[str] = "gated_xattn"
    name: str
    """What the tables call it."""
    batch: int
    """B: samples."""
    rows: int
    """T: text rows of a sample ("L" in the tables)."""
    images: int
    """M: images of a sample ("N" in the tables)."""
    heads: int
    """H."""
    head_dim: int
    """K."""
    latents: int = 64
    """R: latents of an image."""
    layout: Layout = "even"
    """How rows are shared among images."""
    width: int = 0
    """D: width of the LM, for the whole layer; 0 is `heads * head_dim`."""
    media_width: int = 1536
    """E: width of the latents, for the whole layer."""

    @property
    def stream(self) -> int:
        """Width of the LM's stream."""
        return self.width or self.heads * self.head_dim

    def spans(self) -> list[tuple[int, int]]:
        """Return first row and end of each image's span within a sample; empty where no row sees the image."""
        if self.layout == "no_image":
            return [(0, 0)] * self.images
        first = self.rows // 4 if self.layout == "text_first" else 0
        spans, left = [], self.rows - first
        for image in range(self.images):
            others = self.images - image - 1
            share = left // (others + 1)
            if self.layout == "skewed":
                share = left if others == 0 else min(max(1, left // 2), max(0, left - others))
            elif others == 0:
                share = left
            spans.append((self.rows - left, self.rows - left + share))
            left -= share
        return spans

    def media_index(self) -> list[int]:
        """Return for each row of a sample the image that it sees, counted from 1, or 0."""
        index = [0] * self.rows
        for image, (start, end) in enumerate(self.spans(), start=1):
            index[start:end] = [image] * (end - start)
        return index

    def seeing(self) -> tuple[int, int]:
        """Return how many rows of the batch see an image, and how many images are seen."""
        lengths = [end - start for start, end in self.spans()]
        return self.batch * sum(lengths), self.batch * sum(length > 0 for length in lengths)


@dataclass(frozen=True, kw_only=True)
class PerceiverShape:
    """Attention of a Resampler layer."""

    op: ClassVar[str] = "perceiver_attn"
    name: str
    media: int
    """N: images or videos of the batch."""
    features: int
    """J: frames times spatial features."""
    heads: int = 16
    head_dim: int = 96
    latents: int = 64
    """R."""
    width: int = 0
    """E, for the whole layer; 0 is `heads * head_dim`."""

    @property
    def stream(self) -> int:
        """Width of the latents."""
        return self.width or self.heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class AddNormShape:
    """Residual addition and LayerNorm over a stream."""

    op: ClassVar[str] = "add_layernorm"
    name: str
    rows: int
    """Rows of the stream, over the batch."""
    width: int
    """D."""


@dataclass(frozen=True, kw_only=True)
class Relu2Shape:
    """Gated squared ReLU of an FFW's hidden activations."""

    op: ClassVar[str] = "gated_relu2"
    name: str
    rows: int
    """Rows of the stream, over the batch."""
    width: int
    """Hidden width, 4 D in the paper."""


Shape: TypeAlias = XattnShape | PerceiverShape | AddNormShape | Relu2Shape
OPS = ("gated_xattn", "perceiver_attn", "add_layernorm", "gated_relu2")
UNTIMED = ("conv_epilogue",)
"""Kernels that are timed in a step alone (`flamingo bench step --pixels --profile`)."""


def sizes(shape: Shape) -> dict[str, Any]:
    """Return the numbers of a shape, without its name."""
    return {key: value for key, value in asdict(shape).items() if key != "name"}


def _size(name: str, heads: int) -> list[XattnShape]:
    """Return the two shapes of one size of the paper: its training shape and a long 32-image context."""
    return [
        XattnShape(name=f"{name} train", batch=64, rows=256, images=5, heads=heads, head_dim=128),
        XattnShape(name=f"{name} long", batch=8, rows=2048, images=32, heads=heads, head_dim=128),
    ]


XATTN = [
    *_size("80B", 64),
    *_size("9B", 32),
    *_size("3B", 16),
    XattnShape(name="OpenFlamingo", batch=64, rows=256, images=5, heads=8, head_dim=64, width=2048),
    XattnShape(
        name="smoke", batch=4, rows=96, images=3, heads=4, head_dim=16, latents=8, width=64, media_width=48
    ),
]
"""Named shapes of cross-attention: the sizes of the paper's tables 4 and 5, OpenFlamingo's, and the smoke recipe."""

PERCEIVER = [
    PerceiverShape(name="images 320 px", media=320, features=100),
    PerceiverShape(name="videos 8 x 100", media=64, features=800),
    PerceiverShape(name="images 480 px", media=320, features=225),
    PerceiverShape(name="videos 30 x 100", media=32, features=3000),
    PerceiverShape(name="videos 30 x 225", media=16, features=6750),
    PerceiverShape(name="images 320 px, heads of 128", media=320, features=100, head_dim=128, width=1536),
    PerceiverShape(name="smoke", media=8, features=16, heads=4, head_dim=16, latents=8, width=48),
]
"""Named shapes of the Resampler: 320 px at stride 32 is 10 x 10 features, 480 px 15 x 15. Heads are those of the
paper's text, and in one shape those of the recipes."""

FUSED: list[Shape] = [
    AddNormShape(name="80B stream", rows=16_384, width=8192),
    Relu2Shape(name="80B hidden", rows=16_384, width=32_768),
    AddNormShape(name="9B stream", rows=16_384, width=4096),
    Relu2Shape(name="9B hidden", rows=16_384, width=16_384),
    AddNormShape(name="3B stream", rows=16_384, width=2048),
    Relu2Shape(name="3B hidden", rows=16_384, width=8192),
]
"""Named shapes of the element-wise functions."""

_TINY_XATTN = XattnShape(
    name="tiny", batch=1, rows=16, images=2, heads=2, head_dim=16, latents=8, width=32, media_width=24
)
TINY: list[Shape] = [
    replace(_TINY_XATTN, name="tiny text first", layout="text_first"),
    _TINY_XATTN,
    PerceiverShape(name="tiny", media=1, features=10, heads=2, head_dim=16, latents=8, width=32),
    AddNormShape(name="tiny", rows=6, width=32),
    Relu2Shape(name="tiny", rows=12, width=64),
]
"""Shapes for machines without a GPU: they prove the path, their times mean nothing."""

TOKENS = 16_384
"""Text rows of a swept batch."""
SWEPT_IMAGES = (5, 32, 1, 2, 8, 16)
SWEPT_ROWS = (256, 2048, 512)
SWEPT_INNER = 4096
"""Heads times head width of the swept shapes, those of 9B."""


def sweep() -> Iterator[XattnShape]:
    """Yield the swept shapes of cross-attention, the most telling first: even spans, tiny batches, the rest."""

    def shape(layout: Layout, head_dim: int, rows: int, images: int, batch: int) -> XattnShape:
        return XattnShape(
            name=f"B{batch} L{rows} N{images} {layout} K{head_dim}",
            batch=batch,
            rows=rows,
            images=images,
            heads=SWEPT_INNER // head_dim,
            head_dim=head_dim,
            layout=layout,
        )

    for rows in SWEPT_ROWS:
        for images in SWEPT_IMAGES:
            yield shape("even", 128, rows, images, TOKENS // rows)
    for rows in SWEPT_ROWS:
        for images in (1, 2, 5):
            yield shape("even", 128, rows, images, 1)
    for layout in LAYOUTS:
        for head_dim in (128, 64):
            if (layout, head_dim) == ("even", 128):
                continue
            for rows in SWEPT_ROWS:
                for images in SWEPT_IMAGES:
                    yield shape(layout, head_dim, rows, images, TOKENS // rows)


def resampler_sweep() -> Iterator[PerceiverShape]:
    """Yield the swept shapes of the Resampler: number of features, then few media."""
    for media in (64, 8, 1):
        for features in (100, 225, 800, 1800, 3000):
            yield PerceiverShape(name=f"N{media} J{features}", media=media, features=features)
