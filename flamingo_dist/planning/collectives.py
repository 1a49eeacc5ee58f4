"""Collectives as torch.distributed's dispatcher sees them: of whom, of what, how many bytes."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Group = Literal["tensor", "data", "world"]
CONTROL_ELEMENTS = 16
"""Elements up to which a sum is a matter of control: a norm, the losses of a step."""


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One kind of collective of a rank."""

    operation: str
    """all_reduce, all_gather, reduce_scatter, broadcast or reduce."""
    purpose: str
    """A kind of `planning.traffic`, or "control" for counts, flags and norms."""
    group: Group
    """Whose ranks take part."""
    ranks: int
    """How many."""
    dtype: str
    """Of the elements."""


@dataclass(kw_only=True)
class Volume:
    """What was sent in collectives of a kind."""

    calls: float = 0
    """How many; one gather of frozen and trainable weights counts in shares."""
    payload_bytes: float = 0.0
    """The whole tensor of each: what is summed, gathered or scattered."""
    wire_bytes: float = 0.0
    """What a rank sends to its neighbour in a ring."""


Totals = dict[Collective, Volume]


def _sum_first(args: tuple[Any, ...]) -> list[Tensor]:
    return list(args[0])


# Operation by name: what it is called here, its whole tensors, and the place of the group among its arguments.
OPERATIONS: dict[str, tuple[str, Callable[[tuple[Any, ...]], list[Tensor]], int]] = {
    "c10d::allreduce_": ("all_reduce", _sum_first, 1),
    "c10d::allreduce_coalesced_": ("all_reduce", _sum_first, 1),
    "c10d::broadcast_": ("broadcast", _sum_first, 1),
    "c10d::reduce_": ("reduce", _sum_first, 1),
    "c10d::allgather_": ("all_gather", lambda args: [t for part in args[0] for t in part], 2),
    "c10d::_allgather_base_": ("all_gather", lambda args: [args[0]], 2),
    "c10d::allgather_into_tensor_coalesced_": ("all_gather", _sum_first, 2),
    "c10d::reduce_scatter_": ("reduce_scatter", lambda args: [t for part in args[1] for t in part], 2),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", lambda args: [args[1]], 2),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce_scatter", lambda args: list(args[1]), 2),
}
SILENT = ("c10d::barrier", "c10d::monitored_barrier_")


def payload(func: Any, args: tuple[Any, ...]) -> tuple[str, list[Tensor], Any] | None:
    """Return the operation, its whole tensors and its group; None where `func` sends nothing.

    Raises:
        NotImplementedError: a collective that has no entry here, so that none goes uncounted.
    """
    name = func._schema.name
    if not name.startswith("c10d::") or name in SILENT:
        return None
    if name not in OPERATIONS:
        raise NotImplementedError(f"{name} is not counted: enter it in planning.collectives.OPERATIONS.")
    operation, tensors, place = OPERATIONS[name]
    return operation, tensors(args), torch.distributed.ProcessGroup.unbox(args[place])


def wire_share(operation: str, ranks: int) -> float:
    """Return the share of the payload that a rank sends in a ring."""
    if ranks == 1:
        return 0.0
    return (2.0 if operation == "all_reduce" else 1.0) * (ranks - 1) / ranks


def by_purpose(totals: Totals) -> dict[str, Volume]:
    """Return the volumes summed by purpose."""
    sums: dict[str, Volume] = defaultdict(Volume)
    for kind, volume in totals.items():
        add(sums[kind.purpose], volume)
    return dict(sums)


def add(target: Volume, volume: Volume) -> None:
    """Add `volume` to `target`."""
    target.calls += volume.calls
    target.payload_bytes += volume.payload_bytes
    target.wire_bytes += volume.wire_bytes


def size_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors' elements, whatever their shapes."""
    return sum(t.numel() * t.element_size() for t in tensors)
