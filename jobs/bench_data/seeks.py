"""The price of a position: opening, seeking, the first batch and the state, by the number of shards."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

import numpy as np

from data_pipeline.config import DatasetConfig
from data_pipeline.dataset import DatasetStream
from data_pipeline.feed import make_state
from data_pipeline.index import ShardEntry, ShardIndex
from data_pipeline.order import SampleOrder
from data_pipeline.shards import Member, SampleRecord, encode_side, npy_bytes
from data_pipeline.storage import Storage
from data_pipeline.tokenizer import TokenizerConfig

BATCH = 32
_SEEKS = 200


class SyntheticStorage(Storage):
    """Shards that need no disk: every side file and every sample is the same few bytes."""

    def __init__(self, per_shard: int) -> None:
        """Make the side file of shards with `per_shard` samples."""
        super().__init__()
        features, text = npy_bytes(np.ones((1, 1, 8), np.float16)), b"a caption"
        self._sample = features + text
        members = {"npy": Member(0, len(features)), "txt": Member(len(features), len(text))}
        records = [SampleRecord(f"{number:08d}", members) for number in range(per_shard)]
        self._side = encode_side(records, 1 << 20)
        self.reads = 0

    def read_all(self, url: str) -> bytes:
        """Return the side file."""
        self.reads += 1
        return self._side

    def read(self, url: str, start: int, stop: int, *, size: int | None = None, version: str = "") -> bytes:
        """Return bytes of the one sample."""
        self.reads += 1
        return self._sample[start:stop]


@dataclass(frozen=True, kw_only=True)
class SeekResult:
    """What a position costs in a corpus of this size."""

    shards: int
    """Number of shards."""
    samples: int
    """Samples of an epoch."""
    position: float
    """Share of the epoch that lies before the position."""
    open_s: float
    """From a list of shards to a stream: once a run."""
    seek_us: float
    """From a fresh order to a place, microseconds, the median of many."""
    first_batch_s: float
    """First batch of a fresh stream at the position."""
    reads: int
    """Reads of the storage for that batch."""
    state_bytes: int
    """Size of the saved position."""


def measure_seek(shards: int, per_shard: int, position: float) -> SeekResult:
    """Measure one corpus size at one position of its epoch.

    Args:
        shards: number of shards.
        per_shard: samples in each.
        position: share of the epoch, 0 to 1.
    """
    storage = SyntheticStorage(per_shard)
    config = DatasetConfig(
        name="seek",
        kind="pair",
        urls=("synthetic://",),
        batch_size=BATCH,
        media="features",
        num_features=1,
        width=8,
    )
    entries = [ShardEntry(f"synthetic://corpus/{i:06d}.tar", per_shard, 1 << 20) for i in range(shards)]
    started = time.perf_counter()
    stream = DatasetStream(
        config,
        TokenizerConfig(),
        0,
        index=ShardIndex(entries, storage=storage, cache_shards=config.cache_shards),
    )
    description = {config.name: stream.describe()}
    open_s = time.perf_counter() - started
    target = int(position * (stream.num_samples - BATCH))
    started = time.perf_counter()
    assert len(stream.batch(target // BATCH).keys) == BATCH
    first_batch_s = time.perf_counter() - started
    return SeekResult(
        shards=shards,
        samples=stream.num_samples,
        position=position,
        open_s=round(open_s, 4),
        seek_us=round(1e6 * _seek_seconds(stream.index.counts, target), 1),
        first_batch_s=round(first_batch_s, 4),
        reads=storage.reads,
        state_bytes=len(json.dumps(make_state(description, target // BATCH))),
    )


def _seek_seconds(counts: np.ndarray, target: int) -> float:
    """Return the median seconds of a seek by an order that was never asked before.

    Args:
        counts: samples of each shard, int64 [shards].
        target: the position.
    """
    times = []
    for seed in range(_SEEKS):
        order = SampleOrder(counts, seed=seed, name="seek")
        started = time.perf_counter()
        order.locate(target)
        times.append(time.perf_counter() - started)
    return float(np.median(times))
