"""EfficientNet-Lite0 against the published layers written out one by one, and what all encoders promise."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flamingo_dist.models.flamingo import Flamingo
from flamingo_dist.models.init import initialize_
from flamingo_dist.models.vision import VisionConfig, VisionEncoder, build_vision
from flamingo_dist.parallel.topology import single_process
from tests.flamingo_dist.models.vision import vit_folder
from tests.ranks import RankPool
from tests.tiny import IMAGE, network

# Repeats, kernel, stride, expansion, width of each stage: from the network's own description.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def random_state(seed: int = 0) -> dict[str, Tensor]:
    """A state dict of the published layout whose activations neither die nor explode."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def conv(name: str, *shape: int) -> None:
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))

    def norm(name: str, width: int) -> None:
        for part, low, high in (("weight", 0.5, 1.5), ("bias", 0.0, 1.0), ("running_mean", -0.3, 0.3)):
            state[f"{name}.{part}"] = torch.rand(width, generator=generator) * (high - low) + low
        state[f"{name}.running_var"] = torch.rand(width, generator=generator) + 0.5
        state[f"{name}.num_batches_tracked"] = torch.tensor(1)

    conv("_conv_stem", 32, 3, 3, 3)
    norm("_bn0", 32)
    width, number = 32, 0
    for repeats, kernel, _, expansion, out in STAGES:
        for _ in range(repeats):
            prefix, inner = f"_blocks.{number}", width * expansion
            if expansion > 1:
                conv(f"{prefix}._expand_conv", inner, width, 1, 1)
                norm(f"{prefix}._bn0", inner)
            conv(f"{prefix}._depthwise_conv", inner, 1, kernel, kernel)
            norm(f"{prefix}._bn1", inner)
            conv(f"{prefix}._project_conv", out, inner, 1, 1)
            norm(f"{prefix}._bn2", out)
            width, number = out, number + 1
    conv("_conv_head", 1280, 320, 1, 1)
    norm("_bn1", 1280)
    conv("_fc", 1000, 1280)
    state["_fc.bias"] = torch.zeros(1000)
    return state


def published_features(state: Mapping[str, Tensor], pixels_N3HW: Tensor) -> Tensor:
    """The unfolded forward pass in fp64, [N, 1280, h, w]."""

    def same_conv(x: Tensor, name: str, stride: int, groups: int) -> Tensor:
        weight = state[f"{name}.weight"].double()
        out = math.ceil(x.shape[-1] / stride)
        pad = max((out - 1) * stride + weight.shape[-1] - x.shape[-1], 0)
        before, after = pad // 2, pad - pad // 2
        return F.conv2d(F.pad(x, (before, after, before, after)), weight, stride=stride, groups=groups)

    def layer(x: Tensor, conv: str, norm: str, stride: int = 1, *, each: bool = False) -> Tensor:
        x = same_conv(x, conv, stride, x.shape[1] if each else 1)
        names = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(state[f"{norm}.{name}"].double() for name in names), eps=1e-3)

    def relu6(x: Tensor) -> Tensor:
        return x.clamp(0, 6)

    x = relu6(layer((pixels_N3HW.double() - 127) / 128, "_conv_stem", "_bn0", 2))
    number = 0
    for repeats, _, stride, expansion, _ in STAGES:
        for repeat in range(repeats):
            prefix, skip = f"_blocks.{number}.", x
            if expansion > 1:
                x = relu6(layer(x, f"{prefix}_expand_conv", f"{prefix}_bn0"))
            first = stride if repeat == 0 else 1
            x = relu6(layer(x, f"{prefix}_depthwise_conv", f"{prefix}_bn1", first, each=True))
            x = layer(x, f"{prefix}_project_conv", f"{prefix}_bn2")
            x = x + skip if repeat else x
            number += 1
    return relu6(layer(x, "_conv_head", "_bn1"))


