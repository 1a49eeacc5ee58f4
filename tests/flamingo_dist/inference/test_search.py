import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flamingo_dist.inference.search import BeamSearch, SampleSearch, Search

STOP = 0


class Table:
    """Log-probabilities that depend on the whole history, drawn once per history."""

    def __init__(self, vocabulary: int, seed: int) -> None:
        self.vocabulary, self.seed = vocabulary, seed

    def logits(self, history: tuple[int, ...]) -> Tensor:
        number = self.seed
        for token in history:
            number = (number * 31 + token + 1) % 2**31
        return 2 * torch.randn(self.vocabulary, generator=torch.Generator().manual_seed(number))

    def log_likelihood(self, text: tuple[int, ...]) -> float:
        return sum(
            float(self.logits(text[:place]).log_softmax(-1)[token]) for place, token in enumerate(text)
        )


def run(search: Search, tables: list[Table]) -> list[list[int]]:
    histories: list[tuple[int, tuple[int, ...]]] = [(which, ()) for which in range(len(tables))]
    while True:
        logits = torch.stack([tables[which].logits(text) for which, text in histories])
        rows, tokens = search.advance(logits)
        histories = [
            (histories[row][0], (*histories[row][1], token))
            for row, token in zip(rows.tolist(), tokens.tolist(), strict=True)
        ]
        if search.done:
            return search.results()


def exhaustive(table: Table, limit: int, penalty: float) -> list[int]:
    words = range(1, table.vocabulary)
    texts = [
        (*text, STOP) for length in range(limit) for text in itertools.product(words, repeat=length)
    ] + list(itertools.product(words, repeat=limit))
    best = max(texts, key=lambda text: table.log_likelihood(text) / len(text) ** penalty)
    return [token for token in best if token != STOP]


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**20),
    vocabulary=st.integers(2, 4),
    limit=st.integers(1, 3),
    penalty=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_a_wide_beam_is_exhaustive_search(seed: int, vocabulary: int, limit: int, penalty: float) -> None:
    tables = [Table(vocabulary, seed), Table(vocabulary, seed + 1)]
    search = BeamSearch(2, beams=64, max_new_tokens=limit, stop_ids=(STOP,), length_penalty=penalty)
    assert run(search, tables) == [exhaustive(table, limit, penalty) for table in tables]


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**20), sequences=st.integers(1, 3), limit=st.integers(1, 6))
def test_a_beam_of_one_is_greedy(seed: int, sequences: int, limit: int) -> None:
    tables = [Table(6, seed + which) for which in range(sequences)]
    beam = BeamSearch(sequences, beams=1, max_new_tokens=limit, stop_ids=(STOP, 5), length_penalty=0.0)
    greedy = SampleSearch(sequences, max_new_tokens=limit, stop_ids=(STOP, 5), temperature=0.0, seed=0)
    assert run(beam, tables) == run(greedy, tables)


def test_stopping_early_changes_nothing() -> None:
    """The bound on live texts is exact: searching on to the limit gives the same answer."""

    class Patient(BeamSearch):
        @property
        def done(self) -> bool:
            return self._steps >= 8

    for seed, penalty in itertools.product(range(30), (0.0, 1.0)):
        answers = [
            run(
                kind(1, beams=3, max_new_tokens=8, stop_ids=(STOP,), length_penalty=penalty), [Table(5, seed)]
            )
            for kind in (BeamSearch, Patient)
        ]
        assert answers[0] == answers[1]


def test_beam_finds_what_greedy_misses() -> None:
    first = torch.tensor([-math.inf, math.log(0.4), math.log(0.6), -math.inf])
    after = {1: torch.tensor([math.log(0.97)] + [math.log(0.01)] * 3), 2: torch.full((4,), math.log(0.25))}
    search = BeamSearch(1, beams=2, max_new_tokens=3, stop_ids=(STOP,), length_penalty=0.0)
    _, tokens = search.advance(first[None])
    assert sorted(tokens.tolist()) == [1, 2]
    search.advance(torch.stack([after[token] for token in tokens.tolist()]))
    assert search.done
    assert search.results() == [[1]]


def test_fewer_continuations_than_beams() -> None:
    search = BeamSearch(1, beams=3, max_new_tokens=4, stop_ids=(STOP,), length_penalty=0.0)
    only_stop = torch.tensor([[0.0, -math.inf]])
    rows, tokens = search.advance(only_stop)
    assert (len(rows), len(tokens)) == (3, 3)
    assert search.done
    assert search.results() == [[]]


def test_sampling_follows_seed_and_distribution() -> None:
    def draw(seed: int) -> list[int]:
        search = SampleSearch(4000, max_new_tokens=1, stop_ids=(), temperature=2.0, seed=seed)
        logits = 2 * torch.tensor([0.1, 0.2, 0.7]).log()
        return [text[0] for text in run_once(search, logits.expand(4000, 3))]

    def run_once(search: SampleSearch, logits: Tensor) -> list[list[int]]:
        search.advance(logits)
        return search.results()

    assert draw(1) == draw(1) != draw(2)
    assert draw(3).count(2) / 4000 == pytest.approx(0.7, abs=0.04)
