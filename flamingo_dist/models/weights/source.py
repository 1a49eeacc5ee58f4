"""What weights are read from: named tensors, of which a slice can be had."""

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

ALL = slice(None)


class WeightSource(Protocol):
    """Stored tensors by name."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every stored tensor, by its name."""

    def read(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """Return the slice `[rows, columns]` (or `[rows]` of a vector) of the tensor `name`."""


Opening = Callable[[Callable[[], WeightSource]], WeightSource]
"""Opens a source by the given function: for this process alone, or so that one of several reads and hands on."""


def opened_here(open_source: Callable[[], WeightSource]) -> WeightSource:
    """Open a source for this process alone."""
    return open_source()


class RenamedSource:
    """A source whose names lack, or have besides, what stands before every name."""

    def __init__(self, source: WeightSource, *, stored: str, wanted: str) -> None:
        """Give the tensors of `source` whose names begin with `stored` names that begin with `wanted`."""
        self._source = source
        self._names = {
            wanted + name.removeprefix(stored) if name.startswith(stored) else name: name
            for name in source.shapes()
        }

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every stored tensor, by its new name."""
        shapes = self._source.shapes()
        return {name: shapes[old] for name, old in self._names.items()}

    def read(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """Return the slice `[rows, columns]` of the tensor with the new name `name`."""
        return self._source.read(self._names[name], rows, columns)
