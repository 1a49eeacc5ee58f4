"""The endless order: complete, shuffled, independent of who asks."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.order import Place, SampleOrder, make_rng

shard_counts = st.lists(st.integers(0, 7), min_size=1, max_size=12).filter(lambda c: sum(c) > 0)


@settings(max_examples=60, deadline=None)
@given(shard_counts, st.integers(0, 2**31), st.integers(1, 5), st.booleans())
def test_every_sample_once_an_epoch(counts: list[int], seed: int, window: int, shuffle: bool) -> None:
    order = SampleOrder(np.array(counts), seed=seed, name="d", shuffle=shuffle, shuffle_shards=window)
    n = sum(counts)
    everything = sorted((shard, k) for shard, count in enumerate(counts) for k in range(count))
    for epoch in range(3):
        places = [order.locate(epoch * n + i) for i in range(n)]
        assert {p.epoch for p in places} == {epoch}
        assert sorted((p.shard, p.sample) for p in places) == everything
        if not shuffle:
            assert [(p.shard, p.sample) for p in places] == everything


@settings(max_examples=60, deadline=None)
@given(shard_counts, st.integers(0, 2**31), st.randoms())
def test_asking_in_any_order_gives_the_same(counts: list[int], seed: int, random: object) -> None:
    n = 3 * sum(counts)
    straight = SampleOrder(np.array(counts), seed=seed, name="d", shuffle_shards=2)
    wanted = {p: straight.locate(p) for p in range(n)}
    positions = list(range(n))
    random.shuffle(positions)  # type: ignore[attr-defined]
    other = SampleOrder(np.array(counts), seed=seed, name="d", shuffle_shards=2)
    assert {p: other.locate(p) for p in positions} == wanted


def test_samples_mix_within_windows_only() -> None:
    counts = np.full(12, 50)
    order = SampleOrder(counts, seed=1, name="d", shuffle_shards=3)
    places = [order.locate(p) for p in range(600)]
    for window in range(4):
        shards = [p.shard for p in places[150 * window : 150 * (window + 1)]]
        assert len(set(shards)) == 3
        assert sum(a != b for a, b in pairwise(shards)) > 60, "well mixed"


def test_epochs_seeds_and_names_differ() -> None:
    counts = np.full(5, 10)

    def listing(seed: int, name: str, epoch: int) -> list[Place]:
        order = SampleOrder(counts, seed=seed, name=name, shuffle_shards=2)
        return [order.locate(50 * epoch + i)._replace(epoch=0) for i in range(50)]

    base = listing(0, "a", 0)
    assert base == listing(0, "a", 0)
    assert all(base != other for other in (listing(1, "a", 0), listing(0, "b", 0), listing(0, "a", 1)))


def test_every_epoch_permutes_the_shards() -> None:
    # Windows of one shard of one sample leave nothing but the order of the shards.
    order = SampleOrder(np.ones(20, np.int64), seed=0, name="d", shuffle_shards=1)
    epochs = {tuple(order.locate(20 * epoch + i).shard for i in range(20)) for epoch in range(4)}
    assert len(epochs) == 4


def test_large_corpora_cost_arithmetic_only() -> None:
    order = SampleOrder(np.full(180_000, 10_000), seed=3, name="align", shuffle_shards=8)
    assert order.num_samples == 1_800_000_000
    assert len({order.locate(p) for p in (0, 1, 10**9, 10**9 + 1, 2 * 10**9)}) == 5


GOLDEN = [(1, 0), (2, 2), (0, 0), (2, 3), (0, 2), (2, 1), (2, 4), (0, 1), (1, 2), (1, 3), (2, 0), (1, 1)]


def test_the_draws_are_pinned() -> None:
    # Saved positions mean nothing if these change: the resume check compares such draws.
    order = SampleOrder(np.array([3, 4, 5]), seed=7, name="golden", shuffle_shards=2)
    assert [tuple(order.locate(p))[1:] for p in range(12)] == GOLDEN
    assert make_rng(1, "a", "b", 2).integers(1000) == make_rng(1, "a", "b", 2).integers(1000)


def test_errors() -> None:
    with pytest.raises(ValueError, match="without samples"):
        SampleOrder(np.array([0]), seed=0, name="d")
    with pytest.raises(ValueError, match="position -1"):
        SampleOrder(np.array([1]), seed=0, name="d").locate(-1)
