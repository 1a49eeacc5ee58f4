"""`flamingo export` and `flamingo import`: networks out of and into folders of safetensors."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from data_pipeline.tokenizer import TokenizerConfig
from flamingo_dist.from_json import json_object
from flamingo_dist.models.exchange import idefics, open_flamingo
from flamingo_dist.models.exchange.folder import VISION, new_folder, write_network
from flamingo_dist.models.exchange.rules import check_tensors, read_ours, read_theirs, their_shapes
from flamingo_dist.models.exchange.tensors import SHARD_BYTES, write_tensors
from flamingo_dist.models.exchange.vision_tower import SETTINGS, Tower, tower_of, tower_settings, write_tower
from flamingo_dist.models.vision import VisionConfig
from flamingo_dist.models.weights import read_lm_config
from flamingo_dist.models.weights.ranges import RangeFile, absolute, join_url
from flamingo_dist.models.weights.safetensors import SafetensorsSource
from flamingo_dist.parallel.topology import single_process
from flamingo_dist.training.config import DTYPES
from jobs.model_card import card_of_import
from jobs.network_source import Network, empty_network, open_network, whole_shapes
from jobs.network_tokenizer import added_tokens, write_tokenizer

_SETTINGS = ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")
"""Files of a Hugging Face folder beside its tensors that an import reads."""
_TORCH_FILES = (".pt", ".pth", ".bin")


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """Arguments of `flamingo export`."""

    source: Annotated[str, tyro.conf.Positional]
    """A run folder (its newest checkpoint), a checkpoint, or a folder that `export` or `import` wrote, at any URL."""
    folder: Annotated[str, tyro.conf.Positional]
    """The folder to write; it must not exist."""
    to: Literal["flamingo", "idefics"] = "flamingo"
    """Our own folder, or Hugging Face's IDEFICS layout, for networks whose options exist there."""
    frozen: bool = True
    """Store the frozen language model too; without it the folder names where its weights are. Only for `flamingo`."""
    shard_bytes: int = SHARD_BYTES
    """Size that a file does not exceed."""


@dataclass(frozen=True, kw_only=True)
class ImportArguments:
    """Arguments of `flamingo import`."""

    source: Annotated[str, tyro.conf.Positional]
    """A folder of a Hugging Face IDEFICS checkpoint, or a `.pt` file of open_flamingo, at any fsspec URL."""
    folder: Annotated[str, tyro.conf.Positional]
    """The folder to write; it must not exist."""
    lm: str = ""
    """open_flamingo: the frozen language model, a folder of safetensors or a GGUF file; it stays where it is."""
    vision: str = ""
    """open_flamingo: a folder of the CLIP model in Hugging Face's layout, any fsspec URL; it stays where it is."""
    image_id: int = -1
    """open_flamingo: id of `<image>` in its tokenizer."""
    end_of_chunk_id: int = -1
    """open_flamingo: id of `<|endofchunk|>` in its tokenizer."""
    shard_bytes: int = SHARD_BYTES
    """Size that a file does not exceed."""


def export_network(arguments: ExportArguments) -> Path:
    """Write a trained network into a folder.

    Returns:
        The folder.

    Raises:
        ValueError: the source holds no network, or an option of it does not exist in the other layout.
        CheckpointError: the checkpoint is incomplete or damaged.
    """
    folder = Path(arguments.folder)
    with single_process() as topology, torch.no_grad():
        network = open_network(arguments.source, topology)
        with new_folder(folder) as partial:
            if arguments.to == "idefics":
                _write_idefics(network, partial, arguments.shard_bytes)
            else:
                if not arguments.frozen and network.config.lm.weights is None:
                    raise ValueError(
                        "--no-frozen: the language model has no published weights (model.lm.weights), so its frozen "
                        "ones are nowhere else; leave the option out."
                    )
                names = [n for n in network.shapes if arguments.frozen or n in network.trainable]
                write_network(
                    partial,
                    network.config,
                    ((name, network.read(name)) for name in names),
                    more={**network.more, **write_tokenizer(partial, network.tokenizer)},
                    shard_bytes=arguments.shard_bytes,
                )
            (partial / "README.md").write_text(network.card)
    return folder


