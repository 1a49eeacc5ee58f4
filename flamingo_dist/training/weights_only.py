"""Trainable weights alone, whole, in one safetensors file: for generation and for other layouts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flamingo_dist.models.init import ParamTag, tag_of
from flamingo_dist.models.linear import tp_size
from flamingo_dist.parallel.topology import MegatronMPU, Topology

FILE = "trainable.safetensors"
"""Name of the file inside a checkpoint."""


def export_trainable(engine: Any, folder: Path, topology: Topology) -> None:
    """Write the fp32 trainable weights, gathered over all ranks, to `folder`; every rank must call this.

    Rank 0 holds all of them in host memory for a moment: 4 bytes a trainable parameter.
    """
    whole = {name: value for name, value in _whole(engine, topology) if topology.rank == 0}
    if topology.rank == 0:
        save_file(whole, folder / FILE)


def _whole(engine: Any, topology: Topology) -> Iterator[tuple[str, Tensor]]:
    for name, param in engine.module.named_parameters():
        if not param.requires_grad:
            continue
        value = safe_get_full_fp32_param(param)
        shard = (param.detach().float() if value is None else value).contiguous()
        tag = tag_of(param)
        if tag.partition_dim is not None and topology.tensor > 1:
            parts = [torch.empty_like(shard) for _ in range(topology.tensor)]
            dist.all_gather(parts, shard, group=MegatronMPU().get_model_parallel_group())
            shard = _merge(parts, tag)
        yield name, shard.cpu().clone()


def _merge(parts: list[Tensor], tag: ParamTag) -> Tensor:
    """Put tensor-parallel shards together; stacked matrices were cut one by one."""
    assert tag.partition_dim is not None, "only sharded parameters are merged"
    columns = zip(*(part.chunk(tag.stride, dim=tag.partition_dim) for part in parts), strict=True)
    return torch.cat([piece for column in columns for piece in column], dim=tag.partition_dim)


def load_trainable(model: nn.Module, checkpoint: Path) -> None:
    """Fill the trainable weights of `model`, which is not partitioned by ZeRO, from a checkpoint.

    Any tensor-parallel layout may read: each rank keeps its slice.

    Raises:
        ValueError: the file is not there, or its tensors are not the model's.
    """
    path = checkpoint / FILE
    if not path.is_file():
        raise ValueError(
            f"{checkpoint} has no {FILE}; give a checkpoint that this version of the code wrote."
        )
    trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
    with safe_open(path, framework="pt") as stored:
        missing, surplus = trainable.keys() - stored.keys(), stored.keys() - trainable.keys()
        if missing or surplus:
            raise ValueError(
                f"{path} does not fit the network: missing {sorted(missing)[:5]}, surplus {sorted(surplus)[:5]}."
            )
        for name, param in trainable.items():
            value = _slice(stored.get_tensor(name), tag_of(param))
            if value.shape != param.shape:
                raise ValueError(
                    f"{path}: {name} gives {tuple(value.shape)}, the network needs {tuple(param.shape)}."
                )
            with torch.no_grad():
                param.copy_(value)


def _slice(value: Tensor, tag: ParamTag) -> Tensor:
    if tag.partition_dim is None or tp_size() == 1:
        return value
    rank = MegatronMPU().get_model_parallel_rank()
    stacked = value.chunk(tag.stride, dim=tag.partition_dim)
    return torch.cat(
        [m.chunk(tp_size(), dim=tag.partition_dim)[rank] for m in stacked], dim=tag.partition_dim
    )
