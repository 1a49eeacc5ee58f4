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
    network_of,
    read_stated,
)
from flamingo_dist.models.flamingo import Flamingo, FlamingoConfig
from flamingo_dist.models.weights.ranges import RangeFile, join_url
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


def open_network(source: str, topology: Topology) -> Network:
    """Open a run folder, a checkpoint, or a network folder at any fsspec URL, in a world of one process.

    Raises:
        ValueError: there is no network.
        CheckpointError: a checkpoint is not there, or does not fit its run's network.
    """
    stated = read_stated(source)
    if stated is not None:
        return _open_network_folder(source, stated, topology)
    path = local_folder(source)
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


def local_folder(source: str) -> Path:
    """Return the folder of a run or checkpoint, which are local, unlike network folders.

    Raises:
        ValueError: `source` is a URL.
    """
    if "://" in source:
        raise ValueError(
            f"{source} is no folder that `flamingo export` or `flamingo import` wrote; runs and checkpoints are read "
            "from local folders."
        )
    return Path(source)


def _open_network_folder(url: str, stated: Mapping[str, Any], topology: Topology) -> Network:
    config = network_of(stated, url)
    model = empty_network(config)
    shapes, trainable = whole_shapes(model)
    folder = NetworkFolder(url, tp_rank=0, tp_size=1)
    folder.check(model, config)
    first = _first_values(config, model, topology, seed=0)
    params = dict(model.named_parameters())
    card = RangeFile(join_url(url, "README.md"))
    return Network(
        config=config,
        shapes=shapes,
        trainable=trainable,
        read=lambda name: folder.values(name, params[name]) if folder.holds(name) else first(name),
        card=card.read_all().decode() if card.exists() else "",
        more={key: stated[key] for key in ("dtype", "step", "images_wrapped") if key in stated},
        tokenizer=read_tokenizer(url, stated),
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