def _write_idefics(network: Network, folder: Path, shard_bytes: int) -> None:
    """Write IDEFICS' layout; an image's frame embedding moves into the tower's last bias, which adds to all tokens."""
    tower = tower_of(network.config.vision)
    (folder / "config.json").write_text(
        json.dumps(idefics.idefics_config(network.config, tower.stated), indent=1)
    )
    tensors = idefics_tensors(network, tower)
    write_tensors(folder, tensors, shard_bytes=shard_bytes)


def idefics_tensors(network: Network, tower: Tower) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of IDEFICS' layout by name, of any shape.

    Args:
        network: what `idefics.idefics_config` accepted; of a tied head the embedding is written twice.
        tower: its vision tower.
    """
    tower.check()
    frames_FE = network.read("resampler.frame_embeddings")

    def read(name: str) -> Tensor:
        if name == "resampler.frame_embeddings":
            return torch.zeros_like(frames_FE)
        if name == "lm.vocabulary.frozen_head.weight" and network.config.lm.tied:
            name = "lm.vocabulary.frozen.weight"
        return network.read(name)

    yield from read_theirs(idefics.rules(network.config), read)
    for name, tensor in tower.read():
        if name == tower.last_bias and frames_FE[0].any():
            tensor = tensor + frames_FE[0].to(tensor.dtype)
        yield idefics.VISION_PREFIX + name, tensor


def import_network(arguments: ImportArguments) -> Path:
    """Write the network of a public checkpoint into a folder of ours.

    Returns:
        The folder.

    Raises:
        ValueError: the source is of no known kind, a tensor is missing, surplus or misshaped, or an option has no
            counterpart here.
    """
    source, folder = arguments.source, Path(arguments.folder)
    with single_process(), torch.no_grad(), _at_hand(source) as local, new_folder(folder) as partial:
        if local.suffix in _TORCH_FILES and local.is_file():
            card = _import_open_flamingo(source, local, partial, arguments)
        elif (local / "config.json").is_file():
            card = _import_idefics(source, local, partial, arguments.shard_bytes)
        else:
            raise ValueError(
                f"{source} is neither a folder with a config.json (IDEFICS) nor a .pt file (open_flamingo)."
            )
        (partial / "README.md").write_text(card)
    return folder


@contextmanager
def _at_hand(source: str) -> Iterator[Path]:
    """Give a local path of what is read as files: a `.pt` file, or a folder's settings, copied if they are remote.

    Tensors of a remote folder stay where they are; they are read from there one by one.
    """
    if "://" not in source:
        yield Path(source)
        return
    with TemporaryDirectory(prefix="flamingo-import-") as folder:
        is_file = PurePosixPath(source).suffix in _TORCH_FILES
        local = Path(folder, "checkpoint.pt") if is_file else Path(folder)
        wanted = {source: local} if is_file else {join_url(source, name): local / name for name in _SETTINGS}
        for url, path in wanted.items():
            with suppress(FileNotFoundError):  # what has to be there is asked for by who needs it
                RangeFile(url).copy_to(path)
        yield local


def _stand_in(width: int) -> VisionConfig:
    """Return an encoder of a width, for a configuration whose encoder's settings are written separately."""
    return VisionConfig(name="tiny", image_size=32, tiny_width=width)


