"""Clips of a corpus: checks, and clips made from numbered frames."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from io import BytesIO

import av
import numpy as np
from PIL import Image

from data_pipeline.building.config import BuildConfig
from data_pipeline.building.images import EXTENSIONS
from data_pipeline.errors import BadSampleError
from data_pipeline.media import PIL_VIDEO_EXTENSIONS, VIDEO_EXTENSIONS


def check_video(blob: bytes, extension: str, config: BuildConfig) -> str:
    """Check a clip: it can be opened, its first frame can be decoded, its size and length are within limits.

    Args:
        blob: the encoded clip.
        extension: ending of its file.
        config: the limits.

    Returns:
        The ending of the kept file.

    Raises:
        BadSampleError: its `cause` names the filter.
    """
    extension = extension.lower()
    if extension not in VIDEO_EXTENSIONS:
        raise BadSampleError(
            "no video of a known format", f".{extension}; known: {', '.join(VIDEO_EXTENSIONS)}"
        )
    if len(blob) > config.video.max_bytes:
        raise BadSampleError(f"over {config.video.max_bytes} bytes", f"{len(blob)}")
    try:
        measure = _measure_pil if extension in PIL_VIDEO_EXTENSIONS else _measure_av
        seconds = measure(blob, config)
    except BadSampleError:
        raise
    except Exception as error:  # FFmpeg and Pillow raise many kinds
        raise BadSampleError("corrupt video", f"{type(error).__name__}: {error}"[:200]) from error
    if not config.video.min_seconds <= seconds <= config.video.max_seconds:
        low, high = config.video.min_seconds, config.video.max_seconds
        raise BadSampleError(f"length outside {low:g} to {high:g} s", f"{seconds:.2f} s")
    return extension


def _check_pixels(width: int, height: int, config: BuildConfig) -> None:
    """Refuse frames that are too small or too large before any is decoded."""
    if width * height > config.image.max_pixels:
        raise BadSampleError("too many pixels", f"{width} x {height}")
    if min(width, height) < config.image.min_side:
        raise BadSampleError(f"side under {config.image.min_side} pixels", f"{width} x {height}")


def _measure_av(blob: bytes, config: BuildConfig) -> float:
    """Return the seconds of a clip by its packets: headers lie."""
    with av.open(BytesIO(blob)) as container:
        if not container.streams.video:
            raise BadSampleError("corrupt video", "no video stream")
        stream = container.streams.video[0]
        _check_pixels(stream.width, stream.height, config)
        base = stream.time_base
        marks = [(p.pts, p.duration or 0) for p in container.demux(stream) if p.pts is not None]
    if not marks or base is None:
        raise BadSampleError("corrupt video", "no frames")
    with av.open(BytesIO(blob)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        if next(iter(container.decode(video=0)), None) is None:
            raise BadSampleError("corrupt video", "no frame can be decoded")
    first, last = min(marks)[0], max(marks)
    return float((last[0] - first + last[1]) * base)


def _measure_pil(blob: bytes, config: BuildConfig) -> float:
    """Return the seconds of an animated image; all frames are taken to last as long as the first."""
    with Image.open(BytesIO(blob), formats=["WEBP", "GIF"]) as image:
        _check_pixels(image.width, image.height, config)
        image.load()
        return getattr(image, "n_frames", 1) * (image.info.get("duration") or 100) / 1000


def encode_frames(blobs: Sequence[bytes], config: BuildConfig) -> bytes:
    """Make an H.264 clip of numbered frames; the same frames give the same bytes.

    Args:
        blobs: encoded images in order; all are scaled to the first one's size, rounded down to even sides.
        config: frame rate and limits.

    Returns:
        An mp4 file.

    Raises:
        BadSampleError: for a frame that cannot be decoded or is out of bounds.
    """
    if not blobs or len(blobs) > config.video.max_frames:
        raise BadSampleError("number of frames", f"{len(blobs)}, allowed are 1 to {config.video.max_frames}")
    buffer = BytesIO()
    size: tuple[int, int] | None = None
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        rate = round(config.video.fps * 1000)
        stream = container.add_stream("libx264", rate=_fraction(rate))
        stream.pix_fmt = "yuv420p"
        # With x264's macroblock tree, bytes hang on what else the process and the machine do (docs/decisions.md).
        stream.options = {"crf": "18", "flags": "+bitexact", "x264-params": "mbtree=0"}
        stream.codec_context.thread_count = 1  # threads change what the encoder decides
        for blob in blobs:
            image = _frame(blob, config)
            if size is None:
                size = (image.width // 2 * 2, image.height // 2 * 2)
                stream.width, stream.height = size
            if image.size != size:
                image = image.resize(size, Image.Resampling.BICUBIC)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(image), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def _fraction(thousandths: int) -> object:
    from fractions import Fraction

    return Fraction(thousandths, 1000)


def _frame(blob: bytes, config: BuildConfig) -> Image.Image:
    """Decode one frame to RGB."""
    if len(blob) > config.image.max_bytes:
        raise BadSampleError(f"over {config.image.max_bytes} bytes", f"a frame of {len(blob)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(BytesIO(blob), formats=list(EXTENSIONS))
            _check_pixels(image.width, image.height, config)
            return image.convert("RGB")
        except BadSampleError:
            raise
        except Exception as error:  # Pillow's plugins raise anything
            raise BadSampleError("corrupt image", f"{type(error).__name__}: {error}"[:200]) from error
