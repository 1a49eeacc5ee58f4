"""Networks of ours built from folders, for comparisons."""

from pathlib import Path

import torch

from flamingo_dist.models.exchange.folder import read_network_config
from flamingo_dist.models.flamingo import Flamingo
from flamingo_dist.models.vision import VisionConfig
from flamingo_dist.parallel.topology import ParallelConfig, Topology, single_process
from flamingo_dist.training.build import build_model


def build(folder: Path | str, topology: Topology, *, width: int | None = None) -> Flamingo:
    """Build the network of a folder; with `width`, for features of that width from elsewhere."""
    vision = None if width is None else VisionConfig(name="tiny", image_size=32, tiny_width=width)
    parallel = ParallelConfig(zero_stage=0, tensor=topology.tensor)
    config = read_network_config(str(folder), vision=vision)
    return build_model(config, parallel, topology, dtype=torch.float32, seed=5)


@torch.no_grad()
def logits_of(model: Flamingo, tokens_BT, index_BT, features_BMSC) -> torch.Tensor:
    mask_BM = torch.ones(features_BMSC.shape[:2], dtype=torch.bool)
    return model(tokens_BT, index_BT, features_BMSC[:, :, None], mask_BM).logits_BTV


def logits(folder: Path, *inputs: torch.Tensor) -> torch.Tensor:
    """Logits of a folder's network in one process."""
    with single_process() as topology:
        return logits_of(build(folder, topology, width=inputs[-1].shape[-1]), *inputs)


def logits_of_ranks(topology: Topology, folder: str, *inputs: torch.Tensor) -> torch.Tensor:
    """The same on the ranks of a tensor-parallel group."""
    return logits_of(build(folder, topology, width=inputs[-1].shape[-1]), *inputs)


def rewrite(folder: Path, change) -> None:
    """Change the tensors of a folder with one safetensors file."""
    from safetensors.torch import load_file, save_file

    (file,) = folder.glob("*.safetensors")
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})
