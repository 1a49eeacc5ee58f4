"""One data set's batch on one rank, as tensors."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flamingo_dist.models.vocabulary import IGNORE


@dataclass(frozen=True, kw_only=True)
class TrainBatch:
    """Tensors of one data set's batch on one data-parallel rank; equal on all its tensor-parallel peers."""

    tokens_BT: Tensor
    """int64 [B, T], right-padded."""
    loss_mask_BT: Tensor
    """bool [B, T]: which tokens carry loss when they are predicted; False at position 0."""
    media_index_BT: Tensor
    """int32 [B, T]: the one medium that a token sees, 0 for none."""
    media: Tensor
    """uint8 [B, M, F, 3, H, W] pixels or [B, M, F, S, C] encoder features."""
    media_mask_BM: Tensor
    """bool [B, M]: which media are real."""
    segments_BT: Tensor | None = None
    """int32 [B, T] of packed rows: which of the row's M samples, of one medium each, a token belongs to, from 1; 0
    is padding. None where each row is one sample."""

    def targets(self) -> Tensor:
        """Return int64 [B, T]: the next token where it carries loss, -100 elsewhere."""
        targets = self.tokens_BT.roll(-1, dims=1)
        wanted = self.loss_mask_BT.roll(-1, dims=1)
        wanted[:, -1] = False
        return targets.masked_fill(~wanted, IGNORE)

    def split(self, rows: int) -> list["TrainBatch"]:
        """Return the batch in parts of at most `rows` rows, [rows, ...] each, in order; whole where `rows` is 0.

        Every rank has as many rows and so as many parts, whatever they hold.
        """
        if not 0 < rows < len(self.tokens_BT):
            return [self]
        parts = {
            name: [None] * -(-len(self.tokens_BT) // rows) if value is None else value.split(rows)
            for name, value in vars(self).items()
        }
        return [
            replace(self, **dict(zip(parts, values, strict=True)))
            for values in zip(*parts.values(), strict=True)
        ]

    def num_sequences(self) -> int:
        """Return how many sequences there are, empty ones included."""
        return self.media_mask_BM.shape[0] if self.segments_BT is None else self.media_mask_BM.numel()

    def num_loss_tokens(self) -> int:
        """Return how many tokens carry loss."""
        return int(self.loss_mask_BT.sum())

    def num_media(self) -> int:
        """Return how many media there are."""
        return int(self.media_mask_BM.sum())

    def num_tokens(self) -> int:
        """Return how many text tokens there are up to the last of each row that carries loss."""
        positions = torch.arange(1, self.tokens_BT.shape[1] + 1, device=self.tokens_BT.device)
        return int((positions * self.loss_mask_BT).amax(dim=1).sum())

    def pinned(self) -> "TrainBatch":
        """Return the batch in page-locked memory, from which a GPU copies without waiting."""
        held: dict[str, Any] = {
            name: None if value is None else value.pin_memory() for name, value in vars(self).items()
        }
        return replace(self, **held)

    def to(self, device: torch.device) -> "TrainBatch":
        """Return the batch on `device`."""
        moved: dict[str, Any] = {
            name: None if value is None else value.to(device, non_blocking=True)
            for name, value in vars(self).items()
        }
        return replace(self, **moved)
