"""Decoding: shapes, colours, padding, limits, frame choice, features."""

import io

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import BadSampleError
from data_pipeline.media import (
    Augmentation,
    MediaConfig,
    decode_features,
    decode_image,
    decode_video,
    draw_augmentation,
    pick_frames,
)
from data_pipeline.shards import npy_bytes
from tests.data_pipeline.corpora import C, S, clip_mp4, clip_webp, picture

SMALL = MediaConfig(image_size=16)


def encode(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_aspect_is_kept_and_the_border_padded() -> None:
    pixels = decode_image(picture(200, (40, 20)), SMALL)
    assert pixels.shape == (3, 16, 16)
    assert pixels.dtype == np.uint8
    assert (pixels[:, 4:12] == np.array([200, 50, 200])[:, None, None]).all()
    for border in (pixels[:, :4], pixels[:, 12:]):
        assert (border == np.array([124, 116, 104])[:, None, None]).all()


def test_transparency_lies_on_white() -> None:
    for mode in ("RGBA", "LA"):
        assert (decode_image(encode(Image.new(mode, (8, 8))), SMALL) == 255).all()
    paletted = Image.new("P", (8, 8), 0)
    paletted.putpalette([9, 9, 9] * 256)
    assert (decode_image(encode(paletted, transparency=0), SMALL) == 255).all()


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "I;16"])
def test_other_modes(mode: str) -> None:
    form = "TIFF" if mode in ("CMYK", "I;16") else "PNG"
    assert decode_image(encode(Image.new(mode, (8, 4)), form), SMALL).shape == (3, 16, 16)


def test_flip_moves_left_to_right_and_rotation_of_cameras_is_undone() -> None:
    image = Image.new("RGB", (16, 16), (0, 0, 0))
    image.paste((255, 0, 0), (0, 0, 8, 16))
    plain = decode_image(encode(image), SMALL)
    flipped = decode_image(encode(image), SMALL, Augmentation(flip=True))
    assert plain[0, 0, 0] == 255
    assert (flipped == plain[:, :, ::-1]).all()
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned = decode_image(encode(image, "JPEG", exif=exif, quality=100), SMALL)
    assert turned[0, 8, 15] > 200 > turned[0, 8, 0]


def photo(width: int, height: int) -> bytes:
    """A JPEG with fine and coarse detail."""
    rng = np.random.default_rng(3)
    coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).resize((width, height))
    grain = rng.normal(0, 6, (height, width, 1))
    pixels = np.clip(np.asarray(coarse, np.float32) + grain, 0, 255).astype(np.uint8)
    return encode(Image.fromarray(pixels), "JPEG", quality=90)


def test_jpegs_are_shrunk_by_the_decoder_as_far_as_the_margin_allows() -> None:
    """Against whole decoding: nearer than another resampling filter is, and not at all without room for it."""
    blob = photo(320, 240)
    whole, scaled = (decode_image(blob, MediaConfig(image_size=112, jpeg_margin=m)) for m in (0, 1))
    assert not np.array_equal(whole, scaled)
    assert np.abs(whole.astype(int) - scaled).mean() < 1.5
    # 240 is less than twice 2 * 112: with the default margin the picture is decoded whole.
    assert np.array_equal(whole, decode_image(blob, MediaConfig(image_size=112)))
    assert np.array_equal(whole, decode_image(blob, MediaConfig(image_size=112, jpeg_margin=1.1)))
    large = photo(960, 720)
    modes = [decode_image(large, MediaConfig(image_size=112, jpeg_margin=m)) for m in (0, 2)]
    assert not np.array_equal(*modes)


def test_media_are_written_where_they_are_wanted() -> None:
    room_F3HW = np.full((3, 3, 16, 16), 7, np.uint8)
    blob, config = picture(200, (40, 20)), MediaConfig(image_size=16, video_fps=None)
    assert decode_image(blob, config, None, room_F3HW[1]) is not None
    assert np.array_equal(room_F3HW[1], decode_image(blob, config))
    assert (room_F3HW[[0, 2]] == 7).all()
    clip = clip_webp(2)
    decode_video(clip, "webp", 3, config, Augmentation(flip=True), room_F3HW)
    assert np.array_equal(room_F3HW, decode_video(clip, "webp", 3, config, Augmentation(flip=True)))


def test_augmentation_draws() -> None:
    rng = np.random.default_rng(0)
    draws = [draw_augmentation(MediaConfig(hflip_p=0.5, colour_jitter=0.2), rng) for _ in range(400)]
    assert 150 < sum(d.flip for d in draws) < 250
    assert all(0.8 <= f <= 1.2 for d in draws for f in d.factors)
    darker = decode_image(picture(200), SMALL, Augmentation(factors=(0.5, 1, 1)))
    assert darker[0, 8, 8] == 100


