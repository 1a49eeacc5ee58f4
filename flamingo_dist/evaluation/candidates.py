"""Close-ended evaluation: known answers ranked by log-likelihood given the image.

Paper, section "Evaluation". Every candidate is appended to the prompt and scored; the image's latents are
computed once and reused for all of them.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from flamingo_dist.inference.calls import (
    Forward,
    ReduceSum,
    alone,
    evaluating,
    latents_of,
    next_token_targets,
)
from flamingo_dist.inference.prompt import Prompt
from flamingo_dist.models.vocabulary import IGNORE


@dataclass(frozen=True, kw_only=True)
class CandidateConfig:
    """How candidates are scored."""

    rows: int = 32
    """Most (query, candidate) pairs in one call of the model."""
    queries: int = 8
    """Most queries in one call that encodes media."""
    normalise: Literal["none", "tokens"] = "none"
    """"none" ranks by the summed log-likelihood, "tokens" by its mean over the candidate's tokens. The paper
    does not say; a sum favours short names, a mean names with predictable ends."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.rows < 1 or self.queries < 1:
            raise ValueError(
                f"CandidateConfig has rows={self.rows}, queries={self.queries}: both must be at least 1"
            )
        if self.normalise not in ("none", "tokens"):
            raise ValueError(
                f"CandidateConfig.normalise is {self.normalise!r}: it must be 'none' or 'tokens'"
            )


@dataclass(frozen=True, kw_only=True)
class CandidateResult:
    """How often the right candidate is ranked first or among the first five, beside chance."""

    top1: float
    """Share of queries whose right candidate has the highest score."""
    top5: float
    """Share of queries whose right candidate is among the five highest."""
    chance_top1: float
    """The same for random scores: 1 / n."""
    chance_top5: float
    """The same for random scores: 5 / n, at most 1."""
    count: int
    """Queries behind the shares."""

    def as_dict(self) -> dict[str, float]:
        """Return the fields as metrics.jsonl holds them."""
        return asdict(self)


def score_candidates(
    model: Forward,
    prompts: Sequence[Prompt],
    media: Tensor,
    media_mask: Tensor,
    candidates: Sequence[Sequence[int]],
    config: CandidateConfig | None = None,
) -> Tensor:
    """Log-likelihood of every candidate after every prompt.

    Calls of the model: ceil(Q / queries) with media and ceil(Q * n / rows) with latents, so ranks stay in
    step when each brings the same numbers Q and n.

    Args:
        model: `Flamingo.forward`: the module or the engine around it.
        prompts: Q prompts, which end where the answer starts (`few_shot_prompt`).
        media: [Q, M, F, ...], as in a batch, on the model's device.
        media_mask: bool [Q, M].
        candidates: Token ids of the n answers, each closed by `<EOC>` (`answer_tokens`), all different.
        config: How candidates are scored.

    Returns:
        float64 [Q, n] on the CPU: log-likelihood in nats, or nats a token with `normalise="tokens"`.

    Raises:
        ValueError: An empty or repeated candidate, no prompts, or media that do not fit the prompts.
    """
    config = config or CandidateConfig()
    _check(prompts, media, media_mask, candidates)
    pairs = [(query, choice) for query in range(len(prompts)) for choice in range(len(candidates))]
    # Neighbours of like length share a call: right-padding is work thrown away.
    pairs.sort(key=lambda pair: len(prompts[pair[0]].tokens) + len(candidates[pair[1]]))
    scores_QN = torch.zeros(len(prompts), len(candidates), dtype=torch.float64)
    with evaluating(model):
        parts = zip(media.split(config.queries), media_mask.split(config.queries), strict=True)
        latents_QMRE = torch.cat([latents_of(model, *some) for some in parts])
        for first in range(0, len(pairs), config.rows):
            chunk = pairs[first : first + config.rows]
            queries, choices = [query for query, _ in chunk], [choice for _, choice in chunk]
            scores_QN[queries, choices] = _score_chunk(
                model,
                [prompts[query] for query in queries],
                [candidates[choice] for choice in choices],
                latents_QMRE[queries],
                media_mask[queries],
            )
    if config.normalise == "tokens":
        scores_QN /= torch.tensor([len(candidate) for candidate in candidates])
    return scores_QN