def random_pixels(count: int, size: int, seed: int = 1) -> Tensor:
    """Smooth pictures: noise of low resolution, enlarged."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 255
    return F.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "lite0.pth"
    torch.save(random_state(), path)
    return path


def lite0(weights: Path | str, size: int = 64, **changes: Any) -> VisionConfig:
    return VisionConfig(name="efficientnet-lite0", weights=str(weights), image_size=size, **changes)


@pytest.mark.parametrize("size", [32, 64, 96])
def test_folded_network_equals_the_published_layers(weights: Path, size: int) -> None:
    pixels = random_pixels(2, size)
    features_NSC = build_vision(lite0(weights, size))(pixels)
    expected = published_features(random_state(), pixels)
    assert features_NSC.shape == (2, (size // 32) ** 2, 1280)
    assert expected.std() > 0.1, "dead activations would prove nothing"
    torch.testing.assert_close(
        features_NSC.double(), expected.flatten(2).transpose(1, 2), atol=2e-4, rtol=2e-4
    )


def test_bfloat16_features_stay_close(weights: Path) -> None:
    pixels = random_pixels(2, 64)
    exact = build_vision(lite0(weights))(pixels)
    rough = build_vision(lite0(weights, dtype="bfloat16"))(pixels)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).norm() < 0.1 * exact.norm()


def test_features_do_not_depend_on_the_batch(weights: Path) -> None:
    encoder = build_vision(lite0(weights))
    pixels = random_pixels(9, 64)
    together = encoder(pixels)
    alone = torch.cat([encoder(pixels[i : i + 1]) for i in range(9)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def any_config(name: str, weights: Path, folder: Path) -> VisionConfig:
    """A small encoder of each kind."""
    if name in ("tiny", "nfnet-tiny"):
        return VisionConfig(name=name)
    if name == "efficientnet-lite0":
        return lite0(weights)
    vit_folder.save(name, folder)
    return VisionConfig(name=name, weights=str(folder))


KINDS = ["tiny", "efficientnet-lite0", "nfnet-tiny", "clip", "siglip", "dinov2"]


@pytest.fixture(params=KINDS)
def encoder(request: pytest.FixtureRequest, weights: Path, tmp_path: Path) -> VisionEncoder:
    return build_vision(any_config(request.param, weights, tmp_path))


def test_what_every_encoder_promises(encoder: VisionEncoder) -> None:
    size = encoder.image_size
    features = encoder(random_pixels(3, size))
    assert features.shape == (3, encoder.num_features, encoder.width)
    assert features.isfinite().all()
    assert features.std(0).max() > 0, "different pictures give different features"
    assert not features.requires_grad
    assert encoder(random_pixels(0, size)).shape == (0, encoder.num_features, encoder.width)


def test_borders_are_white_or_the_mean_that_is_subtracted(weights: Path, tmp_path: Path) -> None:
    for name in KINDS:
        config = any_config(name, weights, tmp_path / name)
        mean = {"nfnet-tiny": (124, 116, 104), "tiny": (255,) * 3, "efficientnet-lite0": (255,) * 3}
        assert config.pad_colour == build_vision(config).pad_colour == mean.get(name, vit_folder.MEAN_RGB)


def test_weights_are_out_of_reach_of_optimizer_checkpoint_and_casts(encoder: VisionEncoder) -> None:
    assert not list(encoder.parameters())
    assert not encoder.state_dict()
    before = [buffer.clone() for buffer in encoder.buffers()]
    network = torch.nn.Sequential(encoder, torch.nn.Linear(2, 2)).bfloat16()
    assert network[1].weight.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(before, encoder.buffers(), strict=True))
    assert encoder.dtype == torch.float32


def test_refuses_other_pixels(encoder: VisionEncoder) -> None:
    size = encoder.image_size
    for wrong in (torch.zeros(1, 3, size, size), random_pixels(1, size + 8), random_pixels(1, size)[:, :1]):
        with pytest.raises(ValueError, match=rf"give uint8 \[N, 3, {size}, {size}\]"):
            encoder(wrong)


def test_tiny_depends_on_its_seed_alone() -> None:
    pixels = random_pixels(2, 32)
    torch.manual_seed(1)
    first = build_vision(VisionConfig())(pixels)
    torch.manual_seed(2)
    assert torch.equal(first, build_vision(VisionConfig())(pixels))
    assert not torch.equal(first, build_vision(VisionConfig(tiny_seed=1))(pixels))


def test_tiny_geometry_follows_the_configuration() -> None:
    config = VisionConfig(image_size=48, tiny_width=16)
    encoder = build_vision(config)
    assert encoder(random_pixels(2, 48)).shape == (2, 36, 16)
    assert (config.num_features, config.width) == (encoder.num_features, encoder.width) == (36, 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "resnet"}, "give one of tiny, efficientnet-lite0, .*nfnet-f6.*clip, siglip, dinov2"),
        ({"image_size": 30}, "multiple of 8"),
        ({"name": "efficientnet-lite0", "weights": "w.pth", "image_size": 40}, "multiple of 32"),
        ({"name": "efficientnet-lite0", "image_size": 64}, "give a path"),
        ({"weights": "w.pth"}, "for tiny: it has none"),
        ({"name": "nfnet-f6", "image_size": 300}, "multiple of 32"),
        ({"name": "clip"}, "give a Hugging Face folder"),
        ({"name": "nfnet-f6", "class_token": True}, "they are for clip, siglip, dinov2"),
        ({"final_norm": False}, "they are for clip, siglip, dinov2"),
        ({"name": "siglip", "weights": "w", "class_token": True}, "class_token True for siglip: it has none"),
        ({"tiny_width": 6}, "multiple of 4"),
        ({"dtype": "float16"}, "give 'float32' or 'bfloat16'"),
    ],
)
def test_configuration_says_what_is_allowed(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisionConfig(**settings)


def test_missing_and_foreign_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no EfficientNet-Lite0 weights at .*none.pth"):
        build_vision(lite0(tmp_path / "none.pth"))
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="no state dict of EfficientNet-Lite0"):
        build_vision(lite0(tmp_path / "other.pth"))


def test_fingerprint_follows_what_decides_the_features(weights: Path, tmp_path: Path) -> None:
    config = lite0(weights)
    copy = tmp_path / "copy.pth"
    copy.write_bytes(weights.read_bytes())
    assert lite0(copy).fingerprint() == config.fingerprint(), "the path says nothing about the weights"
    torch.save(random_state(seed=1), tmp_path / "other.pth")
    others = [
        lite0(tmp_path / "other.pth"),
        lite0(weights, 96),
        lite0(weights, dtype="bfloat16"),
        VisionConfig(),
        VisionConfig(tiny_seed=1),
        VisionConfig(tiny_width=16),
        VisionConfig(name="nfnet-tiny"),
        VisionConfig(name="nfnet-tiny", nfnet_seed=1),
    ]
    assert len({c.fingerprint() for c in [config, *others]}) == 1 + len(others)
    assert dataclasses.replace(config, tiny_seed=5, nfnet_seed=5).fingerprint() == config.fingerprint()
    # Features that lie on people's disks: settings of other encoders must not make them stale.
    assert VisionConfig().fingerprint() == "6486f6310b9a7a11"


def build_under_zero_init(_topology: Any, configs: list[VisionConfig]) -> list[Tensor]:
    """Features of encoders that are built inside `zero.Init`, which casts what it sees to bfloat16."""
    import deepspeed

    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    with deepspeed.zero.Init(config_dict_or_path=config, dtype=torch.bfloat16):
        encoders = [build_vision(vision) for vision in configs]
        assert torch.empty(1).dtype == torch.bfloat16, "the context goes on after the encoder"
    return [e(random_pixels(1, e.image_size)) for e in encoders]


@pytest.mark.parametrize("name", ["nfnet-tiny", "clip", "siglip", "dinov2"])
def test_the_network_trains_on_every_encoder(name: str, weights: Path, tmp_path: Path) -> None:
    vision = any_config(name, weights, tmp_path)
    base = network(gate_init=0.5)
    config = dataclasses.replace(
        base,
        vision=vision,
        resampler=dataclasses.replace(base.resampler, feature_width=vision.width),
        vision_batch=2,
    )
    tokens = torch.tensor([[1, IMAGE, 5, 6]])
    with single_process():
        model = Flamingo(config, dtype=torch.bfloat16)
        initialize_(model, seed=0)
        mask = torch.ones(1, 1, dtype=torch.bool)
        clips = [random_pixels(2, vision.image_size, seed)[None, None] for seed in (1, 2)]
        losses = []
        for clip in clips:
            out = model(tokens, torch.tensor([[0, 1, 1, 1]]), clip, mask, targets_BT=tokens)
            losses.append(out.nll_BT.sum())
        losses[0].backward()
    assert losses[0] != losses[1], "another clip gives another loss"
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.resampler.layers.parameters())
    assert not any("vision" in key for key in model.state_dict())


@pytest.mark.distributed
def test_zero_init_leaves_the_encoder_alone(ranks: RankPool, weights: Path, tmp_path: Path) -> None:
    configs = [any_config(name, weights, tmp_path / name) for name in KINDS]
    found = ranks.run(build_under_zero_init, configs, world=1)[0]
    for features, config in zip(found, configs, strict=True):
        expected = build_vision(config)(random_pixels(1, config.image_size))
        torch.testing.assert_close(features, expected)
