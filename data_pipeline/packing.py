"""Several captioned samples in one row, kept apart by a segment number for every token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipeline.formatting import TokenizedSample


def shared_limit(lengths: Sequence[int], room: int) -> int:
    """Find how long each sample of a row may be at most.

    What is too long is cut, the longest first, so that no sample is pushed out of its row: which samples share
    a row then follows from positions alone, and a resume stays exact.

    Args:
        lengths: tokens of each sample.
        room: tokens of the row.

    Returns:
        The largest limit at which all samples together fit.
    """
    rest, left = room, len(lengths)
    for length in sorted(lengths):
        if length * left > rest:
            return rest // left
        rest, left = rest - length, left - 1
    return max(lengths, default=room)


def pack_row(
    samples: Sequence[TokenizedSample | None], row_len: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Put samples of one medium each behind one another.

    Args:
        samples: the samples of the row in the order of their positions; None for a bad one, which leaves its
            medium's slot empty and takes no token.
        row_len: tokens of the row.

    Returns:
        Tokens int64 [t], loss mask bool [t], media index int32 [t] (sample i sees medium i + 1) and segment
        int32 [t] (i + 1 for the tokens of sample i), with t at most `row_len`.
    """
    limit = shared_limit([len(s.tokens_T) for s in samples if s is not None], row_len)
    tokens, loss, index, segment = [], [], [], []
    for number, sample in enumerate(samples, 1):
        if sample is None:
            continue
        tokens.append(sample.tokens_T[:limit])
        loss.append(sample.loss_mask_T[:limit])
        index.append(np.where(sample.media_index_T[:limit] > 0, number, 0))
        segment.append(np.full(len(tokens[-1]), number))
    return (
        np.concatenate(tokens or [np.zeros(0)]).astype(np.int64),
        np.concatenate(loss or [np.zeros(0)]).astype(np.bool_),
        np.concatenate(index or [np.zeros(0)]).astype(np.int32),
        np.concatenate(segment or [np.zeros(0)]).astype(np.int32),
    )
