"""Bytes to pixels or features: decoding with limits, so that a hostile or broken file costs one sample."""

from __future__ import annotations

import math
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from data_pipeline.errors import BadSampleError
from data_pipeline.resize import resize_bicubic

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "gif", "bmp")
PIL_VIDEO_EXTENSIONS = ("webp", "gif")
VIDEO_EXTENSIONS = ("mp4", "webm", "mkv", "mov", "avi", *PIL_VIDEO_EXTENSIONS)
FEATURE_EXTENSION = "npy"
_MAX_VIDEO_FRAMES = 200_000
# Only formats that corpora hold. Pillow would open any of forty, among them EPS, which starts a program; and to
# load them all, as `Image.init` does, takes a reader half a second of its start.
_IMAGE_PLUGINS = ("Png", "Jpeg", "WebP", "Gif", "Bmp", "Tiff", "Ppm", "Avif")
for _plugin in _IMAGE_PLUGINS:
    with suppress(ImportError):  # a Pillow that was built without it
        import_module(f"PIL.{_plugin}ImagePlugin")
_IMAGE_FORMATS = tuple(name for name in map(str.upper, _IMAGE_PLUGINS) if name in Image.OPEN)
_ANIMATED_FORMATS = ("WEBP", "GIF")
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")


@dataclass(frozen=True, kw_only=True)
class MediaConfig:
    """How media are decoded."""

    image_size: int = 320
    """Height and width of the result in pixels (paper: 320)."""
    pad_colour: tuple[int, int, int] = (124, 116, 104)
    """RGB that fills the border beside images that are not square (paper: the mean; here ImageNet's). A run compares it
    with its encoder's mean."""
    max_pixels: int = 89_000_000
    """Largest width x height of an image or frame; beyond it the sample is skipped as "too large"."""
    max_bytes: int = 256 << 20
    """Largest encoded medium in bytes; beyond it the sample is skipped unread."""
    max_seconds: float = 60.0
    """Longest time to decode one medium; beyond it the sample is skipped as "too slow". Far above what decoding
    takes: a machine that is merely busy must not change the data."""
    jpeg_margin: float = 2.0
    """A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where its shorter side is then still this many times
    `image_size`. 1 is fastest, a larger margin nearer to decoding it whole, which 0 does; how near, says
    `docs/benchmarks-data.md`."""
    video_fps: float | None = 1.0
    """Frames a second taken from a clip (paper: 1 in training); None spreads them over the whole video."""
    hflip_p: float = 0.5
    """Probability of a left-right flip in training (paper: flips, p not given). No effect on features."""
    colour_jitter: float = 0.0
    """Brightness, contrast and saturation are scaled by factors from [1 - j, 1 + j] in training; 0 is off."""

    def __post_init__(self) -> None:
        if self.image_size < 1 or self.max_pixels < 1 or self.max_bytes < 1:
            raise ValueError(
                f"image_size {self.image_size}, max_pixels {self.max_pixels}, max_bytes {self.max_bytes}: "
                "all must be at least 1"
            )
        if len(self.pad_colour) != 3 or not all(0 <= c <= 255 for c in self.pad_colour):
            raise ValueError(f"pad_colour {self.pad_colour}: give three numbers in 0..255 (R, G, B)")
        if not self.max_seconds > 0:
            raise ValueError(f"max_seconds {self.max_seconds}: must be above 0")
        if self.jpeg_margin != 0 and not self.jpeg_margin >= 1:
            raise ValueError(f"jpeg_margin {self.jpeg_margin}: give 1 or more, or 0 to decode JPEGs whole")
        if self.video_fps is not None and not self.video_fps > 0:
            raise ValueError(
                f"video_fps {self.video_fps}: give frames a second above 0, or None for the whole"
            )
        if not 0 <= self.hflip_p <= 1 or not 0 <= self.colour_jitter < 1:
            raise ValueError(
                f"hflip_p {self.hflip_p}, colour_jitter {self.colour_jitter}: "
                "the first lies in [0, 1], the second in [0, 1)"
            )