def rank_candidates(
    scores_QN: Tensor, labels: Sequence[int], *, reduce_sum: ReduceSum = alone
) -> CandidateResult:
    """Count how often the right candidate comes first or among the first five.

    A tie counts against the right candidate, and so does NaN: a network that scores all names alike must not
    look good.

    Args:
        scores_QN: Scores [Q, n], higher is better.
        labels: The right candidate of each query, length Q.
        reduce_sum: Sum over the data-parallel ranks of a float64 tensor [3] on the device of `scores_QN`.

    Returns:
        Shares over all ranks' queries, beside chance.

    Raises:
        ValueError: Labels that do not fit the scores, or no queries on any rank.
    """
    queries, choices = scores_QN.shape
    if len(labels) != queries or any(not 0 <= label < choices for label in labels):
        raise ValueError(f"rank_candidates() needs {queries} labels in 0..{choices - 1}, got {list(labels)}")
    own_Q1 = scores_QN[torch.arange(queries), list(labels)][:, None]
    # "not lower" rather than "higher or equal": NaN fails every comparison. The candidate itself is one of
    # them.
    not_lower_Q = (~(scores_QN < own_Q1)).sum(1) - 1
    counts = torch.stack([(not_lower_Q < 1).sum(), (not_lower_Q < 5).sum(), torch.tensor(queries)]).double()
    hits1, hits5, count = reduce_sum(counts.to(scores_QN.device)).tolist()
    if count == 0:
        raise ValueError("rank_candidates() got no queries on any rank")
    return CandidateResult(
        top1=hits1 / count,
        top5=hits5 / count,
        chance_top1=1 / choices,
        chance_top5=min(5 / choices, 1.0),
        count=round(count),
    )


def _score_chunk(
    model: Forward,
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[int]],
    latents_NMRE: Tensor,
    media_mask_NM: Tensor,
) -> Tensor:
    """Log-likelihood float64 [N] on the CPU of each answer after its prompt."""
    texts, indices, masks = [], [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        sees = [*prompt.media_index, *[prompt.media_index[-1]] * len(answer)]
        texts.append(torch.tensor([*prompt.tokens, *answer]))
        indices.append(torch.tensor(sees, dtype=torch.int32))
        masks.append(torch.tensor([False] * len(prompt.tokens) + [True] * len(answer)))
    tokens_NT, index_NT, mask_NT = (
        pad_sequence(rows, batch_first=True).to(latents_NMRE.device) for rows in (texts, indices, masks)
    )
    targets_NT = next_token_targets(tokens_NT, mask_NT)
    output = model(tokens_NT, index_NT, None, media_mask_NM, latents_BMRE=latents_NMRE, targets_BT=targets_NT)
    return -torch.where(targets_NT != IGNORE, output.nll_BT.double(), 0.0).sum(1).cpu()


def _check(
    prompts: Sequence[Prompt], media: Tensor, media_mask: Tensor, candidates: Sequence[Sequence[int]]
) -> None:
    """Refuse candidates that cannot be ranked and media that do not fit."""
    if not prompts or not len(prompts) == len(media) == len(media_mask):
        raise ValueError(
            f"score_candidates() needs as many prompts as media and masks, at least one, got {len(prompts)}, "
            f"{len(media)} and {len(media_mask)}"
        )
    if not candidates or not all(candidates):
        raise ValueError(
            "score_candidates() needs at least one candidate, each of at least one token (`<EOC>`)"
        )
    seen: dict[tuple[int, ...], int] = {}
    for place, candidate in enumerate(candidates):
        first = seen.setdefault(tuple(candidate), place)
        if first != place:
            raise ValueError(f"candidates {first} and {place} have the same tokens: give each name once")
