"""CLIP, SigLIP and DINOv2 against transformers' own outputs, and folders that are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from flamingo_dist.models.vision import VisionConfig, build_vision
from tests.flamingo_dist.models.vision import vit_folder
from tests.flamingo_dist.models.vision.vit_folder import MEAN, SIZE, STD, make, save

NAMES = ["clip", "siglip", "dinov2"]
Tensors = dict[str, Tensor]


def pixels(size: int = SIZE) -> Tensor:
    return torch.randint(0, 256, (2, 3, size, size), generator=torch.Generator().manual_seed(3)).to(
        torch.uint8
    )


def normalised(pixels_N3HW: Tensor) -> Tensor:
    mean, std = (255 * torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    return (pixels_N3HW.float() - mean) / std


def config(name: str, folder: Path, **changes: Any) -> VisionConfig:
    return VisionConfig(name=name, weights=str(folder), **changes)


@torch.no_grad()
def hidden(vision: Any, size: int = SIZE, dtype: torch.dtype = torch.float32) -> Tensor:
    options = (
        {} if isinstance(vision, transformers.Dinov2Model) else {"interpolate_pos_encoding": size != SIZE}
    )
    states: Tensor = vision.to(dtype)(
        pixel_values=normalised(pixels(size)).to(dtype), **options
    ).last_hidden_state
    return states


@pytest.mark.parametrize("part", [False, True], ids=["whole model", "vision part"])
@pytest.mark.parametrize("name", NAMES)
def test_features_are_transformers_patch_tokens(tmp_path: Path, name: str, part: bool) -> None:
    vision = save(name, tmp_path, part=part)
    vision_config = config(name, tmp_path)
    encoder = build_vision(vision_config)
    assert (vision_config.num_features, vision_config.width, vision_config.image_size) == (16, 24, SIZE)
    expected = hidden(vision)[:, 0 if name == "siglip" else 1 :]
    torch.testing.assert_close(encoder(pixels()), expected, atol=0, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_transformers_in_bfloat16(tmp_path: Path, name: str) -> None:
    vision = save(name, tmp_path)
    found = build_vision(config(name, tmp_path, dtype="bfloat16"))(pixels())
    assert found.dtype == torch.bfloat16
    expected = hidden(vision, dtype=torch.bfloat16)[:, 0 if name == "siglip" else 1 :]
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_another_size_interpolates_the_positions(tmp_path: Path, name: str) -> None:
    vision = save(name, tmp_path)
    found = build_vision(config(name, tmp_path, image_size=42))(pixels(42))
    assert found.shape == (2, 36, 24)
    expected = hidden(vision, 42)[:, 0 if name == "siglip" else 1 :]
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["clip", "dinov2"])
def test_the_class_token_comes_first(tmp_path: Path, name: str) -> None:
    """IDEFICS: `CLIPVisionModel`'s whole last hidden state, without the final norm."""
    vision = save(name, tmp_path)
    vision_config = config(name, tmp_path, class_token=True)
    assert vision_config.num_features == 17
    torch.testing.assert_close(build_vision(vision_config)(pixels()), hidden(vision), atol=0, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_final_norm_is_a_setting(tmp_path: Path, name: str) -> None:
    vision = save(name, tmp_path)
    norm = vision.layernorm if name == "dinov2" else vision.post_layernorm
    on, off, default = (config(name, tmp_path, final_norm=x) for x in (True, False, None))
    bare = build_vision(off)(pixels())
    with torch.no_grad():
        torch.testing.assert_close(build_vision(on)(pixels()), norm(bare), atol=0, rtol=0)
    assert (
        default.fingerprint() == (off if name == "clip" else on).fingerprint() != on.fingerprint()
        or name != "clip"
    )
    assert on.fingerprint() != off.fingerprint()


def test_swiglu_and_one_file_processors_are_read(tmp_path: Path) -> None:
    """DINOv2's giant has gated feed-forward layers; transformers 5 may save the processor in one file."""
    vision = save("dinov2", tmp_path, use_swiglu_ffn=True)
    said = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": said}))
    torch.testing.assert_close(
        build_vision(config("dinov2", tmp_path))(pixels()), hidden(vision)[:, 1:], atol=0, rtol=0
    )


def test_pixels_are_normalised_as_the_image_processor_does(tmp_path: Path) -> None:
    save("clip", tmp_path)
    processor_class = getattr(transformers, "CLIPImageProcessorPil", None)
    if processor_class is None:
        pytest.skip("this transformers has no image processor that works without torchvision")
    processor = processor_class.from_pretrained(tmp_path, do_resize=False, do_center_crop=False)
    expected = processor(list(pixels()), return_tensors="pt")["pixel_values"]
    encoder = build_vision(config("clip", tmp_path))
    torch.testing.assert_close(encoder.normalise(pixels()), expected, atol=2e-6, rtol=2e-6)


def first(tensors: Tensors, part: str) -> str:
    return next(name for name in tensors if part in name and "text_model" not in name)


def lacking(tensors: Tensors) -> None:
    del tensors[first(tensors, "fc1.weight")]


def superfluous(tensors: Tensors) -> None:
    tensors[first(tensors, "fc1.weight").replace("fc1", "fc9")] = torch.zeros(2)


def misshapen(tensors: Tensors) -> None:
    tensors[first(tensors, "fc1.weight")] = torch.zeros(3, 3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lacking, r"lacks .*0\.mlp\.fc1\.weight"),
        (superfluous, r"holds the unknown .*0\.mlp\.fc9\.weight"),
        (misshapen, r"holds .*0\.mlp\.fc1\.weight of shape \[3, 3\] instead of \[\d+, 24\]"),
    ],
)
def test_other_weights_are_refused_by_name(
    tmp_path: Path, name: str, change: Callable[[Tensors], None], message: str
) -> None:
    save(name, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        build_vision(config(name, tmp_path))


def test_folders_that_do_not_fit_are_explained(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no config.json in .*a Hugging Face folder, local or at any"
    ):
        config("clip", tmp_path)
    save("clip", tmp_path)
    with pytest.raises(ValueError, match=r"a model of type 'clip'.*'dinov2' takes dinov2"):
        config("dinov2", tmp_path)
    with pytest.raises(ValueError, match="positive multiple of 7"):
        config("clip", tmp_path, image_size=30)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no safetensors in"):
        build_vision(config("clip", tmp_path))
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    with pytest.raises(ValueError, match="must say image_mean and image_std"):
        config("clip", tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no preprocessor_config.json"):
        config("clip", tmp_path)


def test_fingerprint_follows_weights_and_processor(tmp_path: Path) -> None:
    save("clip", tmp_path / "a")
    save("clip", tmp_path / "b")
    before = config("clip", tmp_path / "a").fingerprint()
    assert config("clip", tmp_path / "b").fingerprint() == before, "the path says nothing about the weights"
    assert config("clip", tmp_path / "a", class_token=True).fingerprint() != before
    said = json.loads((tmp_path / "b" / "preprocessor_config.json").read_text())
    (tmp_path / "b" / "preprocessor_config.json").write_text(
        json.dumps(said | {"image_mean": [0.1, 0.2, 0.3]})
    )
    assert config("clip", tmp_path / "b").fingerprint() != before
    vision, whole = make("clip")
    with torch.no_grad():
        vision.post_layernorm.bias.add_(1.0)
    whole.save_pretrained(tmp_path / "a")
    assert config("clip", tmp_path / "a").fingerprint() != before


@pytest.mark.parametrize("name", NAMES)
def test_the_meta_device_needs_no_weights(tmp_path: Path, name: str) -> None:
    vit_folder.save(name, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with torch.device("meta"):
        encoder = build_vision(config(name, tmp_path))
    assert {b.device.type for b in encoder.buffers()} == {"meta"}
    found = encoder(torch.empty(3, 3, SIZE, SIZE, dtype=torch.uint8, device="meta"))
    assert found.shape == (3, 16, 24)
