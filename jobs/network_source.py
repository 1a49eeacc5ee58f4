"""A network whose parameters are read one by one, from a run, a checkpoint or a network folder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.tokenizer import TokenizerConfig
from flamingo_dist.models.exchange.folder import (
    NetworkFolder,
    is_network_folder,
    read_network_config,
    read_stated,
)
from flamingo_dist.models.flamingo import Flamingo, FlamingoConfig
from flamingo_dist.parallel.topology import Topology
from flamingo_dist.training.build import parameter_values
from flamingo_dist.training.checkpoint_folder import MANIFEST, check_files, find_checkpoint, read_manifest
from flamingo_dist.training.optimizer_state import WEIGHT, stored_name
from flamingo_dist.training.stored_state import check_stored, read_whole
from jobs.model_card import card_of_run
from jobs.network_tokenizer import read_tokenizer
from jobs.run_file import load_run_config


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network whose whole parameters can be read one by one."""

    config: FlamingoConfig
    """The network."""
    shapes: Mapping[str, torch.Size]
    """Shapes of all whole parameters."""
    trainable: frozenset[str]
    """Names of the trainable ones."""
    read: Callable[[str], Tensor]
    """Gives a whole parameter by name."""
    card: str
    """What a model card says of it."""
    more: Mapping[str, Any]
    """Further values of `config.json`."""
    tokenizer: TokenizerConfig | None
    """The language model's tokenizer, if it is known."""


def open_network(path: Path, topology: Topology) -> Network:
    """Open a run folder, a checkpoint, or a network folder, in a world of one process.

    Raises:
        ValueError: there is no network.
        CheckpointError: a checkpoint is not there, or does not fit its run's network.
    """
    if is_network_folder(path):
        return _open_network_folder(path, topology)
    is_checkpoint = (path / MANIFEST).is_file()
    run_dir = path.resolve().parents[1] if is_checkpoint else path
    run = load_run_config(run_dir)
    checkpoint = path if is_checkpoint else find_checkpoint(run_dir / "checkpoints", "latest")
    assert checkpoint is not None, "'latest' is found or an error"
    manifest = read_manifest(checkpoint)
    check_files(checkpoint, manifest)
    config, dtype = run.model, run.train.torch_dtype
    model = empty_network(config)
    shapes, trainable = whole_shapes(model)
    check_stored(checkpoint, {stored_name(WEIGHT, n): shapes[n] for n in trainable}, kinds=[WEIGHT])
    first = _first_values(config, model, topology, run.train.seed)

    def read(name: str) -> Tensor:
        value = read_whole(checkpoint, name, shapes[name]) if name in trainable else first(name)
        return value.to(dtype)

    return Network(
        config=config,
        shapes=shapes,
        trainable=trainable,
        read=read,
        card=card_of_run(run_dir, run, manifest, shapes, trainable),
        more={"dtype": run.train.dtype, "step": manifest["step"]},
        tokenizer=run.data.tokenizer,
    )


def _open_network_folder(path: Path, topology: Topology) -> Network:
    config = read_network_config(path)
    model = empty_network(config)
    shapes, trainable = whole_shapes(model)
    folder = NetworkFolder(path, tp_rank=0, tp_size=1)
    folder.check(model, config)
    first = _first_values(config, model, topology, seed=0)
    params = dict(model.named_parameters())
    value_of = folder.values(lambda name, _: first(name))
    stated = read_stated(path)
    card = path / "README.md"
    return Network(
        config=config,
        shapes=shapes,
        trainable=trainable,
        read=lambda name: value_of(name, params[name]),
        card=card.read_text() if card.is_file() else "",
        more={key: stated[key] for key in ("dtype", "step", "images_wrapped") if key in stated},
        tokenizer=read_tokenizer(path),
    )


def empty_network(config: FlamingoConfig) -> Flamingo:
    """Return the network on the meta device: names, shapes and tags, no values."""
    with torch.device("meta"):
        return Flamingo(config, dtype=torch.float32)


def whole_shapes(model: Flamingo) -> tuple[dict[str, torch.Size], frozenset[str]]:
    """Return the shapes of all whole parameters, and the names of the trainable ones."""
    named = dict(model.named_parameters())
    return {n: p.shape for n, p in named.items()}, frozenset(n for n, p in named.items() if p.requires_grad)


def _first_values(
    config: FlamingoConfig, model: Flamingo, topology: Topology, seed: int
) -> Callable[[str], Tensor]:
    """Return what gives a parameter the value that training starts from."""
    params = dict(model.named_parameters())
    value_of = parameter_values(config, topology, seed)
    return lambda name: value_of(name, params[name])
