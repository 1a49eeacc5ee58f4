"""Small real corpora: drawn pictures, encoded clips, documents."""

import io
import json
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from data_pipeline.config import DatasetConfig
from data_pipeline.shards import ShardWriter, npy_bytes

S, C = 4, 6


def picture(number: int, size: tuple[int, int] = (12, 8), form: str = "PNG") -> bytes:
    """A picture of one colour that names its number in red."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (number % 256, 50, 200)).save(buffer, form)
    return buffer.getvalue()


def clip_webp(frames: int, ms: int = 100) -> bytes:
    """An animated WebP, lossless, whose frame i has red 10 * i."""
    images = [Image.new("RGB", (16, 16), (10 * i, 80, 160)) for i in range(frames)]
    buffer = io.BytesIO()
    images[0].save(
        buffer, "WEBP", save_all=True, append_images=images[1:], duration=ms, lossless=True, kmin=1, kmax=1
    )
    return buffer.getvalue()


def clip_mp4(frames: int, fps: int = 10, codec: str = "libx264", form: str = "mp4") -> bytes:
    """An encoded clip whose frame i is grey 4 * i."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 32, 32, "yuv420p", 7
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 4 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def features(number: int, frames: int = 1) -> bytes:
    return npy_bytes(np.full((frames, S, C), number, np.float16))


def write_pairs(folder: Path | str, count: int, *, per_shard: int = 5, first: int = 0) -> None:
    with ShardWriter(str(folder), max_samples=per_shard) as writer:
        for i in range(first, first + count):
            writer.write(f"p{i:03d}", {"png": picture(i), "txt": f"picture {i}".encode()})


def document(images: int, words: int = 3) -> dict[str, Any]:
    items: list[dict[str, str]] = [{"text": "lead " * words}]
    for i in range(images):
        items += [{"image": f"{i}.png"}, {"text": f"about {i} " * words}]
    return {"items": items}


def write_documents(folder: Path | str, count: int, *, images: int = 3) -> None:
    with ShardWriter(str(folder), max_samples=4) as writer:
        for d in range(count):
            members = {"json": json.dumps(document(images)).encode()}
            members |= {f"{i}.png": picture(10 * d + i) for i in range(images)}
            writer.write(f"d{d:03d}", members)


def write_videos(folder: Path | str, count: int) -> None:
    with ShardWriter(str(folder), max_samples=4) as writer:
        for i in range(count):
            clip = {"webp": clip_webp(6)} if i % 2 else {"mp4": clip_mp4(12)}
            writer.write(f"v{i:03d}", {**clip, "txt": f"clip {i}".encode()})


def pairs_config(*urls: Path | str, **changes: Any) -> DatasetConfig:
    settings: dict[str, Any] = {
        "name": "pairs",
        "kind": "pair",
        "batch_size": 4,
        "seq_len": 24,
        "image_size": 8,
        "shuffle_shards": 2,
    }
    return DatasetConfig(urls=tuple(str(u) for u in urls), **(settings | changes))


def one_of_each(folder: Path) -> tuple[DatasetConfig, ...]:
    """One data set of each kind."""
    if not (folder / "pairs").exists():
        write_pairs(folder / "pairs", 11)
        write_documents(folder / "docs", 7)
        write_videos(folder / "videos", 5)
    common: dict[str, Any] = {"batch_size": 4, "image_size": 8, "shuffle_shards": 2}
    docs = DatasetConfig(
        name="docs", kind="interleaved", urls=(str(folder / "docs"),), seq_len=48, max_media=2, **common
    )
    videos = DatasetConfig(
        name="videos", kind="video", urls=(str(folder / "videos"),), seq_len=24, frames=3, **common
    )
    return pairs_config(folder / "pairs"), docs, videos
