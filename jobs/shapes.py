"""Generated data: coloured shapes with captions, in the three kinds of sample.

For smoke runs and tests, where nothing may be downloaded. The captions can be told from the pictures alone, so
even a tiny network has something to learn.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data_pipeline.shards import ShardWriter

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 70, 220), "black": (20, 20, 20)}
SHAPES = ("circle", "square", "triangle")
SIZE = 32
"""Height and width of a picture in pixels."""
FRAMES = 4
"""Frames of a video."""
VERSION = 1
"""Raise it when the generated data change."""


@dataclass(frozen=True, kw_only=True)
class ShapesConfig:
    """How much is generated."""

    pairs: int = 96
    """Image-text pairs."""
    documents: int = 32
    """Interleaved documents."""
    videos: int = 24
    """Clips."""
    held_out: int = 32
    """Held-out pairs."""
    samples_per_shard: int = 16
    """Small, so that a tiny corpus has several shards."""
    seed: int = 0
    """Seed of everything."""


def picture(colour: str, shape: str, centre: tuple[float, float], radius: float) -> Image.Image:
    """Draw one shape on white.

    Args:
        colour: a name in `COLOURS`.
        shape: a name in `SHAPES`.
        centre: x, y in pixels.
        radius: half the shape's size in pixels.
    """
    image = Image.new("RGB", (SIZE, SIZE), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    (x, y), fill = centre, COLOURS[colour]
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill=fill)
    elif shape == "square":
        draw.rectangle(box, fill=fill)
    else:
        draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=fill)
    return image


def write_shapes(folder: Path, config: ShapesConfig | None = None) -> dict[str, str]:
    """Write the data sets "pairs", "documents", "videos" and "held_out"; found ones are left as they are.

    Args:
        folder: where to; one folder of shards for each data set.
        config: how much.

    Returns:
        URL of each data set.
    """
    config = config or ShapesConfig()
    makers = {
        "pairs": (_pairs, config.pairs),
        "documents": (_documents, config.documents),
        "videos": (_videos, config.videos),
        "held_out": (_pairs, config.held_out),
    }
    for number, (name, (make, count)) in enumerate(makers.items()):
        target = folder / name
        if (target / "index.json").exists():
            continue
        writer = ShardWriter(str(target), max_samples=config.samples_per_shard)
        for key, members in make(np.random.default_rng((config.seed, number)), count):
            writer.write(key, members)
        writer.close()
    return {name: str(folder / name) for name in makers}


def _draw(rng: np.random.Generator) -> tuple[str, str]:
    return str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))


def _place(rng: np.random.Generator) -> tuple[tuple[float, float], float]:
    radius = float(rng.uniform(6, 11))
    x, y = rng.uniform(radius, SIZE - radius, 2)
    return (float(x), float(y)), radius


def _pairs(rng: np.random.Generator, count: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    for number in range(count):
        colour, shape = _draw(rng)
        image = picture(colour, shape, *_place(rng))
        yield f"pair{number:05d}", {"png": _png(image), "txt": f"a {colour} {shape}".encode()}


def _documents(rng: np.random.Generator, count: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    for number in range(count):
        items: list[dict[str, str]] = [{"text": "some shapes."}]
        members: dict[str, bytes] = {}
        for place in range(int(rng.integers(1, 4))):
            colour, shape = _draw(rng)
            members[f"{place}.png"] = _png(picture(colour, shape, *_place(rng)))
            items += [{"image": f"{place}.png"}, {"text": f"here is a {colour} {shape}."}]
        yield f"doc{number:05d}", {"json": json.dumps({"items": items}).encode(), **members}


def _videos(rng: np.random.Generator, count: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    for number in range(count):
        colour, shape = _draw(rng)
        (_, y), radius = _place(rng)
        way = str(rng.choice(["left", "right"]))
        xs = np.linspace(radius, SIZE - radius, FRAMES)
        frames = [picture(colour, shape, (float(x), y), radius) for x in (xs if way == "right" else xs[::-1])]
        clip = io.BytesIO()
        frames[0].save(clip, "GIF", save_all=True, append_images=frames[1:], duration=250, loop=0)
        caption = f"a {colour} {shape} moves {way}"
        yield f"clip{number:05d}", {"gif": clip.getvalue(), "txt": caption.encode()}


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