def _import_idefics(source: str, local: Path, folder: Path, shard_bytes: int) -> str:
    from transformers import AutoConfig

    config_file = json_object((local / "config.json").read_bytes(), join_url(source, "config.json"))
    if config_file.get("model_type") != "idefics":
        raise ValueError(f"{source} is no IDEFICS checkpoint (its config.json says another model_type).")
    # Through transformers, so that an option which the file leaves out has the value that it has there.
    stated = AutoConfig.from_pretrained(local).to_dict()
    _check_added_tokens(source, local, stated)
    tensors = SafetensorsSource(source)
    width = stated["vision_config"]["embed_dim"]
    config = idefics.network_config(stated, _stand_in(width))
    rules = idefics.rules(config, additional=stated["additional_vocab_size"] > 0)
    shapes, _ = whole_shapes(empty_network(config))
    tower = Tower(
        stated=tower_settings(stated["vision_config"]), source=tensors, prefix=idefics.VISION_PREFIX
    )
    found = tensors.shapes()
    outside = {n: s for n, s in found.items() if not n.startswith(idefics.VISION_PREFIX)}
    derived = [name for name in found if name.endswith(idefics.IGNORED)]
    check_tensors(outside, their_shapes(rules, shapes), source, ignored=derived)
    tower.check()
    processor = local / "preprocessor_config.json"
    pictures = (
        json_object(processor.read_bytes(), join_url(source, processor.name)) if processor.is_file() else None
    )
    write_tower(folder / VISION, tower, pictures)
    dtype = str(stated.get("dtype") or "float32").removeprefix("torch.")
    told = {"dtype": next((n for n, t in DTYPES.items() if str(t) == f"torch.{dtype}"), "bf16")}
    write_network(
        folder,
        config,
        read_ours(rules, tensors),
        vision={**SETTINGS, "weights": VISION, "image_size": stated["vision_config"]["image_size"]},
        more={
            **told,
            **({"images_wrapped": True} if stated["additional_vocab_size"] else {}),
            **write_tokenizer(folder, _tokenizer_in(local, config.lm.vocab_size)),
        },
        shard_bytes=shard_bytes,
    )
    return card_of_import(source, "IDEFICS", config, shapes)


def _check_added_tokens(source: str, local: Path, stated: Mapping[str, Any]) -> None:
    """Raise `ValueError` where the checkpoint's tokenizer gives IDEFICS' additional tokens other ids than we know."""
    ids = added_tokens(str(local))
    for number, name in enumerate((idefics.FAKE_TOKEN, idefics.IMAGE_TOKEN), start=stated["vocab_size"]):
        if ids.get(name, number) != number:
            raise ValueError(
                f"tokenizer.json in {source}: {name} is token {ids[name]}; in IDEFICS' layout it is {number}."
            )


def _tokenizer_in(folder: Path, vocab_size: int) -> TokenizerConfig | None:
    """Return the tokenizer that lies in a folder of Hugging Face, if one does."""
    if not all((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    return TokenizerConfig(kind="hf", path=str(folder), vocab_size=vocab_size)


def _import_open_flamingo(source: str, local: Path, folder: Path, arguments: ImportArguments) -> str:
    for name in ("lm", "vision"):
        if not getattr(arguments, name):
            raise ValueError(
                f"{source} holds the trained part alone; name the frozen one too with --{name} (see --help)."
            )
    if arguments.image_id < 0 or arguments.end_of_chunk_id < 0:
        raise ValueError(
            "give --image-id and --end-of-chunk-id: open_flamingo adds <|endofchunk|>, <image> and perhaps <PAD> "
            "to the tokenizer, in this order, from its length on."
        )
    if arguments.image_id == arguments.end_of_chunk_id:
        raise ValueError(
            f"--image-id and --end-of-chunk-id are both {arguments.image_id}; they are two tokens, so give two ids."
        )
    file = open_flamingo.OpenFlamingoFile(local, source)
    lm = read_lm_config(arguments.lm)
    width = file.shapes()["perceiver.latents"][1]
    config = open_flamingo.network_config(file, lm, _stand_in(width))
    shapes, trainable = whole_shapes(empty_network(config))
    tokens = open_flamingo.NewTokens(image=arguments.image_id, end_of_chunk=arguments.end_of_chunk_id)
    parameters = open_flamingo.trainable_parameters(file, config, tokens, {n: shapes[n] for n in trainable})
    write_network(
        folder,
        config,
        parameters,
        vision={
            "name": "clip",
            "weights": absolute(arguments.vision),
        },
        more={
            "dtype": "bf16",
            **write_tokenizer(folder, _tokenizer_in(Path(arguments.lm), config.lm.vocab_size)),
        },
        shard_bytes=arguments.shard_bytes,
    )
    return card_of_import(source, "OpenFlamingo", config, shapes)


def export_command(arguments: list[str]) -> int:
    """Run `flamingo export SOURCE FOLDER [options]`."""
    given = tyro.cli(ExportArguments, args=arguments, prog="flamingo export")
    print(f"wrote {export_network(given)}")
    return 0


def import_command(arguments: list[str]) -> int:
    """Run `flamingo import SOURCE FOLDER [options]`."""
    given = tyro.cli(ImportArguments, args=arguments, prog="flamingo import")
    print(f"wrote {import_network(given)}")
    return 0
