"""How positions enter the frozen LM: rotary angles, relative sinusoids, ALiBi's slopes, a learned table.

Relative and ALiBi biases depend on the distance of two tokens alone. In packed rows a sample's tokens are
neighbours, so distances in the row are distances in the sample; rotary and learned positions begin anew.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flamingo_dist.models.init import tag
from flamingo_dist.models.lm_config import LMConfig, RopeScaling


def rotary_angles(positions: Tensor, config: LMConfig) -> Tensor:
    """Return the rotary angles of positions of any shape [N].

    Returns:
        fp32 [N, K], half-split layout (angles repeated, as Hugging Face LLaMA has them).
    """
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    inverse = 1.0 / (config.rope_base ** (exponents / config.head_dim))
    if config.rope_scaling.factor != 1:
        inverse = _stretch(inverse, config.rope_scaling)
    angles = positions.float()[..., None] * inverse
    return torch.cat([angles, angles], dim=-1)


def _stretch(inverse: Tensor, scaling: RopeScaling) -> Tensor:
    """Return LLaMA-3's frequencies [K / 2]: fast ones as they are, slow ones divided, blended between."""
    turns = scaling.original_positions * inverse / (2 * math.pi)
    kept = ((turns - scaling.low_freq) / (scaling.high_freq - scaling.low_freq)).clamp(0, 1)
    return inverse * (kept + (1 - kept) / scaling.factor)


def distance_sinusoids(length: int, width: int, *, device: torch.device) -> Tensor:
    """Return Transformer-XL's encodings of the distances 0 ... length - 1 (Dai et al. 2019, section 3.3).

    Returns:
        fp32 [length, D]: sines, then cosines.
    """
    exponents = torch.arange(0, width, 2, device=device, dtype=torch.float32)
    distances = torch.arange(length, device=device, dtype=torch.float32)
    angles = distances[:, None] / (10000.0 ** (exponents / width))
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def shift_distances(scores_BHTS: Tensor) -> Tensor:
    """Turn scores by distance into scores by key (Dai et al. 2019, appendix B).

    Args:
        scores_BHTS: [B, H, T, S] floating; the T queries are the last of S tokens, and column c is the distance
            S - 1 - c.

    Returns:
        [B, H, T, S]: column j is the key j. Keys after the query get values that mean nothing.
    """
    batch, heads, queries, keys = scores_BHTS.shape
    # One column more makes each row of the flat tensor begin one place later than the row above.
    padded = F.pad(scores_BHTS, (1, 0)).view(batch, heads, keys + 1, queries)
    return padded[:, :, 1:].reshape(batch, heads, queries, keys)


def alibi_slopes(heads: int, largest: float) -> Tensor:
    """Return ALiBi's slopes of all heads, fp32 [H], as MPT orders them.

    Args:
        heads: H; between powers of two, every second slope of the next power is taken first.
        largest: minus the binary logarithm of the flattest slope.
    """
    power = 2 ** math.ceil(math.log2(heads))
    slopes = 2.0 ** (-torch.arange(1, power + 1, dtype=torch.float32) * (largest / power))
    return slopes if power == heads else torch.cat([slopes[1::2], slopes[::2]])[:heads]


def alibi_bias(slopes_H: Tensor, length: int, total: int) -> Tensor:
    """Return what ALiBi adds to the scores of the last `length` of `total` tokens.

    Args:
        slopes_H: slopes of this rank's heads, floating [H].
        length: T, queries.
        total: S, keys.

    Returns:
        [1, H, T, S], the slope times minus the distance, in the dtype of `slopes_H`.
    """
    queries = torch.arange(total - length, total, device=slopes_H.device)
    keys = torch.arange(total, device=slopes_H.device)
    distance_TS = (queries[:, None] - keys).clamp(min=0)
    return (-slopes_H[:, None, None] * distance_TS)[None]


class PositionTable(nn.Module):
    """Learned positions, whole on every tensor-parallel rank."""

    def __init__(self, config: LMConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.longest, self.offset = config.max_positions, config.position_offset
        self.weight = tag(nn.Parameter(torch.empty(config.table_rows, config.width, dtype=dtype)), std=0.02)

    def forward(self, positions: Tensor, longest: int) -> Tensor:
        """Look positions up.

        Args:
            positions: int64 of any shape [N], from 0.
            longest: a bound that no position reaches.

        Returns:
            [N, D] in the dtype of the table.

        Raises:
            ValueError: the table is shorter than `longest`.
        """
        if longest > self.longest:
            raise ValueError(
                f"a text of {longest} tokens needs more learned positions than the {self.longest} of "
                "lm.max_positions; use shorter rows or an LM without a table."
            )
        return F.embedding(positions + self.offset, self.weight)


def segment_mask(segments_BT: Tensor) -> Tensor:
    """Return who may attend to whom in packed rows: earlier tokens of the same segment, and oneself.

    Args:
        segments_BT: integer [B, T].

    Returns:
        bool [B, 1, T, T], rows are queries.
    """
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    return same_BTT.tril()[:, None]


def segment_positions(segments_BT: Tensor) -> Tensor:
    """Return the position of each token in its own segment.

    Args:
        segments_BT: integer [B, T]; a segment is a run of equal numbers.

    Returns:
        int64 [B, T], from 0.
    """
    places_T = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    begins_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    begins_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    starts_BT = torch.where(begins_BT, places_T, 0).cummax(dim=1).values
    return places_T - starts_BT
