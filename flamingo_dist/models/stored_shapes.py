"""What a file of tensors holds against what it must hold: names and shapes, before a value is read."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

Shape = Sequence[int]
SHOWN = 5
"""Names in an error message."""


class Differences(NamedTuple):
    """Names of tensors; all empty where a file holds what it must."""

    missing: list[str]
    """Wanted, not found."""
    surplus: list[str]
    """Found, not wanted."""
    misshaped: list[str]
    """Found in another shape than wanted."""


def differences(
    found: Mapping[str, Shape], wanted: Mapping[str, Shape], *, ignored: Callable[[str], bool] | None = None
) -> Differences:
    """Compare shapes by name.

    Args:
        found: of the file.
        wanted: of the network.
        ignored: whether a tensor that is not wanted may be there all the same; None for none.
    """
    surplus = sorted(found.keys() - wanted.keys())
    return Differences(
        missing=sorted(wanted.keys() - found.keys()),
        surplus=surplus if ignored is None else [name for name in surplus if not ignored(name)],
        misshaped=[n for n in wanted if n in found and tuple(found[n]) != tuple(wanted[n])],
    )


def listed(kind: str, names: Collection[str]) -> str:
    """Return `kind`, the first few names and their number; "" of none."""
    return f"{kind} {list(names)[:SHOWN]} ({len(names)} in all)" if names else ""


def complaint(found: Mapping[str, Shape], wanted: Mapping[str, Shape], apart: Differences) -> str:
    """Return what is wrong with a file in words, names and shapes included; "" of nothing."""
    shapes = [
        f"{name} has shape {tuple(found[name])} instead of {tuple(wanted[name])}" for name in apart.misshaped
    ]
    parts = [listed("missing", apart.missing), listed("surplus", apart.surplus), *shapes[:SHOWN]]
    return "; ".join(filter(None, parts))


def shortened(names: Sequence[str]) -> str:
    """Return the first few names, and how many there are beside them."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
