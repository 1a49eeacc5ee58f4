"""What a kernel must do at least: floating-point operations and bytes, from its shape alone.

Bytes count each input read once and each output written once; FLOPs count the products of an attention, two a
multiply-add. The ceilings are an H100's; they are arithmetic's assumptions, no measurement.
"""

from dataclasses import dataclass
from typing import Literal

from jobs.bench.shapes import XATTN, AddNormShape, PerceiverShape, Relu2Shape, Shape, XattnShape

Mode = Literal["fwd", "bwd", "fwd+bwd"]
MODES: tuple[Mode, ...] = ("fwd", "bwd", "fwd+bwd")

PEAK_FLOPS = 800e12
"""Dense bf16 FLOP/s of an H100 as matrix products reach them."""
PEAK_BYTES = 3.0e12
"""Bytes/s of its memory as copies reach them, read and written."""


@dataclass(frozen=True)
class Cost:
    """Least work of one call."""

    flops: float
    """Floating-point operations of the products."""
    bytes: float
    """Bytes read and written."""

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.bytes

    @property
    def floor_ms(self) -> float:
        """Milliseconds below which no kernel gets on the assumed machine."""
        return 1e3 * max(self.flops / PEAK_FLOPS, self.bytes / PEAK_BYTES)

    def __add__(self, other: "Cost") -> "Cost":
        """Return the cost of both."""
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


def cost(shape: Shape, mode: Mode, *, itemsize: int = 2) -> Cost:
    """Return the least work of a core operation.

    Args:
        shape: what is computed.
        mode: forward, backward or both.
        itemsize: bytes of an element; 2 for bf16.
    """
    if mode == "fwd+bwd":
        return cost(shape, "fwd", itemsize=itemsize) + cost(shape, "bwd", itemsize=itemsize)
    forward = mode == "fwd"
    if isinstance(shape, XattnShape):
        return _xattn(shape, forward, itemsize)
    if isinstance(shape, PerceiverShape):
        inner, keys = shape.heads * shape.head_dim, shape.features + shape.latents
        products = 4.0 * shape.media * shape.latents * keys * inner
        # Forward: q, out, k, v. Backward: q, out, their gradients; k, v and theirs.
        vectors = 2 * shape.latents + 2 * keys if forward else 4 * shape.latents + 4 * keys
        return Cost(products if forward else 2.5 * products, float(itemsize * shape.media * vectors * inner))
    if isinstance(shape, AddNormShape):
        # x, a -> y, z; dy, dz, y -> one gradient for both branches.
        return Cost(0.0, 4.0 * itemsize * shape.rows * shape.width)
    assert isinstance(shape, Relu2Shape)
    return Cost(0.0, (2.0 if forward else 3.0) * itemsize * shape.rows * shape.width)


def _xattn(shape: XattnShape, forward: bool, itemsize: int) -> Cost:
    """Return the cost of the block-diagonal products; rows that see nothing are written, never read."""
    inner = shape.heads * shape.head_dim
    rows, images = shape.seeing()
    all_rows, all_images = shape.batch * shape.rows, shape.batch * shape.images
    products = 4.0 * rows * shape.latents * inner
    if forward:
        vectors = rows + all_rows + 2 * images * shape.latents
        return Cost(products, float(itemsize * vectors * inner))
    # dO, q and dq; k, v and their gradients, which unseen images get as well.
    vectors = 2 * rows + all_rows + (2 * images + 2 * all_images) * shape.latents
    return Cost(2.5 * products, float(itemsize * vectors * inner))


def dense_flops(shape: XattnShape) -> float:
    """Return the forward FLOPs of a kernel that computes every score and masks: N times those needed."""
    return 4.0 * shape.batch * shape.rows * shape.images * shape.latents * shape.heads * shape.head_dim


def table() -> str:
    """Return the roofline of the named cross-attention shapes as a Markdown table: arithmetic, no measurement."""
    lines = [
        "| shape | text rows / latents | needed / dense GFLOP fwd | GB fwd | FLOP/B | floor fwd / bwd, ms |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for shape in XATTN:
        forward, backward = cost(shape, "fwd"), cost(shape, "bwd")
        sizes = f"B{shape.batch} L{shape.rows} N{shape.images}, {shape.heads} x {shape.head_dim}"
        rows, keys = shape.batch * shape.rows, shape.batch * shape.images * shape.latents
        cells = [
            f"{shape.name}, {sizes}",
            f"{rows:,} / {keys:,}",
            f"{_figure(forward.flops / 1e9)} / {_figure(dense_flops(shape) / 1e9)}",
            _figure(forward.bytes / 1e9),
            f"{forward.intensity:.0f}",
            f"{_figure(forward.floor_ms)} / {_figure(backward.floor_ms)}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _figure(value: float) -> str:
    """Write a number with two decimals, or two digits where that says more."""
    if value >= 10:
        return f"{value:,.0f}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"
