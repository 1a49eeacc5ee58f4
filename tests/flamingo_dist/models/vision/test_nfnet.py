"""NFNet against the features of the published code, its weights from every published layout, and what is refused."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flamingo_dist.models.vision import VisionConfig, VisionEncoder, build_vision
from flamingo_dist.models.vision.haiku_file import read_pickle
from flamingo_dist.models.vision.nfnet import standardised
from flamingo_dist.models.vision.nfnet_shape import NFNETS
from tests.flamingo_dist.models.vision.nfnet_material import GOLDEN, PICKLED, picture, values

Arrays = dict[str, np.ndarray]
NAMES = [str(name) for name in np.load(GOLDEN)["names"]]
"""As the published code names its parameters, the classifier's too."""


def shapes() -> dict[str, tuple[int, ...]]:
    """Shapes in the published layout, by the published names."""
    turned = {"conv": lambda s: (s[2], s[3], s[1], s[0]), "linear": lambda s: s[::-1]}
    ours = {f"NFNet/~/{t.haiku}": turned.get(t.kind, tuple)(t.shape) for t in NFNETS["nfnet-tiny"].tensors()}
    return ours | {"NFNet/~/linear/w": (128, 10), "NFNet/~/linear/b": (10,)}


def haiku_arrays() -> Arrays:
    return values({name: shapes()[name] for name in NAMES})


def nested(arrays: Arrays) -> dict[str, Arrays]:
    """As haiku keeps parameters: by module, then by name."""
    modules: dict[str, Arrays] = {}
    for name, value in arrays.items():
        module, last = name.rsplit("/", 1)
        modules.setdefault(module, {})[last] = value
    return modules


# timm's names and shapes of some tensors, as its own dm_nfnet_f0 has them.
TIMM_F0 = {
    "stem.conv1.weight": (16, 3, 3, 3),
    "stem.conv4.gain": (128, 1, 1, 1),
    "stages.0.0.downsample.conv.weight": (256, 128, 1, 1),
    "stages.2.5.conv2b.weight": (768, 128, 3, 3),
    "stages.3.0.attn_last.fc1.weight": (768, 1536, 1, 1),
    "stages.3.2.skipinit_gain": (),
    "final_conv.bias": (3072,),
}


def timm_tensors(arrays: Arrays) -> dict[str, Tensor]:
    """The same weights in timm's layout."""
    tensors = {}
    for spec in NFNETS["nfnet-tiny"].tensors():
        value = torch.from_numpy(arrays[f"NFNet/~/{spec.haiku}"])
        if spec.kind == "conv":
            value = value.permute(3, 2, 0, 1)
        elif spec.kind == "linear":
            value = value.T[:, :, None, None]
        elif spec.kind == "gain":
            value = value[:, None, None, None]
        tensors[spec.timm] = value.contiguous()
    return tensors | {"head.fc.weight": torch.zeros(10, 128), "head.fc.bias": torch.zeros(10)}


def encoder(path: Path | str, **changes: Any) -> VisionEncoder:
    return build_vision(VisionConfig(name="nfnet-tiny", weights=str(path), **changes))


def features(path: Path | str, **changes: Any) -> Tensor:
    return encoder(path, **changes)(torch.from_numpy(picture())).double()


def expected() -> Tensor:
    return torch.from_numpy(np.load(GOLDEN)["features"])


def write_haiku_pickle(path: Path, arrays: Arrays) -> None:
    path.write_bytes(pickle.dumps(nested(arrays)))


def write_npz(path: Path, arrays: Arrays) -> None:
    np.savez(path, **arrays)


def write_haiku_safetensors(path: Path, arrays: Arrays) -> None:
    save_file({name: torch.from_numpy(value) for name, value in arrays.items()}, path)


def write_timm_safetensors(path: Path, arrays: Arrays) -> None:
    save_file(timm_tensors(arrays), path)


def write_timm_pth(path: Path, arrays: Arrays) -> None:
    torch.save(timm_tensors(arrays), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("F_haiku.npz", write_haiku_pickle),  # the published files are pickles under this name
        ("real.npz", write_npz),
        ("haiku.safetensors", write_haiku_safetensors),
        ("timm.safetensors", write_timm_safetensors),
        ("timm.pth", write_timm_pth),
    ],
)
def test_features_equal_the_published_code(
    tmp_path: Path, name: str, write: Callable[[Path, Arrays], None]
) -> None:
    write(tmp_path / name, haiku_arrays())
    found = features(tmp_path / name)
    assert found.shape == (2, 4, 128)
    assert (found - expected()).norm() < 5e-6 * expected().norm()
    torch.testing.assert_close(found, expected(), atol=2e-5, rtol=2e-5)


def test_bfloat16_features_stay_close(tmp_path: Path) -> None:
    write_npz(tmp_path / "w.npz", haiku_arrays())
    rough = features(tmp_path / "w.npz", dtype="bfloat16")
    assert 0 < (rough - expected()).norm() < 0.05 * expected().norm()


