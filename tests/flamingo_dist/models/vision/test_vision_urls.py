"""Vision weights from a web server and from memory: the same features, each byte once a job, errors on all ranks."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flamingo_dist.models.vision import VisionConfig, build_vision
from flamingo_dist.models.vision.files import copy_weights
from flamingo_dist.parallel.topology import ParallelConfig, Topology
from flamingo_dist.training.build import build_model
from flamingo_dist.training.published import HandedOn
from tests import tiny
from tests.data_pipeline.servers import flaky_server
from tests.flamingo_dist.models.vision import test_nfnet as nfnet
from tests.flamingo_dist.models.vision import vit_folder
from tests.flamingo_dist.models.vision.test_vision import random_state
from tests.ranks import RankPool

VITS = ("clip", "siglip", "dinov2")
NFNETS = ("haiku.npz", "real.npz", "timm.safetensors", "timm.pth")
MEMORY = "memory://vision-urls"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """All kinds of weights, in a folder and in memory."""
    folder = tmp_path_factory.mktemp("vision")
    for name in VITS:
        vit_folder.save(name, folder / name)
    arrays = nfnet.haiku_arrays()
    nfnet.write_haiku_pickle(folder / "haiku.npz", arrays)
    nfnet.write_npz(folder / "real.npz", arrays)
    nfnet.write_timm_safetensors(folder / "timm.safetensors", arrays)
    nfnet.write_timm_pth(folder / "timm.pth", arrays)
    torch.save(random_state(), folder / "lite0.pth")
    memory = fsspec.filesystem("memory")
    memory.put(f"{folder}/", "/vision-urls/", recursive=True)
    yield folder
    memory.rm("/vision-urls", recursive=True)


def config(root: Path | str, name: str, **changes: Any) -> VisionConfig:
    kind = name if name in VITS else "nfnet-tiny" if name in NFNETS else "efficientnet-lite0"
    size = {} if name != "lite0.pth" else {"image_size": 64}
    return VisionConfig(name=kind, weights=f"{root}/{name}", **size, **changes)  # type: ignore[arg-type]


def features(vision: VisionConfig, *, opening: Callable[..., Any] | None = None) -> Tensor:
    encoder = build_vision(vision) if opening is None else build_vision(vision, opening=opening)
    shape = (2, 3, vision.image_size, vision.image_size)
    generator = torch.Generator().manual_seed(2)
    found: Tensor = encoder(torch.randint(0, 256, shape, generator=generator).to(torch.uint8))
    return found


@pytest.mark.parametrize("name", [*VITS, *NFNETS, "lite0.pth"])
def test_a_server_and_memory_give_the_features_of_the_file(stored: Path, name: str) -> None:
    local = config(stored, name)
    expected = features(local)
    share = 0.05 if (stored / name).is_dir() or "safe" in name else 0.4  # many requests, or a few
    with flaky_server(stored, share=share, faults=("503", "reset", "cut")) as server:
        for root in (server.url, MEMORY):
            remote = config(root, name)
            assert torch.equal(features(remote), expected)
            assert remote.pad_colour == local.pad_colour
            assert remote.fingerprint() == local.fingerprint(), "stored features fit wherever the weights are"
        assert server.met.total() > server.met[""], "a fault was met"


def test_of_a_whole_model_the_vision_part_alone_is_read(stored: Path) -> None:
    whole = load_file(stored / "clip" / "model.safetensors")
    part = sum(t.nbytes for n, t in whole.items() if n.startswith("vision_model."))
    file = (stored / "clip" / "model.safetensors").stat().st_size
    header = file - sum(t.nbytes for t in whole.values())
    with flaky_server(stored, share=0.0) as server:
        vision = config(server.url, "clip")
        before = server.bytes_sent
        features(vision)
        read = server.bytes_sent - before
    # Beside them config.json once more, and bytes that say whether a file is there.
    stated = (stored / "clip" / "config.json").stat().st_size
    assert read <= part + header + stated + 8
    assert part < 0.9 * file


def features_together(topology: Topology, root: str, name: str) -> Tensor:
    return features(config(root, name), opening=HandedOn)


@pytest.mark.distributed
def test_of_all_ranks_one_reads(ranks: RankPool, stored: Path) -> None:
    name, file = "haiku.npz", "/haiku.npz"
    with flaky_server(stored, share=0.0) as server:
        expected = features(config(server.url, name))
        alone = server.requests[file]
        for found in ranks.run(features_together, server.url, name, world=3):
            assert torch.equal(found, expected)
        assert server.requests[file] == 2 * alone > 0


def built(topology: Topology, vision: VisionConfig, base: Any) -> list[str]:
    """The hash of an encoder as a run builds it, on this rank."""
    network = tiny.network()
    sizes = {"feature_width": vision.width}
    resampler = type(network.resampler)(**{**vars(network.resampler), **sizes})
    network = type(network)(**{**vars(network), "vision": vision, "resampler": resampler})
    model = build_model(
        network, ParallelConfig(zero_stage=3), topology, dtype=torch.float32, seed=1, ds_config=base
    )
    return [str(b.double().sum().item()) for b in model.vision.buffers()]


@pytest.mark.distributed
def test_a_run_hands_the_encoder_on(ranks: RankPool, stored: Path) -> None:
    expected = [str(b.double().sum().item()) for b in build_vision(config(stored, "clip")).buffers()]
    with flaky_server(stored, share=0.0) as server:
        vision = config(server.url, "clip")
        before = server.requests["/clip/model.safetensors"]
        ds_config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
        for found in ranks.run(built, vision, ds_config, world=2):
            assert found == expected
        asked = server.requests["/clip/model.safetensors"] - before
        features(vision)
        alone = server.requests["/clip/model.safetensors"] - before - asked
    assert asked == alone


def fails(topology: Topology, root: str, name: str) -> str:
    try:
        features(config(root, name), opening=HandedOn)
    except (ValueError, FileNotFoundError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.distributed
def test_what_is_wrong_is_said_on_every_rank(ranks: RankPool, stored: Path, tmp_path: Path) -> None:
    held = load_file(stored / "timm.safetensors")
    del held["final_conv.bias"]
    save_file(held, tmp_path / "timm.safetensors")
    with flaky_server(tmp_path, share=0.0) as server:
        for said in ranks.run(fails, server.url, "timm.safetensors", world=2):
            assert "ValueError" in said
            assert "timm.safetensors lacks final_conv.bias" in said
        for said in ranks.run(fails, server.url, "haiku.npz", world=2):
            assert said.startswith(f"FileNotFoundError: no NFNet weights at '{server.url}/haiku.npz'")
        with pytest.raises(FileNotFoundError, match=r"no config.json in 'http.*at any fsspec URL"):
            config(server.url, "clip")


@pytest.mark.parametrize("name", ["clip", "timm.safetensors"])
def test_remote_weights_are_copied_into_an_exported_folder(stored: Path, tmp_path: Path, name: str) -> None:
    with flaky_server(stored, share=0.0) as server:
        for number, root in enumerate((server.url, MEMORY)):
            folder = tmp_path / str(number)
            folder.mkdir()
            assert copy_weights(f"{root}/{name}", folder) == name
            assert config(folder, name).fingerprint() == config(stored, name).fingerprint()


@pytest.mark.parametrize("name", [*VITS, "real.npz"])
def test_a_dry_run_reads_no_weights(stored: Path, name: str) -> None:
    file = f"/{name}/model.safetensors" if name in VITS else f"/{name}"
    with flaky_server(stored, share=0.0) as server, FakeTensorMode(allow_non_fake_inputs=True):
        vision = config(server.url, name)
        size = vision.image_size
        found = build_vision(vision)(torch.empty(2, 3, size, size, dtype=torch.uint8))
        assert server.requests[file] == 0
    assert found.shape == (2, vision.num_features, vision.width)


class Breaking:
    """A source whose storage goes away for good after some tensors."""

    def __init__(self, source: Any) -> None:
        self.source, self.left = source, 3

    def shapes(self) -> Any:
        return self.source.shapes()

    def read(self, *args: Any) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise ConnectionError("the storage is gone")
        return self.source.read(*args)


def breaks(topology: Topology, root: str, name: str) -> str:
    try:
        features(config(root, name), opening=lambda source: HandedOn(lambda: Breaking(source())))
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.distributed
def test_a_storage_that_goes_away_ends_all_ranks(ranks: RankPool, stored: Path) -> None:
    first, *others = ranks.run(breaks, str(stored), "timm.safetensors", world=3, timeout=60)
    assert first == "ConnectionError: the storage is gone"
    assert len(others) == 2
    for said in others:
        assert said.startswith("OSError: the rank that reads '")
