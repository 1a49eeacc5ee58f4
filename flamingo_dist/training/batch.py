"""One data set's batch on one rank, as tensors."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flamingo_dist.models.vocabulary import IGNORE


@dataclass(frozen=True)
class RowCounts:
    """What each row of a batch holds. The host knows it, so that it need not wait for a device to answer."""

    loss_tokens: tuple[int, ...]
    """Tokens that carry loss."""
    media: tuple[int, ...]
    """Media."""
    tokens: tuple[int, ...]
    """Text tokens up to the last one that carries loss."""


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
    counts: RowCounts | None = None
    """What the rows hold, if it has been counted: `counted` does, and so does `to` before tensors leave the host."""

    def counted(self) -> "TrainBatch":
        """Return the batch with its `counts`, which asks the device of the tensors once if there are none yet."""
        if self.counts is not None:
            return self
        positions = torch.arange(1, self.tokens_BT.shape[1] + 1, device=self.tokens_BT.device)
        by_row = (
            self.loss_mask_BT[:, 1:].sum(dim=1),  # position 0 is predicted by none
            self.media_mask_BM.sum(dim=1),
            (positions * self.loss_mask_BT).amax(dim=1),
        )
        return replace(self, counts=RowCounts(*(tuple(row) for row in torch.stack(by_row).tolist())))

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
        return [self.rows(slice(at, at + rows)) for at in range(0, len(self.tokens_BT), rows)]

    def rows(self, part: slice) -> "TrainBatch":
        """Return some of the batch's rows, as views of its tensors."""
        counts = None
        if self.counts is not None:
            counts = RowCounts(*(of_rows[part] for of_rows in vars(self.counts).values()))
        return replace(self.each(lambda tensor: tensor[part]), counts=counts)

    def num_sequences(self) -> int:
        """Return how many sequences there are, empty ones included."""
        return self.media_mask_BM.shape[0] if self.segments_BT is None else self.media_mask_BM.numel()

    def num_loss_tokens(self) -> int:
        """Return how many tokens carry loss."""
        return sum(self._known().loss_tokens)

    def num_media(self) -> int:
        """Return how many media there are."""
        return sum(self._known().media)

    def num_tokens(self) -> int:
        """Return how many text tokens there are up to the last of each row that carries loss."""
        return sum(self._known().tokens)

    def pinned(self) -> "TrainBatch":
        """Return the batch in page-locked memory, from which a GPU copies without waiting."""
        return self.each(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> "TrainBatch":
        """Return the batch on `device`."""
        counted = self.counted() if self.tokens_BT.device.type == "cpu" else self
        return counted.each(lambda tensor: tensor.to(device, non_blocking=True))

    def _known(self) -> RowCounts:
        counts = self.counted().counts
        assert counts is not None, "just counted"
        return counts

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that there are, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def each(self, change: Callable[[Tensor], Tensor]) -> "TrainBatch":
        """Return the batch with every tensor (of any shape) changed."""
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **changed)
