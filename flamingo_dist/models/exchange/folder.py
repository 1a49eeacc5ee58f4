"""Our own folder of a network: `config.json` and safetensors of whole parameters, which any layout reads by slices."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flamingo_dist.from_json import from_json
from flamingo_dist.models.exchange.rules import check_tensors
from flamingo_dist.models.exchange.tensors import SHARD_BYTES, read_slice, write_tensors
from flamingo_dist.models.flamingo import FlamingoConfig
from flamingo_dist.models.init import tag_of
from flamingo_dist.models.stated_config import Difference, config_differences, lm_differences, refuse
from flamingo_dist.models.vision import VisionConfig
from flamingo_dist.models.vision.files import copy_weights, read_json
from flamingo_dist.models.weights.ranges import absolute, inside, join_url
from flamingo_dist.models.weights.safetensors import SafetensorsSource

FORMAT = "flamingo-dist"
"""What `config.json` calls the format."""
VERSION = 1
VISION = "vision"
"""Folder inside the folder, where the vision encoder's own files are."""
_FILES_OF_VISION = ("weights", "statistics")
_OF_A_RUN = (
    *("lm", "vision", "vision_batch", "weights"),
    *(
        "resampler.init_std",
        "resampler.latents_std",
        "resampler.frames_std",
        "gated.init_std",
        "gated.gate_init",
    ),
    *("resampler.shared_feature_kv", "resampler.implementation", "gated.implementation"),
)
"""Settings that may differ from a folder's: the LM's are compared by themselves, the others say where weights are,
what a network without weights starts from, or which way the same function is computed."""


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a hidden folder to write into, and rename it to `folder` when all went well.

    Raises:
        ValueError: `folder` exists.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists already; choose another folder, or delete it.")
    partial = folder.parent / f".partial-{folder.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    partial.rename(folder)


def write_network(
    folder: Path,
    config: FlamingoConfig,
    parameters: Iterable[tuple[str, Tensor]],
    *,
    vision: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a network into `folder`, which exists.

    Args:
        folder: see `new_folder`.
        config: the network.
        parameters: whole parameters by their names in `Flamingo`, of any shape; all, or the trainable ones alone (the
            others then come from `config.lm.weights`, of which a local path is written whole).
        vision: settings of the vision encoder where they are not `config.vision`, with paths inside `folder`.
        more: further JSON values of `config.json`.
        shard_bytes: size that a file does not exceed.
    """
    stated = dataclasses.asdict(config)
    stated["vision"] = dict(vision) if vision is not None else _copy_vision(config.vision, folder)
    shapes = write_tensors(folder, parameters, shard_bytes=shard_bytes)
    if _holds_frozen(shapes):
        stated["lm"]["weights"] = None
    elif config.lm.weights is not None:
        stated["lm"]["weights"] = absolute(config.lm.weights)
    stated["weights"] = None
    written = {"format": FORMAT, "version": VERSION, "model": stated, **(more or {})}
    (folder / "config.json").write_text(json.dumps(written, indent=1))


def _copy_vision(config: VisionConfig, folder: Path) -> dict[str, Any]:
    """Copy the encoder's files into `folder` and return its settings, with paths inside it."""
    stated = dataclasses.asdict(config)
    for field in _FILES_OF_VISION:
        if stated[field]:
            (folder / VISION).mkdir(exist_ok=True)
            stated[field] = f"{VISION}/{copy_weights(stated[field], folder / VISION)}"
    return stated


def read_stated(folder: str) -> dict[str, Any] | None:
    """Return what the `config.json` of a folder at any fsspec URL states; None unless `write_network` wrote it.

    Raises:
        ValueError: it is no JSON object.
        OSError: the storage does not give it.
    """
    stated = read_json(folder, "config.json")
    return stated if stated is not None and stated.get("format") == FORMAT else None


def read_network_config(folder: str, *, vision: VisionConfig | None = None) -> FlamingoConfig:
    """Return the network that `folder` holds; building it reads the weights from there.

    Args:
        folder: written by `write_network`, at any fsspec URL.
        vision: an encoder to use instead of the folder's, such as one whose features are at hand.

    Raises:
        ValueError: it is no such folder, or of another version of this code.
    """
    return network_of(read_json(folder, "config.json") or {}, folder, vision=vision)


def network_of(
    stated: Mapping[str, Any], folder: str, *, vision: VisionConfig | None = None
) -> FlamingoConfig:
    """Return the network that the `config.json` of `folder` states, which has been read; see `read_network_config`."""
    if stated.get("format") != FORMAT:
        raise ValueError(f"{folder} is no folder that `flamingo export` or `flamingo import` wrote.")
    if stated.get("version") != VERSION:
        raise ValueError(
            f"{folder} is of version {stated.get('version')}, this code reads version {VERSION}."
        )
    model = stated.get("model")
    if not (isinstance(model, dict) and isinstance(model.get("vision"), dict)):
        raise ValueError(f"{folder}/config.json states no model; was it changed? Write the folder again.")
    encoder = model["vision"] if vision is None else dataclasses.asdict(vision)
    if vision is None:
        held = {field: encoder[field] for field in _FILES_OF_VISION if encoder.get(field)}
        encoder = {**encoder, **{field: inside(folder, place) for field, place in held.items()}}
    try:
        config: FlamingoConfig = from_json(FlamingoConfig, {**model, "vision": encoder, "weights": folder})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}/config.json does not fit this version of the code: {error}.") from error
    return config


