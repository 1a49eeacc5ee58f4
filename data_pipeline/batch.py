"""The batch contract of docs/architecture.md: one data set, one data-parallel rank, one step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip:
    """One bad sample, or one damaged shard."""

    key: str
    """Key of the sample, "" when the fault is the shard's."""
    shard: str
    """URL of the shard."""
    cause: str
    """Fixed name of the fault, as "corrupt image"."""
    detail: str = ""
    """What exactly was found."""
    dataset: str = ""
    """Name of the data set."""
    position: int = -1
    """Position in the endless order of the data set; -1 for a fault found while indexing."""
    fatal: bool = False
    """True when the run must stop whatever the budget."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One data set, one data-parallel rank, one step. T, M and F are constants of the data set."""

    tokens_BT: np.ndarray
    """int64 [B, T]; `<image>` is vocab_size, `<EOC>` is vocab_size + 1; right-padded."""
    loss_mask_BT: np.ndarray
    """bool [B, T]; True where token l is a target that carries loss."""
    media_index_BT: np.ndarray
    """int32 [B, T]; phi of the paper: 0 sees nothing, m in 1..M sees medium m only."""
    media: np.ndarray
    """uint8 [B, M, F, 3, H, W] pixels, or float16 [B, M, F, S, C] features; padding slots are zeros."""
    media_mask_BM: np.ndarray
    """bool [B, M]; which slots hold a real medium."""
    keys: tuple[str, ...]
    """Keys of the samples in the order of their positions, B of them, or B * pack; "" for a bad sample."""
    skips: tuple[Skip, ...] = ()
    """Bad samples met while making this batch."""
    segments_BT: np.ndarray | None = None
    """int32 [B, T] of packed rows: number of the sample that a token belongs to, from 1; 0 is padding. None where
    each row is one sample."""

    def __post_init__(self) -> None:
        B, T = self.tokens_BT.shape
        M = self.media_mask_BM.shape[1]
        wanted = {
            "tokens_BT": (self.tokens_BT, np.int64, (B, T)),
            "loss_mask_BT": (self.loss_mask_BT, np.bool_, (B, T)),
            "media_index_BT": (self.media_index_BT, np.int32, (B, T)),
            "media_mask_BM": (self.media_mask_BM, np.bool_, (B, M)),
        }
        if self.segments_BT is not None:
            wanted["segments_BT"] = (self.segments_BT, np.int32, (B, T))
        for name, (array, dtype, shape) in wanted.items():
            assert array.dtype == dtype, f"{name}: {array.dtype} instead of {dtype}"
            assert array.shape == shape, f"{name}: {array.shape} instead of {shape}"
        assert self.media.shape[:2] == (B, M), f"media: {self.media.shape}, B {B}, M {M}"
        dimensions = {np.dtype(np.uint8): 6, np.dtype(np.float16): 5}.get(self.media.dtype)
        assert self.media.ndim == dimensions, f"media: {self.media.dtype} {self.media.shape}"
        pack = 1 if self.segments_BT is None else M
        assert len(self.keys) == B * pack, f"{len(self.keys)} keys for {B} rows of {pack} samples"


def empty_batch(
    batch_size: int,
    seq_len: int,
    media_shape: tuple[int, ...],
    *,
    pixels: bool,
    pad_id: int,
    pack: int = 1,
    skips: tuple[Skip, ...] = (),
) -> Batch:
    """Make a batch whose slots are all empty: padding tokens, no loss, no media.

    Args:
        batch_size: B, rows.
        seq_len: T, tokens of a row.
        media_shape: (M, F, 3, H, W) for pixels, (M, F, S, C) for features.
        pixels: uint8 pixels, else float16 features.
        pad_id: id that fills the tokens.
        pack: samples of a row.
        skips: why the slots are empty.
    """
    return Batch(
        tokens_BT=np.full((batch_size, seq_len), pad_id, np.int64),
        loss_mask_BT=np.zeros((batch_size, seq_len), np.bool_),
        media_index_BT=np.zeros((batch_size, seq_len), np.int32),
        media=np.zeros((batch_size, *media_shape), np.uint8 if pixels else np.float16),
        media_mask_BM=np.zeros((batch_size, media_shape[0]), np.bool_),
        keys=("",) * (batch_size * pack),
        skips=skips,
        segments_BT=np.zeros((batch_size, seq_len), np.int32) if pack > 1 else None,
    )
