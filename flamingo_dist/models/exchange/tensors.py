"""Folders of safetensors, written one shard at a time and read one slice at a time."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from flamingo_dist.models.init import ParamTag

SHARD_BYTES = 5_000_000_000
"""Size that a file of a written folder does not exceed, unless one tensor does."""
INDEX = "model.safetensors.index.json"
"""Says which file holds which tensor, as Hugging Face's libraries write and read it."""


class TensorFolder:
    """Reads the tensors of all `.safetensors` files of a folder."""

    def __init__(self, folder: Path) -> None:
        """Look which file holds what.

        Raises:
            ValueError: there is no file, or two files hold the same tensor.
        """
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as handle:
                names = list(handle.keys())
            twice = sorted(self._file_of.keys() & set(names))
            if twice:
                raise ValueError(f"{folder}: {file.name} holds {twice[:5]} once more.")
            self._file_of.update(dict.fromkeys(names, file))
        if not self._file_of:
            raise ValueError(f"{folder} holds no .safetensors file.")

    @property
    def where(self) -> str:
        """What errors call the source."""
        return str(self.folder)

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shape of every tensor."""
        found = {}
        for file in sorted(set(self._file_of.values())):
            with safe_open(file, framework="pt") as handle:
                found.update({n: torch.Size(handle.get_slice(n).get_shape()) for n in handle.keys()})  # noqa: SIM118
        return found

    def read(self, name: str) -> Tensor:
        """Return a whole tensor, of any shape."""
        with safe_open(self._file_of[name], framework="pt") as handle:
            whole: Tensor = handle.get_tensor(name)
        return whole

    def read_slice(self, name: str, tag: ParamTag, *, tp_rank: int, tp_size: int) -> Tensor:
        """Return one tensor-parallel rank's slice of a tensor of any shape, without reading the rest.

        Args:
            name: the tensor's name.
            tag: how tensor parallelism cuts it.
            tp_rank: this rank in the tensor-parallel group.
            tp_size: size of the tensor-parallel group.
        """
        dim = tag.partition_dim
        if dim is None or tp_size == 1:
            return self.read(name)
        with safe_open(self._file_of[name], framework="pt") as handle:
            stored = handle.get_slice(name)
            total = stored.get_shape()[dim] // tag.stride
            share = -(-total // tp_size)  # rows of a vocabulary may not divide: the last rank has fewer
            parts = []
            for matrix in range(tag.stride):
                start = min(tp_rank * share, total)
                part = slice(matrix * total + start, matrix * total + min(start + share, total))
                parts.append(stored[(slice(None),) * dim + (part,)])
        return torch.cat(parts, dim=dim)


def write_tensors(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], *, shard_bytes: int = SHARD_BYTES
) -> dict[str, torch.Size]:
    """Write tensors into `folder` as Hugging Face's libraries lay them out, holding one file's worth in memory.

    Args:
        folder: exists.
        tensors: names and values, of any shape and dtype.
        shard_bytes: size at which a new file begins.

    Returns:
        The shapes written, by name.
    """
    shards: list[list[str]] = []
    shapes: dict[str, torch.Size] = {}
    held: dict[str, Tensor] = {}
    total = size = 0

    def flush(held: Mapping[str, Tensor]) -> None:
        shards.append(list(held))
        save_file(dict(held), folder / f"part-{len(shards):05d}", metadata={"format": "pt"})

    for name, tensor in tensors:
        assert name not in shapes, f"{name} comes twice"
        if held and size + tensor.nbytes > shard_bytes:
            flush(held)
            held, size = {}, 0
        held[name] = tensor.detach().cpu().contiguous().clone()  # shares memory with no other tensor
        shapes[name] = tensor.shape
        size += tensor.nbytes
        total += tensor.nbytes
    flush(held)
    files = [_shard_name(number, len(shards)) for number in range(1, len(shards) + 1)]
    for number, file in enumerate(files, start=1):
        (folder / f"part-{number:05d}").rename(folder / file)
    if len(files) > 1:
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=1))
    return shapes


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
