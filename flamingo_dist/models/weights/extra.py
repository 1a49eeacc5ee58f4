"""Where the trainable rows of `<image>` and `<EOC>` start from: published rows, read in blocks."""

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from flamingo_dist.models.lm_config import LMConfig
from flamingo_dist.models.weights.layout import embedding_piece
from flamingo_dist.models.weights.source import WeightSource

MOST_ROWS = 1 << 16
"""Rows that means are taken over; the first ones, which are the frequent ones of most vocabularies."""
BLOCK_ELEMENTS = 1 << 25
"""Elements that are held at once."""


class _Moments(NamedTuple):
    """Statistics of some rows."""

    rows: int
    mean_D: Tensor
    std_D: Tensor


def extra_start(source: WeightSource, config: LMConfig, *, head: bool) -> tuple[Tensor, float]:
    """Return start values of the trainable rows of the embedding or of the head.

    Args:
        source: the published weights.
        config: the LM; its `extra_like` names rows to start from, None is the mean row; further tokens start there too.
        head: whether the rows are the head's.

    Returns:
        fp32 [X, D], X its `extra_tokens`, and the mean over channels of the rows' standard deviation.
    """
    piece = embedding_piece(config, head=head)
    rows = min(piece.rows, MOST_ROWS)
    height = max(1, BLOCK_ELEMENTS // config.width)
    blocks = (piece.read(source, slice(top, min(top + height, rows))) for top in range(0, rows, height))
    moments = reduce(_join, (_moments(block.float()) for block in blocks))
    start = [
        moments.mean_D if like is None else piece.read(source, slice(like, like + 1))[0].float()
        for like in (*config.extra_like, *(None,) * config.further_tokens)
    ]
    return torch.stack(start), float(moments.std_D.mean())


def _moments(rows_ND: Tensor) -> _Moments:
    rows = rows_ND.shape[0]
    return _Moments(rows, rows_ND.mean(dim=0), rows_ND.std(dim=0, correction=min(1, rows - 1)))


def _join(a: _Moments, b: _Moments) -> _Moments:
    """Return the statistics of both blocks' rows (Chan's formula; deviations are of n - 1 rows)."""
    rows, apart = a.rows + b.rows, b.mean_D - a.mean_D
    within = sum((m.rows - 1) * m.std_D.square() for m in (a, b))
    between = apart.square() * (a.rows * b.rows / rows)
    return _Moments(rows, a.mean_D + apart * (b.rows / rows), ((within + between) / (rows - 1)).sqrt())
