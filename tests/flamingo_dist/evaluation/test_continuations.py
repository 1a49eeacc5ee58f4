"""Answers that continue a prompt's keys and values have the scores that they have after the whole prompt."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flamingo_dist.evaluation.candidates import CandidateConfig, score_candidates
from flamingo_dist.evaluation.continuations import score_continuations
from flamingo_dist.inference.prompt import Prompt, phi
from flamingo_dist.models.flamingo import Flamingo
from flamingo_dist.parallel.topology import ParallelConfig, Topology, single_process
from flamingo_dist.training.build import build_model
from tests.tiny import EOC, IMAGE, network

ANSWERS = [[5, EOC], [7, 8, EOC], [9, 10, 11, 12, EOC], [EOC], [7, 9, EOC]]
NET = replace(network(gate_init=1.0), gated=replace(network(gate_init=1.0).gated, init_std=1.0))


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    with single_process() as alone:
        yield alone


def prompts(length: int) -> tuple[list[Prompt], Tensor, Tensor]:
    """Three prompts of one length, of an image or two."""
    generator = torch.Generator().manual_seed(length)
    found = []
    for row in range(3):
        tokens = torch.randint(3, 60, (length,), generator=generator).tolist()
        tokens[0] = IMAGE
        if length > 4:
            tokens[3 + row % 2] = IMAGE
        found.append(Prompt(tokens=tuple(tokens), media_index=phi(tokens, IMAGE)))
    media = torch.randint(0, 256, (3, 2, 2, 3, 16, 16), generator=generator).to(torch.uint8)
    return found, media, torch.tensor([[True, prompt.num_media > 1] for prompt in found])


@torch.no_grad()
def latents_of(model: Any, media: Tensor, mask: Tensor) -> Tensor:
    ones = torch.ones(len(media), 1, dtype=torch.int64)
    return model(ones, torch.zeros_like(ones), media, mask, targets_BT=ones).latents_BMRE


@pytest.mark.parametrize("positions", ["rotary", "relative", "alibi", "learned"])
def test_equal_to_the_whole_prompt_with_each_answer(topology: Topology, positions: Any) -> None:
    config = replace(NET, lm=replace(NET.lm, positions=positions))
    model = build_model(config, ParallelConfig(zero_stage=0), topology, dtype=torch.float32, seed=7)
    kinds: tuple[Any, ...] = ("none", "tokens")
    for length in (1, 2, 9):
        found, media, mask = prompts(length)
        latents = latents_of(model, media, mask)
        for (rows, queries), normalise in zip(((1, 1), (2, 2), (32, 8)), (*kinds, "none"), strict=True):
            settings = CandidateConfig(rows=rows, queries=queries, normalise=normalise)
            expected = score_candidates(model, found, media, mask, ANSWERS, settings)
            scores = score_continuations(model, found, latents, mask, ANSWERS, settings)
            torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
            assert scores.std() > 0.01


def test_the_prompt_runs_once(topology: Topology) -> None:
    model: Flamingo = build_model(NET, ParallelConfig(zero_stage=0), topology, dtype=torch.float32, seed=7)
    found, media, mask = prompts(9)
    latents = latents_of(model, media, mask)
    lengths: list[int] = []
    model.register_forward_pre_hook(lambda _, arguments: lengths.append(arguments[0].shape[1]))
    score_continuations(model, found, latents, mask, ANSWERS, CandidateConfig(rows=2))
    assert lengths.count(8) == 1
    assert max(lengths[1:]) == max(map(len, ANSWERS))
    assert len(lengths) == 1 + len(found) * 3


def test_prompts_of_several_lengths_are_refused() -> None:
    pair = [Prompt(tokens=(1,) * length, media_index=(0,) * length) for length in (2, 3)]
    with pytest.raises(ValueError, match=r"prompts of \[2, 3\] tokens"):
        score_continuations(None, pair, torch.zeros(2, 1, 1, 1), torch.ones(2, 1) > 0, ANSWERS)
