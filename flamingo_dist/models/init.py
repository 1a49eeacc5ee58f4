"""Initialisation that does not depend on the layout.

Parameters are tagged when they are made and filled later, each from a generator seeded by the run's seed
and the parameter's name: the full tensor is drawn and each tensor-parallel rank keeps its slice. The same
seed therefore gives the same network under every tensor-parallel, data-parallel and ZeRO layout.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class ParamTag:
    """How a parameter is filled and how tensor parallelism cuts it."""

    std: float | None = None
    """Standard deviation of a normal draw with mean 0; None for a constant."""
    value: float = 0.0
    """The constant, where `std` is None."""
    partition_dim: int | None = None
    """The dimension that tensor parallelism slices evenly; None if every rank holds the whole tensor."""
    stride: int = 1
    """Matrices stacked along `partition_dim`, each sliced on its own (2 for Megatron's gate and up)."""


def tag(
    param: nn.Parameter,
    *,
    std: float | None = None,
    value: float = 0.0,
    partition_dim: int | None = None,
    stride: int = 1,
) -> nn.Parameter:
    """Attach a `ParamTag` to `param` and Megatron's own marks, and return `param`.

    Megatron's `tensor_model_parallel` mark is what DeepSpeed reads to count a sharded parameter on every
    tensor-parallel rank, and a replicated one once, in the global gradient norm.
    """
    tagged = ParamTag(std=std, value=value, partition_dim=partition_dim, stride=stride)
    param.flamingo_tag = tagged  # type: ignore[attr-defined]
    param.tensor_model_parallel = partition_dim is not None  # type: ignore[attr-defined]
    param.partition_dim = -1 if partition_dim is None else partition_dim  # type: ignore[attr-defined]
    param.partition_stride = stride  # type: ignore[attr-defined]
    return param


def tag_of(param: nn.Parameter) -> ParamTag:
    """Return the tag of `param`.

    Raises:
        RuntimeError: it has none: it was made without `tag`.
    """
    found = getattr(param, "flamingo_tag", None)
    if not isinstance(found, ParamTag):
        raise RuntimeError("a parameter has no tag; make it through flamingo_dist.models.init.tag.")
    return found


def draw(
    name: str, param_tag: ParamTag, shard_shape: torch.Size, *, seed: int, tp_rank: int, tp_size: int
) -> Tensor:
    """Return the fp32 values of one tensor-parallel rank's shard of the parameter `name`.

    Args:
        name: the parameter's full name in the network; the generator's seed depends on it.
        param_tag: how the parameter is filled and cut.
        shard_shape: shape of this rank's shard.
        seed: the run's seed.
        tp_rank: this rank in the tensor-parallel group.
        tp_size: size of the tensor-parallel group.

    Returns:
        fp32 tensor of shape `shard_shape` on the CPU.
    """
    if param_tag.std is None:
        return torch.full(shard_shape, param_tag.value)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    full_shape = list(shard_shape)
    dim = param_tag.partition_dim
    if dim is not None:
        full_shape[dim] *= tp_size
    full = torch.randn(full_shape, generator=generator) * param_tag.std
    if dim is None:
        return full
    stacked = full.chunk(param_tag.stride, dim=dim)
    return torch.cat([matrix.chunk(tp_size, dim=dim)[tp_rank] for matrix in stacked], dim=dim)


def initialize_(module: nn.Module, seed: int, tp_rank: int = 0, tp_size: int = 1) -> None:
    """Fill every parameter of `module` in place, from its tag, its name within `module` and `seed` alone.

    Args:
        module: the network; its parameters must be whole on this rank but for the tensor-parallel cut (under
            ZeRO-3, gather first or use `draw`).
        seed: the run's seed.
        tp_rank: this rank in the tensor-parallel group.
        tp_size: size of the tensor-parallel group.

    Raises:
        ValueError: a parameter has no tag, or holds no elements because ZeRO-3 has partitioned it.
    """
    named = list(module.named_parameters())
    untagged = [name for name, param in named if not hasattr(param, "flamingo_tag")]
    if untagged:
        raise ValueError(
            f"{len(untagged)} parameters have no initialisation tag: {', '.join(untagged)}. Pass each "
            "through flamingo_dist.models.init.tag where it is made."
        )
    empty = [name for name, param in named if param.numel() == 0]
    if empty:
        raise ValueError(
            f"{len(empty)} parameters hold no elements: {', '.join(empty)}. Gather them "
            "(deepspeed.zero.GatheredParameters) before filling."
        )
    with torch.no_grad():
        for name, param in named:
            param_tag: ParamTag = param.flamingo_tag  # type: ignore[attr-defined]
            param.copy_(draw(name, param_tag, param.shape, seed=seed, tp_rank=tp_rank, tp_size=tp_size))
