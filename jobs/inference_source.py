"""The network that is generated from or evaluated: a run's checkpoint, or a network folder."""

from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipeline.tokenizer import TokenizerConfig
from flamingo_dist.models.exchange.folder import network_of, read_stated
from flamingo_dist.models.flamingo import Flamingo, FlamingoConfig
from flamingo_dist.parallel.topology import ParallelConfig, Topology
from flamingo_dist.training.build import build_model
from flamingo_dist.training.checkpoint_folder import CheckpointError, find_checkpoint
from flamingo_dist.training.config import DTYPES
from flamingo_dist.training.stored_state import load_trainable
from jobs.network_source import local_folder
from jobs.network_tokenizer import read_tokenizer
from jobs.run_file import load_run_config


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a process needs to build a network and to write its prompts."""

    model: FlamingoConfig
    """The network."""
    tokenizer: TokenizerConfig
    """Of its language model."""
    dtype: torch.dtype
    """Of its parameters."""
    seed: int
    """Of what neither the checkpoint nor published weights hold."""
    checkpoint: Path | None
    """Checkpoint of a run; None for a network folder."""
    wrapped: bool = False
    """Whether the network was trained with an `<EOC>` on either side of an image."""


def open_source(run: str, wanted: str) -> Source:
    """Return a run's checkpoint, or a network folder.

    Args:
        run: folder of a run, or of a network at any fsspec URL.
        wanted: checkpoint of a run: "latest", a step, or a path.

    Raises:
        ValueError: there is neither, or no tokenizer.
        CheckpointError: no such checkpoint.
    """
    stated = read_stated(run)
    if stated is not None:
        tokenizer = read_tokenizer(run, stated)
        if tokenizer is None:
            raise ValueError(
                f"{run} holds no tokenizer; export it from a run, or import a folder that has one."
            )
        return Source(
            model=network_of(stated, run),
            tokenizer=tokenizer,
            dtype=DTYPES[stated.get("dtype", "bf16")],
            seed=0,
            checkpoint=None,
            wrapped=stated.get("images_wrapped", False),
        )
    folder = local_folder(run)
    config = load_run_config(folder)
    path = find_checkpoint(folder / "checkpoints", wanted)
    if path is None:
        raise CheckpointError(f"{folder} has no checkpoint.")
    return Source(
        model=config.model,
        tokenizer=config.data.tokenizer,
        dtype=config.train.torch_dtype,
        seed=config.train.seed,
        checkpoint=path,
    )


def build_source(source: Source, parallel: ParallelConfig, topology: Topology) -> Flamingo:
    """Build and fill the network for this rank.

    Args:
        source: the network.
        parallel: how it is spread.
        topology: this process's place; the groups are initialised.
    """
    model = build_model(source.model, parallel, topology, dtype=source.dtype, seed=source.seed)
    if source.checkpoint is not None:
        load_trainable(model, source.checkpoint)
    return model
