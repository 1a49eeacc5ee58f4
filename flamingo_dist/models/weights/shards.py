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
        exchange: turns this rank's even share of a stored matrix's rows [R / TP, C] into its share of the columns
            [R, C / TP], with the group; where columns are wanted, each rank then reads one range. None reads the
            columns themselves.

    Returns:
        A tensor of shape `shape`, in the stored dtype.

    Raises:
        ValueError: the stored tensors do not give that shape.
    """
    cut = lm_layout(config).cuts[name]
    if exchange is not None and _is_scattered(cut, tp_size):
        value = _exchanged(source, cut, config, tp_rank, tp_size, exchange)
    else:
        value = _cut(source, cut, shape, config, tp_rank, tp_size)
    if value.shape != shape:
        raise ValueError(
            f"{config.weights}: parameter {name} needs shape {tuple(shape)} on tensor-parallel rank {tp_rank} "
            f"of {tp_size}, {', '.join(p.name for p in cut.pieces)} give {tuple(value.shape)}; check the LM "
            "configuration."
        )
    return value


def _is_scattered(cut: Cut, tp_size: int) -> bool:
    """Return whether a rank's part of the stored matrix are columns, and all ranks have as many rows of it."""
    piece = cut.pieces[-1]
    if piece.columns is None or cut.how not in ("rows", "columns", "heads"):
        return False
    stored_rows = piece.columns if piece.transposed else piece.rows
    return (cut.how == "columns") != piece.transposed and stored_rows % tp_size == 0


def _exchanged(
    source: WeightSource,
    cut: Cut,
    config: LMConfig,
    tp_rank: int,
    tp_size: int,
    exchange: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return the values, read as an even share of the stored rows, which `exchange` turns into columns.

    GPT-2's matrices are stored [in, out]: the columns of queries, keys and values stand side by side, and are first
    put into the order of the ranks that they are for.
    """
    first = cut.pieces[0]
    if not first.transposed:
        return exchange(first.read(source, _part(first.rows, tp_rank, tp_size)))
    assert first.columns is not None, "only matrices are scattered"
    assert {piece.name for piece in cut.pieces} == {first.name}, (
        "pieces that are stored transposed are one tensor"
    )
    rows = source.read(first.name, _part(first.columns, tp_rank, tp_size))
    parts = [rows[:, piece.first : piece.first + piece.rows].chunk(tp_size, dim=1) for piece in cut.pieces]
    ordered = [part[rank] for rank in range(tp_size) for part in parts]
    turned = exchange(rows if len(parts) == 1 else torch.cat(ordered, dim=1)).T
    sizes = [piece.rows // tp_size for piece in cut.pieces]
    return _joined(list(turned.split(sizes)), cut, config, tp_size)


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
    return _joined(
        [piece.read(source, _part(piece.rows, tp_rank, tp_size)) for piece in pieces], cut, config, tp_size
    )


def _joined(parts: list[Tensor], cut: Cut, config: LMConfig, tp_size: int) -> Tensor:
    """Return one rank's parts of the pieces, [rows / TP, columns] each, as one parameter."""
    if cut.how == "rows":
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    groups = config.num_kv_heads // tp_size
    return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)


def _part(total: int, tp_rank: int, tp_size: int) -> slice:
    size = total // tp_size
    return slice(tp_rank * size, (tp_rank + 1) * size)
