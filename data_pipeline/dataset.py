"""The stream of one data set: a batch is a pure function of (configuration, seed, step, rank)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from data_pipeline.batch import Batch, Skip
from data_pipeline.config import DatasetConfig
from data_pipeline.errors import BadSampleError
from data_pipeline.index import ShardIndex, open_index
from data_pipeline.order import ORDER_VERSION, SampleOrder, make_rng
from data_pipeline.packing import pack_row
from data_pipeline.reading import SampleReader
from data_pipeline.samples import LoadedSample, SampleLoader
from data_pipeline.tokenizer import Tokenizer, TokenizerConfig

__all__ = ["DatasetConfig", "DatasetStream"]


class DatasetStream:
    """Batches of one data set at any step, for any rank; holds caches but no position."""

    def __init__(
        self,
        config: DatasetConfig,
        tokenizer: Tokenizer | TokenizerConfig,
        seed: int,
        *,
        index: ShardIndex | None = None,
    ) -> None:
        """Open the data set.

        Args:
            config: the data set.
            tokenizer: the language model's tokenizer, or where to load it from.
            seed: seed of the run, at least 0.
            index: index of the shards when it is already at hand; else it is opened from `config.urls`.

        Raises:
            MissingShardError: when shards are missing.
            ValueError: when no sample is found.
        """
        if seed < 0:
            raise ValueError(f"seed {seed}: must be at least 0")
        self.config, self.seed = config, seed
        self.index = index or open_index(
            config.urls, cache_shards=config.cache_shards, storage=config.storage()
        )
        self.tokenizer = tokenizer.load() if isinstance(tokenizer, TokenizerConfig) else tokenizer
        self.order = SampleOrder(
            self.index.counts,
            seed=seed,
            name=config.name,
            shuffle=config.shuffle and config.mode == "train",
            shuffle_shards=config.shuffle_shards,
        )
        self._loader = SampleLoader(config, self.tokenizer, seed)
        self._threads = ThreadPoolExecutor(config.threads) if config.threads > 1 else None

    @property
    def num_samples(self) -> int:
        """Samples of one epoch."""
        return self.order.num_samples

    def positions(self, step: int, dp_rank: int = 0, dp_size: int = 1) -> range:
        """Positions of one rank's samples in one step (docs/architecture.md, "position").

        Raises:
            ValueError: when the batch does not divide, or the rank is none of the ranks.
        """
        local = self.config.local_batch_size(dp_size)
        if not 0 <= dp_rank < dp_size or step < 0:
            raise ValueError(f"step {step}, dp_rank {dp_rank} of {dp_size}: no such step or rank")
        first = step * self.config.batch_size + dp_rank * local
        return range(first, first + local)

    def batch(self, step: int, dp_rank: int = 0, dp_size: int = 1) -> Batch:
        """Make the batch of one data-parallel rank in one step; a bad sample empties its slot.

        Args:
            step: number of the step, from 0.
            dp_rank: data-parallel rank.
            dp_size: number of data-parallel ranks.

        Returns:
            A batch of batch_size / dp_size samples, right-padded to the data set's T, M, F.

        Raises:
            ValueError: when the batch does not divide among the ranks.
        """
        positions = self.positions(step, dp_rank, dp_size)
        pixels = self.config.media == "pixels"
        rows = len(positions) // self.config.pack
        media = np.zeros((rows, *self.config.media_shape), np.uint8 if pixels else np.float16)
        # Each sample decodes into its own slots: no copy, and no two threads write to one place.
        slots = media.reshape(len(positions), self.config.max_media, *media.shape[2:])
        # Order and offsets sit in caches that threads must not share; fetching and decoding may.
        jobs = [self._job(position, slot) for position, slot in zip(positions, slots, strict=True)]
        mapped = self._threads.map if self._threads else map
        return self._assemble(list(mapped(lambda job: job(), jobs)), media)

    def describe(self) -> dict[str, Any]:
        """Return what must be the same for a saved position to be continued, as plain JSON values."""
        return {
            "seed": self.seed,
            "samples": self.num_samples,
            "shards": self.index.fingerprint,
            "evidence": self.index.entries.evidence(),
            "tokenizer": self.tokenizer.fingerprint,
            "order": ORDER_VERSION,
            "random_numbers": _rng_fingerprint(),
            "settings": self.config.settings(),
        }

    def _job(self, position: int, slots: np.ndarray) -> Callable[[], LoadedSample | Skip]:
        """Prepare the loading of one sample; `slots` is uint8 [M, F, 3, H, W] or float16 [M, F, S, C]."""
        place = self.order.locate(position)
        entry = self.index.entries[place.shard]
        url = entry.url
        try:
            record = self.index.records(place.shard)[place.sample]
        except (OSError, ValueError, IndexError) as error:
            vanished = isinstance(error, FileNotFoundError)
            cause = "missing shard" if vanished else "unreadable shard"
            detail = f"offsets of {url}{' vanished' * vanished}: {type(error).__name__}: {error}"[:300]
            skip = self._skip(BadSampleError(cause, detail, fatal=True), "", url, position)
            return lambda: skip

        def load() -> LoadedSample | Skip:
            try:
                reader = SampleReader(
                    url,
                    record,
                    max_bytes=self.config.max_bytes,
                    storage=self.index.storage,
                    shard_bytes=entry.size,
                    version=entry.version,
                )
                return self._loader.load(reader, position, slots)
            except BadSampleError as error:
                slots[:] = 0  # a bad sample leaves no picture behind
                return self._skip(error, record.key, url, position)

        return load

    def _skip(self, error: BadSampleError, key: str, url: str, position: int) -> Skip:
        """Describe a bad sample."""
        return Skip(
            key=key,
            shard=url,
            cause=error.cause,
            detail=error.detail,
            dataset=self.config.name,
            position=position,
            fatal=error.fatal,
        )

    def _assemble(self, samples: list[LoadedSample | Skip], media: np.ndarray) -> Batch:
        """Put samples into the rows of a batch, `pack` of them into each; their media are in [B, M, ...] already."""
        config, pack = self.config, self.config.pack
        B, T = len(samples) // pack, config.tokens_per_row
        tokens_BT = np.full((B, T), self.tokenizer.pad_id, np.int64)
        loss_mask_BT = np.zeros((B, T), np.bool_)
        media_index_BT = np.zeros((B, T), np.int32)
        segments_BT = np.zeros((B, T), np.int32)
        media_mask_BM = np.zeros(media.shape[:2], np.bool_)
        for b in range(B):
            row = [None if isinstance(s, Skip) else s for s in samples[b * pack : (b + 1) * pack]]
            if pack == 1 and row[0] is not None:
                text = row[0].text
                parts = (
                    text.tokens_T,
                    text.loss_mask_T,
                    text.media_index_T,
                    np.ones_like(text.media_index_T),
                )
            else:
                parts = pack_row([None if s is None else s.text for s in row], T)
            arrays: tuple[np.ndarray, ...] = (tokens_BT, loss_mask_BT, media_index_BT, segments_BT)
            for array, part in zip(arrays, parts, strict=True):
                array[b, : len(part)] = part
            for number, sample in enumerate(row):
                if sample is not None:
                    media_mask_BM[b, number : number + len(sample.text.media)] = True
        return Batch(
            tokens_BT=tokens_BT,
            loss_mask_BT=loss_mask_BT,
            media_index_BT=media_index_BT,
            media=media,
            media_mask_BM=media_mask_BM,
            keys=tuple("" if isinstance(s, Skip) else s.key for s in samples),
            skips=tuple(s for s in samples if isinstance(s, Skip)),
            segments_BT=segments_BT if pack > 1 else None,
        )


def _rng_fingerprint() -> str:
    """Hash a few draws: numpy may change its streams between versions, which would change every order."""
    rng = make_rng(0, "fingerprint", "probe")
    draws = (rng.permutation(64).tolist(), rng.integers(1000, size=8).tolist(), rng.random(4).tolist())
    return hashlib.sha256(repr(draws).encode()).hexdigest()[:16]
