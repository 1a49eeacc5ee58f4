"""Resizing gives Pillow's pictures, to two levels, in every size and form."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.resize import resize_bicubic

SIDES = st.integers(1, 90)


def picture(height: int, width: int, seed: int, *, harsh: bool) -> np.ndarray:
    """Noise in uint8 [H, W, 3], of black and white alone if harsh: there bicubic overshoots the most."""
    rng = np.random.default_rng(seed)
    levels = np.array([0, 255], np.uint8) if harsh else np.arange(256, dtype=np.uint8)
    return rng.choice(levels, (height, width, 3))


def by_pillow(image_HW3: np.ndarray, height: int, width: int) -> np.ndarray:
    """Across, then down. Pillow 13 goes down first where a picture is over twice as tall as wide."""
    image = Image.fromarray(image_HW3)
    across = image.resize((width, image.height), Image.Resampling.BICUBIC)
    return np.asarray(across.resize((width, height), Image.Resampling.BICUBIC))


@settings(deadline=None, max_examples=60)
@given(SIDES, SIDES, SIDES, SIDES, st.integers(0, 9), st.booleans())
def test_pillow_to_two_levels(h: int, w: int, height: int, width: int, seed: int, harsh: bool) -> None:
    image_HW3 = picture(h, w, seed, harsh=harsh)
    resized_HW3 = resize_bicubic(image_HW3, height, width)
    assert resized_HW3.shape == (height, width, 3)
    assert resized_HW3.dtype == np.uint8
    difference = np.abs(resized_HW3.astype(int) - by_pillow(image_HW3, height, width))
    assert difference.max() <= 2


@pytest.mark.parametrize(
    ("shape", "result"), [((480, 640), (168, 224)), ((3, 20_000), (1, 320)), ((2500, 3600), (222, 320))]
)
def test_large_pictures_differ_in_a_hundredth_of_their_values(
    shape: tuple[int, int], result: tuple[int, int]
) -> None:
    image_HW3 = picture(*shape, 0, harsh=False)
    difference = np.abs(resize_bicubic(image_HW3, *result).astype(int) - by_pillow(image_HW3, *result))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


def test_pictures_of_pillow_and_slices_are_left_as_they_are(recwarn: pytest.WarningsRecorder) -> None:
    """Their memory is read-only, or does not lie in order."""
    image_HW3 = np.asarray(Image.fromarray(picture(40, 60, 1, harsh=False)))
    assert not image_HW3.flags.writeable
    before = image_HW3.copy()
    resized_HW3 = resize_bicubic(image_HW3, 20, 30)
    np.testing.assert_array_equal(image_HW3, before)
    np.testing.assert_array_equal(
        resize_bicubic(image_HW3[:, ::-1], 20, 30),
        resize_bicubic(np.ascontiguousarray(image_HW3[:, ::-1]), 20, 30),
    )
    assert resized_HW3.flags.writeable
    assert not recwarn.list


def test_the_right_size_costs_nothing() -> None:
    image_HW3 = picture(8, 9, 0, harsh=False)
    assert resize_bicubic(image_HW3, 8, 9) is image_HW3


def test_every_processor_gives_the_same_bytes() -> None:
    """A run that goes on elsewhere sees the same pictures: torch's code with and without vector instructions."""
    code = (
        "import hashlib, numpy as np\n"
        "from data_pipeline.resize import resize_bicubic\n"
        "rng, found = np.random.default_rng(0), hashlib.sha256()\n"
        "for shape, to in (((480, 640), (168, 224)), ((77, 333), (74, 320)), ((20, 30), (213, 320))):\n"
        "    found.update(resize_bicubic(rng.integers(0, 256, (*shape, 3), np.uint8), *to).tobytes())\n"
        "print(found.hexdigest())\n"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for capability in ("default", "avx2")
    }
    assert len(hashes) == 1


def test_readers_of_features_do_without_torch() -> None:
    code = "import sys, data_pipeline.actors, data_pipeline.dataset; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
