"""Close-ended evaluation of long prompts: keys and values are computed once, and every answer continues them.

`candidates.score_candidates` runs the prompt again with each answer. With 32 examples before a query and a thousand
class names that is a thousand times the work of the prompt; here it is done once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flamingo_dist.evaluation.candidates import CandidateConfig
from flamingo_dist.inference.calls import Forward, evaluating
from flamingo_dist.inference.prompt import Prompt
from flamingo_dist.models.vocabulary import IGNORE


def score_continuations(
    model: Forward,
    prompts: Sequence[Prompt],
    latents_QMRE: Tensor,
    media_mask_QM: Tensor,
    answers: Sequence[Sequence[int]],
    config: CandidateConfig | None = None,
) -> Tensor:
    """Log-likelihood of every answer after every prompt, as `score_candidates` gives it.

    Args:
        model: `Flamingo.forward`; it offers `new_cache()`, and the cache `fork(row, copies)`.
        prompts: Q prompts of equal length, such as one query's with its examples in several orders.
        latents_QMRE: the resampler's output for their media, [Q, M, R, E], on the model's device.
        media_mask_QM: bool [Q, M].
        answers: token ids of the n answers, each closed by `<EOC>`.
        config: how answers are scored; `rows` are answers in one call, `queries` prompts in one.

    Returns:
        float64 [Q, n] on the CPU: log-likelihood in nats, or nats a token with `normalise="tokens"`.

    Raises:
        ValueError: prompts of unequal lengths, or an empty answer.
    """
    config = config or CandidateConfig()
    if len({len(prompt.tokens) for prompt in prompts}) != 1 or not answers or not all(answers):
        raise ValueError(
            f"score_continuations() got prompts of {sorted(len(prompt.tokens) for prompt in prompts)} tokens and "
            f"answers of {sorted(map(len, answers))}: prompts must have one length, and every answer a token."
        )
    # Neighbours of like length share a call: right-padding is work thrown away.
    order = sorted(range(len(answers)), key=lambda place: len(answers[place]))
    scores_QN = torch.zeros(len(prompts), len(answers), dtype=torch.float64)
    with evaluating(model):
        for first in range(0, len(prompts), config.queries):
            part = slice(first, first + config.queries)
            cache = _read_prompts(model, prompts[part], latents_QMRE[part], media_mask_QM[part])
            for query, prompt in enumerate(prompts[part], start=first):
                for begin in range(0, len(order), config.rows):
                    chosen = order[begin : begin + config.rows]
                    scores_QN[query, chosen] = _score_rows(
                        model,
                        cache.fork(query - first, len(chosen)),
                        prompt,
                        [answers[place] for place in chosen],
                        latents_QMRE[query],
                        media_mask_QM[query],
                    )
    if config.normalise == "tokens":
        scores_QN /= torch.tensor([len(answer) for answer in answers])
    return scores_QN


def _read_prompts(
    model: Forward, prompts: Sequence[Prompt], latents_NMRE: Tensor, media_mask_NM: Tensor
) -> Any:
    """Return a cache that holds the prompts but for their last token, from which the answers go on."""
    cache = model.new_cache()  # type: ignore[attr-defined]
    device = latents_NMRE.device
    tokens_NT = torch.tensor([prompt.tokens for prompt in prompts], device=device)[:, :-1]
    if tokens_NT.shape[1] == 0:
        return cache
    index_NT = torch.tensor([prompt.media_index for prompt in prompts], device=device, dtype=torch.int32)
    # One target spares the head, the widest product, the other positions.
    targets_NT = torch.full_like(tokens_NT, IGNORE)
    targets_NT[:, -1] = 0
    model(
        tokens_NT,
        index_NT[:, :-1],
        None,
        media_mask_NM,
        latents_BMRE=latents_NMRE,
        targets_BT=targets_NT,
        cache=cache,
    )
    return cache


def _score_rows(
    model: Forward,
    cache: Any,
    prompt: Prompt,
    answers: Sequence[Sequence[int]],
    latents_MRE: Tensor,
    media_mask_M: Tensor,
) -> Tensor:
    """Log-likelihood float64 [N] on the CPU of answers that continue the rows of a cache."""
    rows, longest = len(answers), max(map(len, answers))
    tokens_NL = torch.zeros(rows, longest, dtype=torch.int64)
    targets_NL = torch.full((rows, longest), IGNORE)
    for row, answer in enumerate(answers):
        tokens_NL[row, : len(answer)] = torch.tensor([prompt.tokens[-1], *answer[:-1]])
        targets_NL[row, : len(answer)] = torch.tensor(answer)
    device = latents_MRE.device
    targets_NL = targets_NL.to(device)
    output = model(
        tokens_NL.to(device),
        torch.full((rows, longest), prompt.media_index[-1], device=device, dtype=torch.int32),
        None,
        media_mask_M.expand(rows, -1),
        latents_BMRE=latents_MRE.expand(rows, -1, -1, -1),
        targets_BT=targets_NL,
        cache=cache,
    )
    return -torch.where(targets_NL != IGNORE, output.nll_BT.double(), 0.0).sum(1).cpu()
