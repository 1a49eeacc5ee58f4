"""How our parameters and another layout's tensors stand for each other, in both directions.

Every tensor of both sides is in exactly one rule, so what is missing, surplus or of another shape is known before a
value is read.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flamingo_dist.models.stored_shapes import complaint, differences

Shapes = Mapping[str, Sequence[int]]


class TensorSource(Protocol):
    """Tensors by name."""

    @property
    def where(self) -> str:
        """What errors call the source."""
        ...

    def shapes(self) -> Shapes:
        """Return the shape of every tensor."""
        ...

    def read(self, name: str) -> Tensor:
        """Return a tensor, of any shape."""
        ...


def _same(tensors: Sequence[Tensor]) -> list[Tensor]:
    return list(tensors)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A few parameters of ours and the tensors of the other layout that hold the same values."""

    ours: tuple[str, ...]
    """Names of our parameters, whole (not cut by tensor parallelism)."""
    theirs: tuple[str, ...]
    """Names of their tensors."""
    to_ours: Callable[[Sequence[Tensor]], list[Tensor]] = _same
    """Gives our parameters from their tensors."""
    to_theirs: Callable[[Sequence[Tensor]], list[Tensor]] = _same
    """Gives their tensors from our parameters; also on the meta device, where it says their shapes."""


def same(ours: str, theirs: str) -> Rule:
    """Return the rule of a tensor that is the same on both sides."""
    return Rule(ours=(ours,), theirs=(theirs,))


def absent(ours: str, shape: Sequence[int]) -> Rule:
    """Return the rule of a parameter of ours that the other layout lacks, which acts as if it were zero."""

    def refuse(tensors: Sequence[Tensor]) -> list[Tensor]:
        if not tensors[0].is_meta and tensors[0].any():
            raise ValueError(f"{ours} is not zero, and the other layout has nothing like it.")
        return []

    return Rule(ours=(ours,), theirs=(), to_ours=lambda _: [torch.zeros(*shape)], to_theirs=refuse)


def stacked(ours: tuple[str, ...], theirs: str) -> Rule:
    """Return the rule of equally large parameters of ours that stand one below the other in their tensor."""
    return Rule(
        ours=ours,
        theirs=(theirs,),
        to_ours=lambda t: [part.clone() for part in t[0].chunk(len(ours))],
        to_theirs=lambda t: [torch.cat(list(t))],
    )


def their_shapes(rules: Sequence[Rule], our_shapes: Shapes) -> dict[str, torch.Size]:
    """Return the shapes that their tensors must have.

    Args:
        rules: the correspondence.
        our_shapes: shapes of all our whole parameters.

    Raises:
        ValueError: a parameter of ours is in no rule, or a rule is about none of ours.
    """
    known = [name for rule in rules for name in rule.ours]
    assert len(known) == len(set(known)), "a parameter is in two rules"
    strangers = sorted(our_shapes.keys() ^ set(known))
    if strangers:
        raise ValueError(f"no correspondence is known for {strangers[:5]} ({len(strangers)} in all).")
    shapes = {}
    for rule in rules:
        meta = [torch.empty(our_shapes[name], device="meta") for name in rule.ours]
        for name, tensor in zip(rule.theirs, rule.to_theirs(meta), strict=True):
            shapes[name] = tensor.shape
    return shapes


def check_tensors(found: Shapes, wanted: Shapes, where: str, *, ignored: Collection[str] = ()) -> None:
    """Compare the tensors that a source has with those it must have.

    Args:
        found: shapes by name.
        wanted: shapes by name.
        where: the source, for the error.
        ignored: names that may be there.

    Raises:
        ValueError: naming what is missing, surplus or of another shape.
    """
    apart = differences(found, wanted, ignored=set(ignored).__contains__)
    if any(apart):
        raise ValueError(f"{where} does not hold this network: {complaint(found, wanted, apart)}.")


def read_ours(rules: Sequence[Rule], source: TensorSource) -> Iterator[tuple[str, Tensor]]:
    """Yield our parameters, of any shape, by name from their tensors; each is read when its turn comes."""
    for rule in rules:
        yield from zip(rule.ours, rule.to_ours([source.read(name) for name in rule.theirs]), strict=True)


def read_theirs(rules: Sequence[Rule], read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield their tensors by name from our parameters, which `read` gives by name."""
    for rule in rules:
        yield from zip(rule.theirs, rule.to_theirs([read(name) for name in rule.ours]), strict=True)
