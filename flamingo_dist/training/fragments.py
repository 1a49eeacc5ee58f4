"""Pieces of whole tensors, as torch.distributed.checkpoint stores and reads them in any layout.

ZeRO gives a rank a range of a flattened tensor-parallel slice. Such a range is not a box of the whole tensor, which is
what that library knows, but a few boxes: the rest of a row, whole rows, the beginning of a row. So a rank saves what
it holds without asking another, and a rank of another layout reads what it will hold.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from flamingo_dist.models.init import ParamTag

Place = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Slice:
    """How one tensor-parallel rank's slice lies in the whole tensor."""

    shape: Place
    """Shape of the slice."""
    tag: ParamTag
    """How the tensor is cut."""
    tp_rank: int
    """Place in the tensor-parallel group."""
    tp_size: int
    """Size of the tensor-parallel group."""

    @property
    def whole(self) -> Place:
        """Shape of the whole tensor."""
        dim = self.tag.partition_dim
        return tuple(n * self.tp_size if i == dim else n for i, n in enumerate(self.shape))

    def pieces(self, offsets: Place, sizes: Place) -> Iterator[tuple[Place, Place, Place]]:
        """Cut a box of the slice where stacked matrices meet.

        Yields:
            Offsets of a piece in the slice, its offsets in the whole tensor, its sizes.
        """
        dim = self.tag.partition_dim
        if dim is None or self.tp_size == 1:
            yield offsets, offsets, sizes
            return
        width = self.shape[dim] // self.tag.stride  # of each stacked matrix on this rank
        first, last = offsets[dim], offsets[dim] + sizes[dim]
        for matrix in range(first // width, -(-last // width)):
            low, high = max(first, matrix * width), min(last, (matrix + 1) * width)
            there = matrix * width * (self.tp_size - 1) + self.tp_rank * width + low
            yield _with(offsets, dim, low), _with(offsets, dim, there), _with(sizes, dim, high - low)


def boxes_of_range(shape: Place, start: int, stop: int) -> Iterator[tuple[Place, Place]]:
    """Cut the range `start ... stop` of a flattened tensor of `shape` into boxes, in the order of the range.

    Yields:
        Offsets and sizes; at most two boxes for each axis but the last, and one more.
    """
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    rest = shape[1:]
    row = math.prod(rest)
    (first, head), (last, tail) = divmod(start, row), divmod(stop, row)
    if first == last:
        yield from _in_row(first, rest, head, tail)
        return
    if head:
        yield from _in_row(first, rest, head, row)
        first += 1
    if last > first:
        yield (first, *(0 for _ in rest)), (last - first, *rest)
    yield from _in_row(last, rest, 0, tail)


def _in_row(number: int, shape: Place, start: int, stop: int) -> Iterator[tuple[Place, Place]]:
    for offsets, sizes in boxes_of_range(shape, start, stop):
        yield (number, *offsets), (1, *sizes)


def _with(values: Place, index: int, value: int) -> Place:
    return (*values[:index], value, *values[index + 1 :])


class Fragment:
    """A range of one rank's flattened slice, with its place in the whole tensor.

    The dunder methods are what torch.distributed.checkpoint asks of a sharded tensor.
    """

    def __init__(self, flat_N: Tensor, start: int, place: Slice) -> None:
        """Describe `flat_N` ([N], any dtype; not copied), which begins at element `start` of the flattened slice."""
        self.flat_N, self.start, self.place = flat_N, start, place
        self._views: dict[Place, Tensor] = {}
        done = 0
        for offsets, sizes in boxes_of_range(place.shape, start, start + flat_N.numel()):
            view = flat_N[done : done + math.prod(sizes)].view(sizes)
            done += view.numel()
            for here, there, part in place.pieces(offsets, sizes):
                piece = view
                for dim, size in enumerate(part):
                    piece = piece.narrow(dim, here[dim] - offsets[dim], size)
                self._views[there] = piece

    def size(self) -> torch.Size:
        """Return the shape of the whole tensor."""
        return torch.Size(self.place.whole)

    def like(self, flat_N: Tensor) -> "Fragment":
        """Return the fragment at the same place with other values, `flat_N` [N]."""
        return Fragment(flat_N, self.start, self.place)

    def view_at(self, offsets: Place) -> Tensor:
        """Return the box that begins at `offsets` of the whole tensor, a view of any shape into the range."""
        return self._views[tuple(offsets)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=view.size())
            for offsets, view in self._views.items()
        ]

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.flat_N.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]


def _look_up(state: Mapping[str, Any], index: MetadataIndex) -> Tensor:
    assert index.offset is not None, "fragments are found by their offset"
    fragment: Fragment = state[index.fqn]
    return fragment.view_at(index.offset)


class SaveFragments(DefaultSavePlanner):
    """Plans the saving of a flat dictionary of fragments."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Return what is to be written at `index`, a tensor of any shape."""
        return _look_up(self.state_dict, index)


class LoadFragments(DefaultLoadPlanner):
    """Plans the loading of a flat dictionary of fragments, in place."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Take the fragments as they are; the default would replace what is no tensor by None."""
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Return where what is at `index` goes, a tensor of any shape."""
        return _look_up(self.state_dict, index)
