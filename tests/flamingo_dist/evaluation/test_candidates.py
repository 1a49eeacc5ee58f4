import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flamingo_dist.evaluation.candidates import CandidateConfig, rank_candidates, score_candidates
from flamingo_dist.inference.prompt import Prompt
from tests.flamingo_dist.inference.fake_flamingo import FakeFlamingo

EOC, IMAGE = 0, 11
CANDIDATES = [[1, EOC], [2, 3, EOC], [4, 5, 6, EOC], [1, 7, EOC], [EOC], [8, EOC], [9, 1, 2, EOC]]


def queries() -> tuple[list[Prompt], Tensor, Tensor]:
    prompts = [
        Prompt(tokens=(IMAGE,), media_index=(1,)),
        Prompt(tokens=(IMAGE, 4, 0, IMAGE, 5), media_index=(1, 1, 1, 2, 2)),
        Prompt(tokens=(3, IMAGE, 2), media_index=(0, 1, 1)),
    ]
    mask = torch.tensor([[True, False], [True, True], [True, False]])
    media = torch.randn(3, 2, 1, 4, 3, generator=torch.Generator().manual_seed(0)).half()
    return prompts, media * mask[:, :, None, None, None], mask


@torch.no_grad()
def naive(model: FakeFlamingo, prompt: Prompt, media: Tensor, mask: Tensor, candidate: list[int]) -> float:
    """One candidate after one prompt, token by token."""
    text, index, score = list(prompt.tokens), list(prompt.media_index), 0.0
    for token in candidate:
        logits = model(torch.tensor([text]), torch.tensor([index]), media[None], mask[None]).logits_BTV
        score += float(logits[0, -1].log_softmax(-1)[token])
        text, index = [*text, token], [*index, index[-1]]
    return score


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("normalise", ["none", "tokens"])
def test_scores_equal_one_candidate_at_a_time(rows: int, normalise: str) -> None:
    model = FakeFlamingo().eval()
    prompts, media, mask = queries()
    config = CandidateConfig(rows=rows, queries=2, normalise=normalise)  # type: ignore[arg-type]
    scores = score_candidates(model, prompts, media, mask, CANDIDATES, config)
    calls = list(model.calls)
    for query, prompt in enumerate(prompts):
        for choice, candidate in enumerate(CANDIDATES):
            expected = naive(model, prompt, media[query], mask[query], candidate)
            expected /= len(candidate) if normalise == "tokens" else 1
            assert float(scores[query, choice]) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert calls.count("media") == 2, "media are encoded once a query, two queries at a time"
    assert calls.count("latents") == -(-len(prompts) * len(CANDIDATES) // rows)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))
def test_ranks_by_sorting(count: int, choices: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(count, choices, generator=generator, dtype=torch.float64)
    labels = torch.randint(choices, (count,), generator=generator).tolist()
    order = scores.argsort(1, descending=True).tolist()
    ranks = [order[query].index(labels[query]) for query in range(count)]
    result = rank_candidates(scores, labels)
    assert result.top1 == sum(rank < 1 for rank in ranks) / count
    assert result.top5 == sum(rank < 5 for rank in ranks) / count
    assert (result.chance_top1, result.chance_top5) == (1 / choices, min(1, 5 / choices))


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_equal_scores_and_nan_count_as_wrong(value: float) -> None:
    result = rank_candidates(torch.full((2, 8), value), [0, 3])
    assert (result.top1, result.top5, result.count) == (0.0, 0.0, 2)
    one_nan = torch.tensor([[1.0, float("nan"), 3.0]])
    assert rank_candidates(one_nan, [2]).top1 == 0.0


def test_ranks_add_their_counts() -> None:
    sums = rank_candidates(
        torch.tensor([[1.0, 2.0]]), [0], reduce_sum=lambda own: own + torch.tensor([1, 1, 1])
    )
    assert (sums.top1, sums.top5, sums.count) == (0.5, 1.0, 2)


def test_what_cannot_be_ranked_is_refused() -> None:
    prompts, media, mask = queries()
    model = FakeFlamingo()
    with pytest.raises(ValueError, match="candidates 0 and 2 have the same tokens"):
        score_candidates(model, prompts, media, mask, [[1, EOC], [2, EOC], [1, EOC]])
    with pytest.raises(ValueError, match="at least one token"):
        score_candidates(model, prompts, media, mask, [[1, EOC], []])
    with pytest.raises(ValueError, match="as many prompts"):
        score_candidates(model, prompts[:2], media, mask, CANDIDATES)
    with pytest.raises(ValueError, match=r"labels in 0\.\.1"):
        rank_candidates(torch.zeros(1, 2), [2])
    with pytest.raises(ValueError, match="rows=0"):
        CandidateConfig(rows=0)
