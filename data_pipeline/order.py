"""The endless order of a data set: position -> (epoch, shard, sample) by arithmetic, without reading through.

The order depends on the seed, the epoch and the data set's name alone: not on ranks, readers or batch size.
So a checkpoint needs a position and nothing else, and any layout continues it exactly.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from functools import cache
from typing import NamedTuple

import numpy as np

from data_pipeline.permutation import Permutation

ORDER_VERSION = 2
"""Part of every saved position; raise it when the same seed would give another order."""
_KEPT_WINDOWS = 4
_KEPT_EPOCHS = 2


def make_rng(seed: int, name: str, purpose: str, *numbers: int) -> np.random.Generator:
    """Make the generator of one purpose; the same arguments give the same draws on every machine.

    Args:
        seed: seed of the run, at least 0.
        name: name of the data set, so that two data sets on the same shards differ.
        purpose: what the draws are for, so that adding a draw for one does not move another's.
        numbers: epoch or position, at least 0.
    """
    return np.random.default_rng([seed, _digest(name, purpose), *numbers])


@cache
def _digest(name: str, purpose: str) -> int:
    """Hash a data set's name and a purpose to 64 bits."""
    return int.from_bytes(hashlib.sha256(f"{name}\0{purpose}".encode()).digest()[:8], "little")


class Place(NamedTuple):
    """Where a position lies."""

    epoch: int
    shard: int
    """Number of the shard in the index."""
    sample: int
    """Number of the sample in its shard."""


class SampleOrder:
    """Order of the samples of one data set.

    The samples, in the order of their shards, are cut into blocks of as many as the median shard holds: of a
    corpus with even shards, each block is a shard. Each epoch permutes the blocks (the short last one stands at
    a random place), takes them in windows of `shuffle_shards`, and permutes the samples of each window. Every
    sample comes once an epoch, and a reader needs the offsets of a few shards only.

    Nothing is listed: a position is located by arithmetic, two computed permutations and one binary search in
    the shards' running counts. So it costs the same at the start and the end of an epoch, and with 10 shards
    or 100,000.
    """

    def __init__(
        self, counts: np.ndarray, *, seed: int, name: str, shuffle: bool = True, shuffle_shards: int = 8
    ) -> None:
        """Prepare the order.

        Args:
            counts: samples of each shard, int64 [shards].
            seed: seed of the run.
            name: name of the data set.
            shuffle: False keeps the order of the shards in every epoch (evaluation).
            shuffle_shards: shards whose samples are mixed with one another.

        Raises:
            ValueError: when there is no sample.
        """
        counts = np.asarray(counts, np.int64)
        self._ends = np.cumsum(counts)
        self.num_samples = int(self._ends[-1]) if len(counts) else 0
        if self.num_samples == 0:
            raise ValueError("a data set without samples has no order; give shards that hold samples")
        self._seed, self._name, self._shuffle = seed, name, shuffle
        self._width = shuffle_shards
        self._block = max(1, int(np.median(counts[counts > 0])))
        self._full, self._tail = divmod(self.num_samples, self._block)
        self._epochs: OrderedDict[int, tuple[Permutation, int]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], Permutation] = OrderedDict()

    def locate(self, position: int) -> Place:
        """Find the sample at a position of the endless order.

        Raises:
            ValueError: for a negative position.
        """
        if position < 0:
            raise ValueError(f"position {position}: positions begin at 0")
        epoch, offset = divmod(position, self.num_samples)
        if self._shuffle:
            offset = self._shuffled(epoch, offset)
        # The first shard whose end lies beyond the offset; empty shards are passed over.
        shard = int(np.searchsorted(self._ends, offset, side="right"))
        sample = offset - (int(self._ends[shard - 1]) if shard else 0)
        return Place(epoch, shard, sample)

    def _shuffled(self, epoch: int, offset: int) -> int:
        """Move an offset of an epoch to its shuffled place."""
        blocks, tail_slot = self._epoch(epoch)
        window = self._slot(offset, tail_slot)[0] // self._width
        first = window * self._width
        start = self._start(first, tail_slot)
        stop = min(self._start(first + self._width, tail_slot), self.num_samples)
        slot, inside = self._slot(
            start + self._window(epoch, window, stop - start)(offset - start), tail_slot
        )
        if slot == tail_slot:
            return self._full * self._block + inside
        return blocks(slot - (slot > tail_slot)) * self._block + inside

    def _slot(self, offset: int, tail_slot: int) -> tuple[int, int]:
        """Find which block of an epoch an offset falls into, and where inside it."""
        tail_start = tail_slot * self._block
        if offset < tail_start:
            return divmod(offset, self._block)
        if offset < tail_start + self._tail:
            return tail_slot, offset - tail_start
        slot, inside = divmod(offset - self._tail, self._block)
        return slot + 1, inside

    def _start(self, slot: int, tail_slot: int) -> int:
        """Return the first offset of a block of an epoch."""
        return slot * self._block if slot <= tail_slot else (slot - 1) * self._block + self._tail

    def _epoch(self, epoch: int) -> tuple[Permutation, int]:
        """Return the permutation of an epoch's full blocks, and the slot of the short one."""
        if epoch not in self._epochs:
            rng = make_rng(self._seed, self._name, "blocks", epoch)
            tail_slot = int(rng.integers(self._full + 1)) if self._tail else self._full
            self._epochs[epoch] = (Permutation(self._full, rng), tail_slot)
            while len(self._epochs) > _KEPT_EPOCHS:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _window(self, epoch: int, window: int, length: int) -> Permutation:
        """Return the permutation of the samples of a window."""
        if (epoch, window) not in self._windows:
            rng = make_rng(self._seed, self._name, "window", epoch, window)
            self._windows[epoch, window] = Permutation(length, rng)
            while len(self._windows) > _KEPT_WINDOWS:
                self._windows.popitem(last=False)
        return self._windows[epoch, window]
