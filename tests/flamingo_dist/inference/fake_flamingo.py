"""A small recurrent network with Flamingo's forward signature: quick, deterministic, with an exact cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Output:
    logits_BTV: Tensor | None
    nll_BT: Tensor | None
    latents_BMRE: Tensor


class Cache:
    def __init__(self) -> None:
        self.state_BD: Tensor | None = None

    def reorder(self, rows_N: Tensor) -> None:
        assert self.state_BD is not None
        self.state_BD = self.state_BD[rows_N]


class FakeFlamingo(nn.Module):
    """Media [B, M, 1, S, C] -> latents [B, M, 1, D]; text through a GRU whose input adds the seen latents."""

    def __init__(self, vocabulary: int = 12, width: int = 8, channels: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(vocabulary, width)
        self.resampler = nn.Linear(channels, width)
        self.cell = nn.GRUCell(width, width)
        self.head = nn.Linear(width, vocabulary)
        self.dropout = nn.Dropout(0.5)
        self.open = True
        self.calls: list[str] = []
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=1.0)

    def new_cache(self) -> Cache:
        return Cache()

    @contextmanager
    def gates_off(self) -> Iterator[None]:
        self.open = False
        yield
        self.open = True

    def forward(
        self,
        tokens_BT: Tensor,
        media_index_BT: Tensor,
        media: Tensor | None = None,
        media_mask_BM: Tensor | None = None,
        *,
        latents_BMRE: Tensor | None = None,
        targets_BT: Tensor | None = None,
        cache: Any = None,
        last_only: bool = False,
    ) -> Output:
        assert (media is None) != (latents_BMRE is None)
        self.calls.append("media" if media is not None else "latents")
        if latents_BMRE is None:
            latents_BMRE = self.resampler(media.float().mean((2, 3)))[:, :, None]
        assert media_mask_BM is not None
        assert tokens_BT.shape == media_index_BT.shape
        assert len(tokens_BT) == len(latents_BMRE) == len(media_mask_BM)
        seen = latents_BMRE.sum(2) * media_mask_BM[:, :, None]
        seen_BMD = torch.cat([torch.zeros_like(seen[:, :1]), seen], 1) * self.open
        rows = torch.arange(len(tokens_BT))
        state = None if cache is None else cache.state_BD
        states = []
        for t in range(tokens_BT.shape[1]):
            x_BD = self.embed(tokens_BT[:, t]) + seen_BMD[rows, media_index_BT[:, t].long()]
            state = self.cell(self.dropout(x_BD), state)
            states.append(state)
        if cache is not None:
            cache.state_BD = state
        logits = 3 * self.head(torch.stack(states, 1))
        if targets_BT is None:
            return Output(logits[:, -1:] if last_only else logits, None, latents_BMRE)
        nll = F.cross_entropy(logits.transpose(1, 2).float(), targets_BT, reduction="none")
        return Output(None, nll, latents_BMRE)
