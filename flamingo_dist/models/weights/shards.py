"""One tensor-parallel rank's values of a parameter, from the slices that it needs."""

from collections.abc import Callable

import torch
from torch import Tensor

from flamingo_dist.models.lm_config import LMConfig
from flamingo_dist.models.weights.layout import Cut, lm_layout
from flamingo_dist.models.weights.source import ALL, WeightSource


def lm_shard(
    source: WeightSource,
    name: str,
    shape: torch.Size,
    config: LMConfig,
    *,
    tp_rank: int,
    tp_size: int,
    exchange: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return one tensor-parallel rank's values of the LM parameter `name`.

    Args:
        source: where the weights are.
        name: the parameter's name inside our LM, such as `layers.3.mlp.linear_fc1.weight`.
        shape: the shape of this rank's parameter.
        config: the LM's configuration.
        tp_rank: this rank in the tensor-parallel group.
        tp_size: size of the tensor-parallel group.
        exchange: turns this rank's even share of a matrix's rows [R / TP, C] into its share of the columns
            [R, C / TP], with the group; each rank then reads one range. None reads the columns themselves.

    Returns:
        A tensor of shape `shape`, in the stored dtype.

    Raises:
        ValueError: the stored tensors do not give that shape.
    """
    cut = lm_layout(config).cuts[name]
    last = cut.pieces[-1]
    rows_are_ranges = cut.how == "columns" and not last.transposed and last.rows % tp_size == 0
    if exchange is not None and rows_are_ranges:
        value = exchange(last.read(source, _part(last.rows, tp_rank, tp_size)))
    else:
        value = _cut(source, cut, shape, config, tp_rank, tp_size)
    if value.shape != shape:
        raise ValueError(
            f"{config.weights}: parameter {name} needs shape {tuple(shape)} on tensor-parallel rank {tp_rank} "
            f"of {tp_size}, {', '.join(p.name for p in cut.pieces)} give {tuple(value.shape)}; check the LM "
            "configuration."
        )
    return value


def _cut(
    source: WeightSource, cut: Cut, shape: torch.Size, config: LMConfig, tp_rank: int, tp_size: int
) -> Tensor:
    """Return the values, whatever shape the stored tensors give."""
    pieces = cut.pieces
    if cut.how == "whole":
        return pieces[0].read(source, ALL)
    if cut.how == "columns":
        (piece,) = pieces
        assert piece.columns is not None, "only matrices are cut by columns"
        return piece.read(source, ALL, _part(piece.columns, tp_rank, tp_size))
    if cut.how == "vocabulary":
        start = tp_rank * shape[0]
        value = pieces[0].read(source, slice(start, start + shape[0]))
        short = shape[0] - value.shape[0]
        return torch.nn.functional.pad(value, (0, 0, 0, short)) if short > 0 else value
    parts = [piece.read(source, _part(piece.rows, tp_rank, tp_size)) for piece in pieces]
    if cut.how == "rows":
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    groups = config.num_kv_heads // tp_size
    return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)


def _part(total: int, tp_rank: int, tp_size: int) -> slice:
    size = total // tp_size
    return slice(tp_rank * size, (tp_rank + 1) * size)
