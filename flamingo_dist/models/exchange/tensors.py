"""Folders of safetensors, written one shard at a time; one rank's slices of their tensors."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from flamingo_dist.models.init import ParamTag
from flamingo_dist.models.weights.safetensors import INDEX, SINGLE, SafetensorsSource
from flamingo_dist.models.weights.source import ALL

SHARD_BYTES = 5_000_000_000
"""Size that a file of a written folder does not exceed, unless one tensor does."""


def read_slice(
    source: SafetensorsSource,
    name: str,
    tag: ParamTag,
    *,
    tp_rank: int,
    tp_size: int,
    exchange: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return one tensor-parallel rank's slice of a tensor of any shape, without reading the rest.

    Args:
        source: where the tensor is.
        name: the tensor's name.
        tag: how tensor parallelism cuts it.
        tp_rank: this rank in the tensor-parallel group.
        tp_size: size of the tensor-parallel group.
        exchange: turns this rank's even share of a matrix's rows into its share of the columns, as in `lm_shard`; each
            byte of a matrix that is cut by columns is then read once a group. None reads the columns themselves.
    """
    dim = tag.partition_dim
    if dim is None or tp_size == 1:
        return source.read(name)
    rows, *_ = shape = source.shapes()[name]
    total = shape[dim] // tag.stride
    if exchange is not None and dim == 1 and tag.stride == 1 and rows % tp_size == total % tp_size == 0:
        return exchange(source.read(name, slice(tp_rank * rows // tp_size, (tp_rank + 1) * rows // tp_size)))
    share = -(-total // tp_size)  # rows of a vocabulary may not divide: the last rank has fewer
    parts = []
    for matrix in range(tag.stride):
        start = min(tp_rank * share, total)
        part = slice(matrix * total + start, matrix * total + min(start + share, total))
        parts.append(source.read(name, part) if dim == 0 else source.read(name, ALL, part))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


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
    return SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
