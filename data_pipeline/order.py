"""The endless order of a data set: position -> (epoch, shard, sample) by arithmetic, without reading through.

The order depends on the seed, the epoch and the data set's name alone: not on ranks, readers or batch size.
So a checkpoint needs a position and nothing else, and any layout continues it exactly.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import NamedTuple

import numpy as np

_KEPT_WINDOWS = 4


def make_rng(seed: int, name: str, purpose: str, *numbers: int) -> np.random.Generator:
    """Make the generator of one purpose; the same arguments give the same draws on every machine.

    Args:
        seed: seed of the run, at least 0.
        name: name of the data set, so that two data sets on the same shards differ.
        purpose: what the draws are for, so that adding a draw for one does not move another's.
        numbers: epoch or position, at least 0.
    """
    digest = hashlib.sha256(f"{name}\0{purpose}".encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "little"), *numbers])


class Place(NamedTuple):
    """Where a position lies."""

    epoch: int
    shard: int
    """Number of the shard in the index."""
    sample: int
    """Number of the sample in its shard."""


class SampleOrder:
    """Order of the samples of one data set.

    Each epoch permutes the shards, takes them in windows of `shuffle_shards` consecutive ones, and permutes
    the samples of each window. Every sample comes once an epoch, and a reader needs the offsets of one window
    only.
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
        self._counts = np.asarray(counts, np.int64)
        self.num_samples = int(self._counts.sum())
        if self.num_samples == 0:
            raise ValueError("a data set without samples has no order; give shards that hold samples")
        self._seed, self._name, self._shuffle = seed, name, shuffle
        self._width = shuffle_shards
        self._epoch = -1
        self._shards = np.arange(len(self._counts))
        self._ends = np.cumsum(self._counts)
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def locate(self, position: int) -> Place:
        """Find the sample at a position of the endless order.

        Raises:
            ValueError: for a negative position.
        """
        if position < 0:
            raise ValueError(f"position {position}: positions begin at 0")
        epoch, offset = divmod(position, self.num_samples)
        if not self._shuffle:
            shards, ends = self._shards, self._ends
        else:
            shards, ends = self._epoch_shards(epoch)
            offset = self._shuffled(epoch, offset, ends)
        # The first shard whose end lies beyond the offset; empty shards are passed over.
        slot = int(np.searchsorted(ends, offset, side="right"))
        sample = offset - (int(ends[slot - 1]) if slot else 0)
        return Place(epoch, int(shards[slot]), sample)

    def _epoch_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Permute the shards of an epoch; also the running sum of their counts, both int64 [shards]."""
        if epoch != self._epoch:
            rng = make_rng(self._seed, self._name, "shards", epoch)
            self._shards = rng.permutation(len(self._counts))
            self._ends = np.cumsum(self._counts[self._shards])
            self._epoch = epoch
        return self._shards, self._ends

    def _shuffled(self, epoch: int, offset: int, ends: np.ndarray) -> int:
        """Move an offset to its shuffled place inside its window."""
        slot = int(np.searchsorted(ends, offset, side="right"))
        window = slot // self._width
        first = window * self._width
        start = int(ends[first - 1]) if first else 0
        stop = int(ends[min(first + self._width, len(ends)) - 1])
        if (epoch, window) not in self._windows:
            rng = make_rng(self._seed, self._name, "window", epoch, window)
            self._windows[epoch, window] = rng.permutation(stop - start)
            while len(self._windows) > _KEPT_WINDOWS:
                self._windows.popitem(last=False)
        return start + int(self._windows[epoch, window][offset - start])