def test_limits_and_corruption() -> None:
    with pytest.raises(BadSampleError, match="too large"):
        decode_image(picture(0, (100, 100)), MediaConfig(image_size=16, max_pixels=9_999))
    jpeg = encode(Image.effect_noise((64, 64), 50), "JPEG")
    for blob in (b"", b"GIF89a", jpeg[: len(jpeg) // 2], picture(1)[:40], b"\0" * 100):
        with pytest.raises(BadSampleError, match="corrupt image"):
            decode_image(blob, SMALL)


def test_pick_frames() -> None:
    times = np.arange(100) / 10  # ten seconds at 10 fps
    assert pick_frames(times, 10, 4, None, 0.5).tolist() == [12, 37, 62, 87]
    assert pick_frames(times, 10, 4, 1.0, 0.0).tolist() == [5, 15, 25, 35]
    assert pick_frames(times, 10, 4, 1.0, 1.0).tolist() == [65, 75, 85, 95]
    assert pick_frames(times[:2], 0.2, 4, 1.0, 0.7).tolist() == [0, 0, 1, 1]
    assert pick_frames(times[:1], 0.1, 3, None, 0.5).tolist() == [0, 0, 0]


def test_webp_frames_in_order() -> None:
    whole = MediaConfig(image_size=16, video_fps=None)
    video = decode_video(clip_webp(12), "webp", 4, whole)
    assert video.shape == (4, 3, 16, 16)
    assert video[:, 0, 8, 8].tolist() == [10, 40, 70, 100]
    at_two = MediaConfig(image_size=16, video_fps=5.0)
    start = decode_video(clip_webp(12), "webp", 3, at_two, Augmentation(clip_start=0.0))
    assert start[:, 0, 8, 8].tolist() == [10, 30, 50]
    still = decode_video(picture(77, (16, 16), "WEBP"), "webp", 3, whole)
    assert len(still) == 3


@pytest.mark.parametrize(("codec", "form"), [("libx264", "mp4"), ("libvpx-vp9", "webm"), ("mpeg4", "avi")])
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_encoded_frames_in_order(codec: str, form: str, start: float) -> None:
    blob = clip_mp4(40, codec=codec, form=form)
    config = MediaConfig(image_size=32, video_fps=5.0)
    video = decode_video(blob, form, 4, config, Augmentation(clip_start=start))
    expected = np.array([1, 3, 5, 7]) + (32 if start else 0)
    np.testing.assert_allclose(video[:, 1, 16, 16], 4 * expected, atol=3)


def test_video_corruption_and_limits() -> None:
    blob = clip_mp4(10)
    for broken in (b"", b"x" * 500, blob[: len(blob) // 3]):
        with pytest.raises(BadSampleError, match="corrupt video"):
            decode_video(broken, "mp4", 2, SMALL)
    with pytest.raises(BadSampleError, match="corrupt video"):
        decode_video(b"RIFF1234WEBP", "webp", 2, SMALL)
    with pytest.raises(BadSampleError, match="too large"):
        decode_video(blob, "mp4", 2, MediaConfig(image_size=16, max_pixels=1000))


def test_features() -> None:
    stored = np.arange(3 * S * C, dtype=np.float32).reshape(3, S, C)
    blob = npy_bytes(stored)
    np.testing.assert_array_equal(decode_features(blob, 3, S, C), stored.astype(np.float16))
    np.testing.assert_array_equal(decode_features(blob, 1, S, C)[0], stored[1])
    assert decode_features(blob, 6, S, C)[:, 0, 0].tolist() == [0, 0, 24, 24, 48, 48]
    long_header = io.BytesIO()
    np.lib.format.write_array(long_header, stored, version=(2, 0))
    for whole in (blob, long_header.getvalue()):
        np.testing.assert_array_equal(decode_features(whole, None, S, C), stored.astype(np.float16))
    infinite = npy_bytes(np.full((1, S, C), np.inf))
    pickled = io.BytesIO()
    np.save(pickled, np.array([[[{}]]]), allow_pickle=True)
    lying = npy_bytes(np.zeros((1, S, C))).replace(b"(1, 4, 6)", b"(9, 4, 6)")
    for broken in (b"", b"x" * 80, blob[:-2], infinite, pickled.getvalue(), lying):
        with pytest.raises(BadSampleError, match="bad features"):
            decode_features(broken, 1, S, C)
    with pytest.raises(BadSampleError, match=r"wants \[F, 5, 6\]"):
        decode_features(blob, 1, 5, C)


@pytest.mark.parametrize(
    "changes",
    [
        *({"image_size": 0}, {"pad_colour": (1, 2)}, {"video_fps": 0.0}, {"hflip_p": 1.5}),
        *({"colour_jitter": 1.0}, {"jpeg_margin": 0.5}),
    ],
)
def test_bad_settings(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        MediaConfig(**changes)  # type: ignore[arg-type]