class NetworkFolder:
    """Reads the parameters of a network folder for one tensor-parallel rank."""

    def __init__(
        self, folder: str, *, tp_rank: int, tp_size: int, exchange: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Open the folder, at any fsspec URL; for `exchange` see `read_slice`."""
        self.folder, self.exchange = folder, exchange
        self.tensors = SafetensorsSource(folder)
        self.tp_rank, self.tp_size = tp_rank, tp_size

    def check(self, model: nn.Module, config: FlamingoConfig) -> None:
        """Check that the folder holds exactly the parameters of `model`, or its trainable ones, and its settings.

        Args:
            model: the network, empty or filled, partitioned by ZeRO or not.
            config: the network's.

        Raises:
            ValueError: naming what is missing, surplus or of another shape, or the settings that are others in the
                folder's `config.json`.
        """
        found = self.tensors.shapes()
        has_frozen = _holds_frozen(found)
        wanted = {
            name: whole_shape(name, param, tp_size=self.tp_size, vocab_size=config.lm.vocab_size)
            for name, param in model.named_parameters()
            if has_frozen or param.requires_grad
        }
        check_tensors(found, wanted, self.tensors.where)
        self._check_settings(config)

    def _check_settings(self, config: FlamingoConfig) -> None:
        """Raise `ValueError` where the folder states another network of the same names and shapes."""
        file = read_json(self.folder, "config.json")
        if file is None:
            return
        # With the run's encoder: the folder's own may not be at hand, and a run may take another.
        stated = network_of(file, self.folder, vision=config.vision)
        apart = [*config_differences(config, stated, skipped=_OF_A_RUN)]
        apart += [d._replace(name=f"lm.{d.name}") for d in lm_differences(config.lm, stated.lm)]
        if config.lm.tied != stated.lm.tied:
            apart.append(Difference("lm.tied", config.lm.tied, stated.lm.tied))
        # Parameters have our names in a folder, whatever the published weights call them.
        refuse([d for d in apart if d.name != "lm.naming"], join_url(self.folder, "config.json"), "model.")

    def holds(self, name: str) -> bool:
        """Return whether the folder has the parameter `name`; one written without the frozen LM lacks the LM's."""
        return name in self.tensors.shapes()

    def values(self, name: str, param: nn.Parameter) -> Tensor:
        """Return this rank's values of the parameter `name`, of the parameter's shape.

        Raises:
            OSError: the storage does not give them.
        """
        value = read_slice(
            self.tensors,
            name,
            tag_of(param),
            tp_rank=self.tp_rank,
            tp_size=self.tp_size,
            exchange=self.exchange,
        )
        short = param.shape[0] - value.shape[0] if _is_vocabulary(name) else 0
        return nn.functional.pad(value, (0, 0, 0, short)) if short else value


def _holds_frozen(names: Iterable[str]) -> bool:
    """Return whether a folder with these parameters holds the frozen language model too."""
    return any(name.startswith("lm.layers.") for name in names)


def _is_vocabulary(name: str) -> bool:
    return name.startswith("lm.vocabulary.frozen")


def whole_shape(name: str, param: nn.Parameter, *, tp_size: int, vocab_size: int) -> torch.Size:
    """Return the shape of a parameter over all tensor-parallel ranks, without the vocabulary's padding."""
    shape = list(getattr(param, "ds_shape", param.shape))
    dim = tag_of(param).partition_dim
    if dim is not None:
        shape[dim] *= tp_size
    if _is_vocabulary(name):
        shape[0] = vocab_size
    return torch.Size(shape)
