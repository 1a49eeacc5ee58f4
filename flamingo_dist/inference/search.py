"""Choosing tokens: greedy or sampled decoding and beam search, apart from the model that gives the logits.

A search is fed the logits of its live rows and answers which row each next token continues. It works on the
host, where N rows of one token are little work.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Search(Protocol):
    """One batch of sequences being decoded."""

    @property
    def done(self) -> bool:
        """True once no further token can change the results."""

    def advance(self, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Take the logits of the live rows, choose the next token of each.

        Args:
            logits_NV: [N, V], any float dtype.

        Returns:
            rows_K int64 [K], the row that each new row continues, and next_K int64 [K], the token it
            continues with.
        """

    def results(self) -> list[list[int]]:
        """Return the generated ids of each sequence, without the stop id."""


class SampleSearch:
    """Greedy decoding (temperature 0) or sampling, one row a sequence."""

    def __init__(
        self, sequences: int, *, max_new_tokens: int, stop_ids: tuple[int, ...], temperature: float, seed: int
    ) -> None:
        self._max_new_tokens = max_new_tokens
        self._stop_ids = frozenset(stop_ids)
        self._temperature = temperature
        # On the CPU whatever the device: tensor-parallel ranks hold equal logits and must draw equal tokens.
        self._generator = torch.Generator().manual_seed(seed)
        self._texts: list[list[int]] = [[] for _ in range(sequences)]
        self._finished = [False] * sequences
        self._steps = 0

    @property
    def done(self) -> bool:
        """True once every sequence met a stop id or the length limit."""
        return self._steps >= self._max_new_tokens or all(self._finished)

    def advance(self, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Choose a token for each row.

        Args:
            logits_NV: [N, V], any float dtype.

        Returns:
            Rows 0..N-1, int64 [N], and the chosen ids, int64 [N]. Finished rows go on unheard.
        """
        logits_NV = logits_NV.detach().float().cpu()
        if self._temperature == 0:
            next_N = logits_NV.argmax(-1)
        else:
            probabilities_NV = (logits_NV / self._temperature).softmax(-1)
            next_N = torch.multinomial(probabilities_NV, 1, generator=self._generator)[:, 0]
        self._steps += 1
        for row, token in enumerate(next_N.tolist()):
            self._finished[row] = self._finished[row] or token in self._stop_ids
            if not self._finished[row]:
                self._texts[row].append(token)
        return torch.arange(len(next_N)), next_N

    def results(self) -> list[list[int]]:
        """Return the generated ids of each sequence, without the stop id."""
        return self._texts


@dataclass(frozen=True)
class _Hypothesis:
    """A text under way or finished, and its log-likelihood (nats), the stop id's included."""

    text: tuple[int, ...]
    log_likelihood: float


class BeamSearch:
    """Beam search: the best finished text of each sequence by log-likelihood / length ** length_penalty.

    The length counts the generated tokens, the stop id included. A stop counts only where it is among the
    best `beams` continuations, so that a beam of 1 is greedy decoding. A sequence ends as soon as no live
    text can still overtake its best finished one.
    """

    def __init__(
        self,
        sequences: int,
        *,
        beams: int,
        max_new_tokens: int,
        stop_ids: tuple[int, ...],
        length_penalty: float,
    ) -> None:
        self._beams = beams
        self._max_new_tokens = max_new_tokens
        self._stop_ids = frozenset(stop_ids)
        self._length_penalty = length_penalty
        self._live = [[_Hypothesis((), 0.0)] for _ in range(sequences)]
        self._best: list[tuple[float, tuple[int, ...]]] = [(-math.inf, ()) for _ in range(sequences)]
        self._steps = 0

    @property
    def done(self) -> bool:
        """True once every sequence's best text is settled."""
        return self._steps >= self._max_new_tokens or all(map(self._settled, range(len(self._live))))

    def advance(self, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Extend every live text and keep the best `beams` of each sequence.

        Args:
            logits_NV: [N, V], any float dtype; N = sequences at the first call (one empty text each),
                sequences * beams afterwards, sequence by sequence.

        Returns:
            rows_K and next_K, int64 [sequences * beams].
        """
        log_probs_NV = logits_NV.detach().float().log_softmax(-1).cpu()
        self._steps += 1
        rows, tokens, first_row = [], [], 0
        for sequence, live in enumerate(self._live):
            parents = self._extend(sequence, log_probs_NV[first_row : first_row + len(live)])
            rows += [first_row + parent for parent in parents]
            tokens += [hypothesis.text[-1] for hypothesis in self._live[sequence]]
            first_row += len(live)
        return torch.tensor(rows), torch.tensor(tokens)

    def results(self) -> list[list[int]]:
        """Return the best text of each sequence, without the stop id.

        Unfinished texts compete only at the length limit: before it they are settled against.
        """
        texts = []
        for (score, text), live in zip(self._best, self._live, strict=True):
            scored = [(score, text)]
            if self._steps >= self._max_new_tokens:
                scored += [(self._score(h.log_likelihood, self._steps), h.text) for h in live]
            texts.append(list(max(scored, key=lambda pair: pair[0])[1]))
        return texts

    def _extend(self, sequence: int, log_probs_KV: Tensor) -> list[int]:
        """Replace one sequence's live texts by their best continuations; return each one's parent row."""
        live, vocabulary = self._live[sequence], log_probs_KV.shape[1]
        before_K = torch.tensor([h.log_likelihood for h in live], dtype=torch.float64)
        # Room for the case that every live text's stop ids lead the list: `beams` others must still be found.
        wanted = self._beams + len(live) * len(self._stop_ids)
        best = (before_K[:, None] + log_probs_KV).flatten().topk(min(wanted, log_probs_KV.numel()))
        kept: list[tuple[int, _Hypothesis]] = []
        for rank, (log_likelihood, place) in enumerate(
            zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ):
            parent, token = divmod(place, vocabulary)
            if token not in self._stop_ids:
                kept.append((parent, _Hypothesis((*live[parent].text, token), log_likelihood)))
            elif rank < self._beams:
                finished = (self._score(log_likelihood, self._steps), live[parent].text)
                self._best[sequence] = max(self._best[sequence], finished, key=lambda pair: pair[0])
        kept = kept[: self._beams]
        # Fewer continuations than beams (a tiny or heavily suppressed vocabulary): dead rows keep the shape.
        filler = kept[0] if kept else (0, _Hypothesis((*live[0].text, 0), -math.inf))
        dead = (filler[0], _Hypothesis(filler[1].text, -math.inf))
        kept += [dead] * (self._beams - len(kept))
        self._live[sequence] = [hypothesis for _, hypothesis in kept]
        return [parent for parent, _ in kept]

    def _score(self, log_likelihood: float, length: int) -> float:
        """Normalise a log-likelihood by its length."""
        return float(log_likelihood / length**self._length_penalty)

    def _settled(self, sequence: int) -> bool:
        """Whether no live text can overtake the best finished one.

        Log-likelihoods only fall; a positive penalty favours long texts, so the bound takes the longest
        length then.
        """
        length = self._max_new_tokens if self._length_penalty > 0 else self._steps + 1
        highest = max(hypothesis.log_likelihood for hypothesis in self._live[sequence])
        return self._best[sequence][0] >= self._score(highest, max(length, 1))