def test_timms_names_are_its_own() -> None:
    stored = {"linear": (1, 1), "gain": (1, 1, 1)}
    ours = {t.timm: (*t.shape, *stored.get(t.kind, ())) for t in NFNETS["nfnet-f0"].tensors()}
    assert TIMM_F0.items() <= ours.items()
    assert len(ours) == 231, "timm's dm_nfnet_f0 has two more: the classifier's"


def test_standardised_weights_have_mean_zero_and_the_gain_as_norm() -> None:
    weight, gain = torch.randn(5, 3, 3, 3) + 2.0, torch.rand(5) + 0.5
    found = standardised(weight, gain)
    torch.testing.assert_close(found.mean((1, 2, 3)), torch.zeros(5).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(found.flatten(1).norm(dim=1), gain.double())
    assert standardised(torch.ones(1, 2, 1, 1), torch.ones(1)).abs().max() < 1e-12, "no division by zero"


def pickled(path: Path) -> Arrays:
    with path.open("rb") as file:
        return read_pickle(file, str(path))


def test_a_pickle_by_dill_itself_is_read() -> None:
    found = pickled(PICKLED)
    assert len(found) == 16
    for name, value in found.items():
        np.testing.assert_array_equal(value, haiku_arrays()[name])


class Call:
    """Pickles into a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    "held",
    [
        Call(os.system, "touch ran"),
        {"NFNet/~/stem_conv0": {"w": Call(eval, "open('ran', 'w')")}},
        {"NFNet/~/stem_conv0": {"w": np.array([Call(os.mkdir, "ran")], object)}},
        {"NFNet/~/stem_conv0": {"w": 1.0}},
        {"NFNet/~/stem_conv0": [np.ones(3)]},
        {},
        3,
    ],
)
def test_a_pickle_of_anything_else_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.npz").write_bytes(pickle.dumps(held))
    with pytest.raises(ValueError, match=r"evil.npz"):
        encoder(tmp_path / "evil.npz")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_of_every_protocol_order_and_endianness(tmp_path: Path, protocol: int) -> None:
    arrays = {
        "plain": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
        "big": np.arange(3, dtype=">f4"),
        "scalar": np.float32(2.5),
        "empty": np.zeros((0, 2), np.float32),
    }
    (tmp_path / "a").write_bytes(pickle.dumps({"m": arrays}, protocol=protocol))
    found = pickled(tmp_path / "a")
    for name, value in arrays.items():
        np.testing.assert_array_equal(found[f"m/{name}"], value)
    whole = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="no pickle of numpy arrays alone"):
        pickled(tmp_path / "a")


def lacking(arrays: Arrays) -> None:
    del arrays["NFNet/~/nf_block_1/~/conv1b/gain"]


def superfluous(arrays: Arrays) -> None:
    arrays["NFNet/~/nf_block_9/skip_gain"] = np.float32(1)


def misshapen(arrays: Arrays) -> None:
    arrays["NFNet/~/final_conv/w"] = np.zeros((1, 1, 3, 128), np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lacking, r"lacks NFNet/~/nf_block_1/~/conv1b/gain"),
        (superfluous, r"holds NFNet/~/nf_block_9/skip_gain, which the encoder does not have"),
        (misshapen, r"NFNet/~/final_conv/w of shape \[1, 1, 3, 128\] instead of \[1, 1, 64, 128\]"),
        (
            lambda arrays: arrays.clear() or arrays.update(x=np.zeros(1)),
            r"neither haiku's names .* begins with x",
        ),
    ],
)
def test_other_weights_are_refused_by_name(
    tmp_path: Path, change: Callable[[Arrays], None], message: str
) -> None:
    arrays = haiku_arrays()
    change(arrays)
    write_npz(tmp_path / "w.npz", arrays)
    with pytest.raises(ValueError, match=message):
        encoder(tmp_path / "w.npz")
    with pytest.raises(FileNotFoundError, match=r"no NFNet weights at .*none"):
        encoder(tmp_path / "none.npz")


def test_random_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = features("")
    torch.manual_seed(2)
    assert torch.equal(first, features(""))
    other = features("", nfnet_seed=1)
    assert not torch.allclose(first, other, atol=0.1)
    assert 0.1 < first.std() < 10, "the drawn network neither dies nor explodes"


def test_f6_has_the_papers_size() -> None:
    config = VisionConfig(name="nfnet-f6")
    assert (config.image_size, config.num_features, config.width) == (320, 100, 3072)
    assert config.pad_colour == (124, 116, 104)
    count = {t.haiku: int(np.prod(t.shape)) for t in NFNETS["nfnet-f6"].tensors()}
    final = sum(n for name, n in count.items() if name.startswith("final_conv"))
    assert (sum(count.values()), final) == (435_286_116, 4_724_736)
    with torch.device("meta"):
        built = build_vision(config)
    assert all(b.device.type == "meta" for b in built.buffers())
    assert built(torch.empty(2, 3, 320, 320, dtype=torch.uint8, device="meta")).shape == (2, 100, 3072)
    blocks = list(NFNETS["nfnet-f6"].blocks())
    assert [sum(b.stage == s for b in blocks) for s in range(4)] == [7, 14, 42, 21]