@dataclass(frozen=True, slots=True)
class Augmentation:
    """Draws for one medium; all its frames are treated alike."""

    flip: bool = False
    factors: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Brightness, contrast, saturation."""
    clip_start: float = 0.5
    """Where a clip lies in a longer video: 0 at its beginning, 1 at its end."""


def draw_augmentation(config: MediaConfig, rng: np.random.Generator) -> Augmentation:
    """Draw the augmentation of one medium."""
    flip, clip_start = bool(rng.random() < config.hflip_p), float(rng.random())
    if not config.colour_jitter:
        return Augmentation(flip, clip_start=clip_start)
    factors = 1.0 + config.colour_jitter * rng.uniform(-1, 1, 3)
    return Augmentation(flip, tuple(float(f) for f in factors), clip_start)  # type: ignore[arg-type]


def decode_image(
    blob: bytes,
    config: MediaConfig,
    augmentation: Augmentation | None = None,
    out_3HW: np.ndarray | None = None,
) -> np.ndarray:
    """Decode one image.

    Args:
        blob: encoded image in any format that Pillow reads.
        config: size, padding and limits.
        augmentation: None leaves the image as it is.
        out_3HW: uint8 [3, H, W] to write into, as a slot of a batch; None makes an array.

    Returns:
        uint8 [3, H, W] with H = W = image_size; the aspect ratio is kept and the border padded.

    Raises:
        BadSampleError: "corrupt image", "too large" or "too slow".
    """
    deadline = _Deadline(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata; faults that matter raise
        try:
            image: Image.Image = Image.open(_TimedBytes(blob, deadline), formats=_IMAGE_FORMATS)
            _check_pixels(image.width, image.height, config)
            if image.format == "JPEG" and image.mode == "RGB" and config.jpeg_margin:
                # Lets the decoder shrink by 2, 4 or 8 as it decodes.
                least = math.ceil(config.jpeg_margin * config.image_size)
                image.draft("RGB", (least, least))
            ImageOps.exif_transpose(image, in_place=True)
            if out_3HW is None:
                out_3HW = _empty(config)
            _fit(image, config, augmentation, out_3HW)
            return out_3HW
        except BadSampleError:
            raise
        except Image.DecompressionBombError as error:
            raise BadSampleError("too large", f"{error}"[:300]) from error
        except Exception as error:  # Pillow's plugins raise anything from OSError to struct.error
            raise BadSampleError("corrupt image", f"{type(error).__name__}: {error}"[:300]) from error


def decode_video(
    blob: bytes,
    extension: str,
    frames: int,
    config: MediaConfig,
    augmentation: Augmentation | None = None,
    out_F3HW: np.ndarray | None = None,
) -> np.ndarray:
    """Decode `frames` frames of a video, evenly spaced.

    A clip covers frames / video_fps seconds; a shorter video is covered whole, with frames repeated if it has
    fewer than are wanted. Without augmentation the clip lies in the middle.

    Args:
        blob: encoded video.
        extension: its extension; the content decides: WebP and GIF are read by Pillow, all else by PyAV.
        frames: F.
        config: size, padding, frame rate and limits.
        augmentation: None takes the middle clip and flips nothing.
        out_F3HW: uint8 [F, 3, H, W] to write into; None makes an array.

    Returns:
        uint8 [F, 3, H, W].

    Raises:
        BadSampleError: "corrupt video", "too large" or "too slow".
    """
    deadline = _Deadline(config)
    start = 0.5 if augmentation is None else augmentation.clip_start
    try:
        if _is_animation(blob, extension):
            images = _pil_frames(blob, frames, start, config, deadline)
        else:
            images = _av_frames(blob, frames, start, config, deadline)
        if out_F3HW is None:
            out_F3HW = _empty(config, frames)
        for f, image in enumerate(images):
            if f and image is images[f - 1]:  # a repeated frame is resized once
                out_F3HW[f] = out_F3HW[f - 1]
            else:
                _fit(image, config, augmentation, out_F3HW[f])
        return out_F3HW
    except BadSampleError:
        raise
    except Image.DecompressionBombError as error:
        raise BadSampleError("too large", f"{error}"[:300]) from error
    except Exception as error:  # FFmpeg and Pillow raise many kinds
        raise BadSampleError("corrupt video", f"{type(error).__name__}: {error}"[:300]) from error


def pick_frames(
    times_N: np.ndarray, duration: float, frames: int, fps: float | None, start: float
) -> np.ndarray:
    """Choose frames by time.

    Args:
        times_N: seconds at which each frame begins, ascending from 0, float64 [N].
        duration: seconds of the whole video.
        frames: F.
        fps: frames a second of the clip; None covers the whole video.
        start: where the clip lies in a longer video, 0 at its beginning, 1 at its end.

    Returns:
        int64 [F], numbers of frames; those shown in the middles of F equal parts of the clip.
    """
    span = duration if fps is None else min(duration, frames / fps)
    middles_F = (duration - span) * start + (np.arange(frames) + 0.5) * span / frames
    # A microsecond of slack: a middle that falls on a frame's first instant means that frame.
    return np.clip(np.searchsorted(times_N, middles_F + 1e-6, side="right") - 1, 0, len(times_N) - 1)


def decode_features(blob: bytes, frames: int | None, num_features: int, width: int) -> np.ndarray:
    """Read the features of a frozen encoder.

    The array is read by its header and size alone: no pickle, and no allocation that the bytes do not cover.

    Args:
        blob: an `.npy` file, float16 or float32 [f, S, C].
        frames: F; more stored frames are thinned evenly, fewer repeated. None takes those that are stored.
        num_features: S.
        width: C.

    Returns:
        float16 [F, S, C].

    Raises:
        BadSampleError: "bad features" for anything else, or for values that are not finite.
    """
    stream = BytesIO(blob)
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[
            version
        ]
        shape, fortran, dtype = read(stream)
    except Exception as error:  # a broken header raises ValueError, KeyError, SyntaxError or TokenError
        raise BadSampleError("bad features", f"no .npy header: {error}"[:300]) from error
    offset = stream.tell()
    if dtype not in (np.float16, np.float32) or fortran or len(shape) != 3 or 0 in shape:
        raise BadSampleError("bad features", f"{dtype} {shape}; float16 [F, S, C] in C order is needed")
    if shape[1:] != (num_features, width):
        raise BadSampleError(
            "bad features", f"shape {shape}; the data set wants [F, {num_features}, {width}]"
        )
    if len(blob) - offset != math.prod(shape) * dtype.itemsize:
        raise BadSampleError("bad features", f"{len(blob) - offset} bytes of data for shape {shape}, {dtype}")
    features_FSC = np.frombuffer(blob, dtype, offset=offset).reshape(shape)
    if frames is not None and shape[0] != frames:
        times = np.arange(shape[0], dtype=np.float64)
        features_FSC = features_FSC[pick_frames(times, float(shape[0]), frames, None, 0.5)]
    with np.errstate(over="ignore"):
        features_FSC = features_FSC.astype(np.float16)
    if not np.isfinite(features_FSC).all():
        raise BadSampleError("bad features", "values that are not finite in float16")
    return features_FSC


def _check_pixels(width: int, height: int, config: MediaConfig) -> None:
    """Refuse media whose decoding would take too much memory."""
    if width * height > config.max_pixels or width < 1 or height < 1:
        raise BadSampleError(
            "too large", f"{width} x {height} pixels, at most {config.max_pixels} are allowed"
        )


def _empty(config: MediaConfig, *shape: int) -> np.ndarray:
    """Make room for decoded frames: uint8 [*shape, 3, H, W]."""
    return np.empty((*shape, 3, config.image_size, config.image_size), np.uint8)


def _fit(
    image: Image.Image, config: MediaConfig, augmentation: Augmentation | None, out_3HW: np.ndarray
) -> None:
    """Scale to the square, augment, pad, and write into uint8 [3, H, W]."""
    size = config.image_size
    if image.mode in _SIXTEEN_BITS:
        # Pillow's own conversion clips at 255, which makes almost every picture white.
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.new("RGB", layer.size, (255, 255, 255))
        image.paste(layer, mask=layer.getchannel("A"))
    elif image.mode != "RGB":
        image = image.convert("RGB")
    scale = size / max(image.size)
    fitted = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    pixels_HW3 = resize_bicubic(np.asarray(image), fitted[1], fitted[0])
    if augmentation is not None:
        if any(factor != 1.0 for factor in augmentation.factors):
            pixels_HW3 = _jittered(pixels_HW3, augmentation.factors)
        if augmentation.flip:
            pixels_HW3 = pixels_HW3[:, ::-1]
    left, top = (size - fitted[0]) // 2, (size - fitted[1]) // 2
    right, bottom = left + fitted[0], top + fitted[1]
    colour_3 = np.array(config.pad_colour, np.uint8)[:, None, None]
    for border_3HW in (out_3HW[:, :top], out_3HW[:, bottom:], out_3HW[:, :, :left], out_3HW[:, :, right:]):
        if border_3HW.size:
            border_3HW[:] = colour_3
    out_3HW[:, top:bottom, left:right] = pixels_HW3.transpose(2, 0, 1)


def _jittered(pixels_HW3: np.ndarray, factors: tuple[float, float, float]) -> np.ndarray:
    """Scale brightness, contrast and saturation of uint8 [H, W, 3]."""
    image = Image.fromarray(pixels_HW3)
    enhancers: tuple[Any, ...] = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for enhancer, factor in zip(enhancers, factors, strict=True):
        if factor != 1.0:
            image = enhancer(image).enhance(factor)
    return np.asarray(image)


class _Deadline:
    """The time that one medium may take. Libraries cannot be stopped in a call, so it is looked at between calls."""

    def __init__(self, config: MediaConfig) -> None:
        self._seconds = config.max_seconds
        self._end = time.monotonic() + config.max_seconds

    def check(self) -> None:
        """Raise when the time is up."""
        if time.monotonic() > self._end:
            raise BadSampleError("too slow", f"not decoded within {self._seconds} s")


class _TimedBytes(BytesIO):
    """Bytes that stop being read when the time is up: Pillow decodes as it reads."""

    def __init__(self, blob: bytes, deadline: _Deadline) -> None:
        super().__init__(blob)
        self._deadline = deadline

    def read(self, size: int | None = -1, /) -> bytes:
        self._deadline.check()
        return super().read(size)


def _is_animation(blob: bytes, extension: str) -> bool:
    """Whether Pillow has to read it, by its first bytes; an empty one goes by its name."""
    if not blob:
        return extension in PIL_VIDEO_EXTENSIONS
    return blob[:4] == b"GIF8" or (blob[:4] == b"RIFF" and blob[8:12] == b"WEBP")


def _pil_frames(
    blob: bytes, frames: int, start: float, config: MediaConfig, deadline: _Deadline
) -> list[Image.Image]:
    """Take frames of an animated WebP or GIF; all frames are taken to last as long as the first."""
    with Image.open(_TimedBytes(blob, deadline), formats=_ANIMATED_FORMATS) as image:
        _check_pixels(image.width, image.height, config)
        count = getattr(image, "n_frames", 1)
        image.load()  # WebP knows a frame's duration only once it is decoded
        seconds = (image.info.get("duration") or 100) / 1000
        times = np.arange(count) * seconds
        chosen: dict[int, Image.Image] = {}
        numbers = pick_frames(times, count * seconds, frames, config.video_fps, start)
        for number in sorted({int(n) for n in numbers}):
            deadline.check()
            image.seek(number)
            chosen[number] = image.copy()
        return [chosen[int(n)] for n in numbers]


def _av_frames(
    blob: bytes, frames: int, start: float, config: MediaConfig, deadline: _Deadline
) -> list[Image.Image]:
    """Take frames of a video through FFmpeg: times come from the packets, only the clip is decoded."""
    import av  # takes a second to load, which readers of images do without

    with av.open(BytesIO(blob)) as container:
        stream = container.streams.video[0]
        _check_pixels(stream.width, stream.height, config)
        tick = float(stream.time_base)
        packets: list[tuple[int, int]] = []
        for packet in container.demux(stream):
            deadline.check()
            if packet.pts is not None:
                packets.append((packet.pts, packet.duration or 0))
            if len(packets) > _MAX_VIDEO_FRAMES:
                raise BadSampleError("too large", f"more than {_MAX_VIDEO_FRAMES} frames")
    if not packets:
        raise BadSampleError("corrupt video", "no frames")
    packets.sort()
    stamps = np.array([pts for pts, _ in packets])
    step = packets[-1][1] or (int(stamps[-1] - stamps[0]) // max(1, len(stamps) - 1)) or 1
    duration = float(stamps[-1] - stamps[0] + step) * tick
    numbers = pick_frames((stamps - stamps[0]) * tick, duration, frames, config.video_fps, start)
    wanted = [int(stamps[n]) for n in numbers]
    found = _decode_stamps(blob, set(wanted), config, deadline, seek=True)
    if len(found) < len(set(wanted)):
        found = _decode_stamps(
            blob, set(wanted), config, deadline, seek=False
        )  # some containers seek past the mark
    if not found:
        raise BadSampleError("corrupt video", "no frame could be decoded")
    known = np.array(sorted(found))
    nearest = known[np.clip(np.searchsorted(known, wanted, side="right") - 1, 0, len(known) - 1)]
    return [found[int(stamp)] for stamp in nearest]


def _decode_stamps(
    blob: bytes, wanted: set[int], config: MediaConfig, deadline: _Deadline, *, seek: bool
) -> dict[int, Image.Image]:
    """Decode the frames with given time stamps, from the key frame before the first when `seek` is set."""
    import av

    found: dict[int, Image.Image] = {}
    with av.open(BytesIO(blob)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # readers are the unit of parallelism
        if seek and min(wanted) > 0:
            container.seek(min(wanted), stream=stream, backward=True)
        for frame in container.decode(stream):
            deadline.check()
            _check_pixels(
                frame.width, frame.height, config
            )  # a header may name another size than the frames have
            if frame.pts in wanted:
                found[frame.pts] = frame.to_image()
            if len(found) == len(wanted) or (frame.pts is not None and frame.pts > max(wanted)):
                break
    return found
