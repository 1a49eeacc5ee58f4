"""The planner's figures of the vision encoders against the built modules: values, operations, live memory."""

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from flamingo_dist.models.vision import VisionConfig, VisionEncoder, build_vision
from flamingo_dist.planning.vision import vision_flops, vision_values, vision_working_bytes
from tests.flamingo_dist.models.vision import vit_folder
from tests.flamingo_dist.models.vision.test_vision import random_state

CONVOLUTIONAL = ["tiny", "efficientnet-lite0", "nfnet-tiny", "nfnet-f6"]
VITS = [
    ("clip", {}),
    ("clip", {"hidden_act": "gelu"}),
    ("siglip", {}),
    ("dinov2", {}),
    ("dinov2", {"use_swiglu_ffn": True}),
]
FRAMES = 2


def built(name: str, tmp_path: Path, **changes: Any) -> tuple[VisionConfig, VisionEncoder]:
    """An encoder without weights, on the meta device."""
    if name == "efficientnet-lite0":  # it reads its shapes off its weights, so it cannot be built empty
        torch.save(random_state(), tmp_path / "w.pth")
        config = VisionConfig(name=name, weights=str(tmp_path / "w.pth"), **changes)
        return config, build_vision(config).to("meta")
    config = VisionConfig(name=name, **changes)
    with torch.device("meta"):
        return config, build_vision(config)


def built_vit(name: str, tmp_path: Path, changes: dict[str, Any], **settings: Any) -> Any:
    vit_folder.save(name, tmp_path, **changes)
    config = VisionConfig(name=name, weights=str(tmp_path), **settings)
    return config, build_vision(config)


def frames(config: VisionConfig, device: str) -> torch.Tensor:
    return torch.zeros(FRAMES, 3, config.image_size, config.image_size, dtype=torch.uint8, device=device)


def assert_counts(config: VisionConfig, encoder: VisionEncoder, device: str) -> None:
    assert vision_values(config) == sum(b.numel() for b in encoder.buffers() if b.is_floating_point())
    with FlopCounterMode(display=False) as counter:
        encoder(frames(config, device))
    assert vision_flops(config) * FRAMES == counter.get_total_flops()


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_convolutional_encoders_count_as_built(name: str, tmp_path: Path) -> None:
    assert_counts(*built(name, tmp_path), "meta")


@pytest.mark.parametrize(("name", "changes"), VITS)
def test_vision_transformers_count_as_built(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    config, encoder = built_vit(name, tmp_path, changes, image_size=42)
    assert_counts(config, encoder.to("meta"), "meta")


def test_f6_costs_what_was_published() -> None:
    """deepmind-research: 377.28 billion products at 576 pixels, its 1000-way classifier's included."""
    assert vision_flops(VisionConfig(name="nfnet-f6")) == 2 * 116_549_206_016
    at_576 = vision_flops(VisionConfig(name="nfnet-f6", image_size=576)) / 2 + 3072 * 1000
    assert round(at_576 / 1e9, 2) == 377.28


class LiveBytes(TorchDispatchMode):
    """Keeps count of the bytes of all tensors that operations have made and that still live."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen = WeakIdKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self._seen:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._seen[storage] = True
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


def peak_of_a_frame(config: VisionConfig, encoder: VisionEncoder, device: str) -> float:
    pixels = frames(config, device)
    with LiveBytes([pixels, *encoder.buffers()]) as counted:
        encoder(pixels)
    return counted.peak / FRAMES


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["tiny", "efficientnet-lite0", "nfnet-tiny", "nfnet-f1"])
def test_live_memory_of_convolutional_encoders(name: str, dtype: str, tmp_path: Path) -> None:
    config, encoder = built(name, tmp_path, dtype=dtype, image_size=224)
    assert peak_of_a_frame(config, encoder, "meta") == pytest.approx(vision_working_bytes(config), rel=0.1)


@pytest.mark.parametrize(("name", "changes"), VITS)
def test_live_memory_of_vision_transformers(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    wide = changes | {"hidden_size": 96} | ({} if name == "dinov2" else {"intermediate_size": 384})
    config, encoder = built_vit(name, tmp_path, wide, image_size=126)
    # On the CPU, where attention is fused as on GPUs; on the meta device its scores would be counted.
    assert peak_of_a_frame(config, encoder, "cpu") == pytest.approx(vision_working_bytes(config), rel=0.1)


def test_features_of_another_dtype_weigh_half() -> None:
    wide = VisionConfig(name="nfnet-f6")
    assert vision_working_bytes(wide) == 2 * vision_working_bytes(replace(wide, dtype="bfloat16"))
