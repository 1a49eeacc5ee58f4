"""Statistics of features: exact on what they were taken of, and what standardised features look like."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.shards import ShardWriter
from flamingo_dist.models.vision import VisionConfig, build_vision
from jobs.encode import media_config
from jobs.encode_shard import decoded_samples
from jobs.statistics import feature_statistics, write_statistics
from tests.flamingo_dist.models.vision import vit_folder

VISION = VisionConfig(name="tiny", image_size=16, tiny_width=16)


def write_corpus(folder: Path, images: int, *, bad: int | None = None) -> str:
    rng = np.random.default_rng(0)
    with ShardWriter(str(folder), max_samples=5) as writer:
        for i in range(images):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(file, "png")
            blob = b"damaged" if i == bad else file.getvalue()
            writer.write(f"{i:03d}", {"png": blob, "txt": b"noise"})
    return str(folder)


def features_of(url: str, vision: VisionConfig) -> torch.Tensor:
    samples = [s for shard in range(3) for s in decoded_samples(url, shard, media_config(vision), 1, [])]
    return build_vision(vision)(torch.from_numpy(np.concatenate([s.media[0] for s in samples])))


def test_equal_what_torch_measures(tmp_path: Path) -> None:
    url = write_corpus(tmp_path / "corpus", 13)
    held = feature_statistics(url, VISION, images=100)
    features_NC = features_of(url, VISION).double().flatten(0, 1)
    torch.testing.assert_close(held["mean"].double(), features_NC.mean(0), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(held["std"].double(), features_NC.std(0, unbiased=False), atol=1e-6, rtol=1e-5)


def test_take_evenly_from_shards_and_pass_bad_images(tmp_path: Path) -> None:
    url = write_corpus(tmp_path / "corpus", 13, bad=0)
    few, all_of_them = (feature_statistics(url, VISION, images=n)["mean"] for n in (3, 100))
    assert not torch.equal(few, all_of_them)
    firsts = [
        next(iter(decoded_samples(url, shard, media_config(VISION), 1, []))).media[0] for shard in range(3)
    ]
    expected = build_vision(VISION)(torch.from_numpy(np.concatenate(firsts))).mean((0, 1))
    torch.testing.assert_close(few, expected)


@pytest.mark.parametrize("name", ["tiny", "nfnet-tiny", "clip"])
def test_standardised_features_have_mean_zero_and_about_unit_scale(tmp_path: Path, name: str) -> None:
    url = write_corpus(tmp_path / "corpus", 13)
    path = tmp_path / "cache" / "statistics.safetensors"
    bare = VISION if name == "tiny" else VisionConfig(name="nfnet-tiny", image_size=32)
    if name == "clip":
        vit_folder.save(name, tmp_path / "vit")
        bare = VisionConfig(name="clip", weights=str(tmp_path / "vit"))
    write_statistics(path, url, bare)
    vision = replace(bare, statistics=str(path))
    plain_NC, features_NC = (features_of(url, v).flatten(0, 1) for v in (bare, vision))
    std_C = plain_NC.std(0, unbiased=False)
    expected_NC = (plain_NC - plain_NC.mean(0)) / (std_C + 0.1 * std_C.mean())
    torch.testing.assert_close(features_NC, expected_NC, atol=1e-4, rtol=1e-4)
    # Half precision elsewhere in the network touches neither the statistics nor the encoder.
    pixels = torch.randint(0, 255, (2, 3, vision.image_size, vision.image_size), dtype=torch.uint8)
    before = build_vision(vision)(pixels)
    torch.testing.assert_close(build_vision(vision).bfloat16()(pixels), before)
    assert vision.fingerprint() != bare.fingerprint()


def test_errors_say_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"jobs\.statistics"):
        build_vision(VisionConfig(statistics=str(tmp_path / "none.safetensors")))
    url = write_corpus(tmp_path / "corpus", 6)
    write_statistics(tmp_path / "s.safetensors", url, VISION)
    with pytest.raises(ValueError, match=r"\[32\] each"):
        build_vision(VisionConfig(name="tiny", tiny_width=32, statistics=str(tmp_path / "s.safetensors")))
    empty = write_corpus(tmp_path / "bad", 1, bad=0)
    with pytest.raises(ValueError, match="no readable image"):
        feature_statistics(empty, VISION)
