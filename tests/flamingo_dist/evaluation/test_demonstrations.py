"""Demonstrations: never the query, by keys and seed alone, the most similar last."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flamingo_dist.evaluation.demonstrations import (
    choose_per_class,
    choose_support,
    drawn,
    nearest,
    pooled,
    shuffles,
)

KEYS = st.lists(st.text("abc1/", min_size=1, max_size=4), min_size=1, max_size=12, unique=True)


@given(KEYS, st.integers(0, 9), st.integers(1, 14), st.randoms(use_true_random=False))
def test_the_support_set_does_not_depend_on_the_order_of_the_data(
    keys: list[str], seed: int, most: int, random: object
) -> None:
    chosen = [keys[place] for place in choose_support(keys, most, seed=seed)]
    turned = list(keys)
    random.shuffle(turned)  # type: ignore[attr-defined]
    assert [turned[place] for place in choose_support(turned, most, seed=seed)] == chosen
    assert len(set(chosen)) == min(most, len(keys))


@given(KEYS, st.integers(1, 3), st.integers(0, 9))
def test_no_class_has_more_than_its_share(keys: list[str], most: int, seed: int) -> None:
    labels = [key[0] for key in keys]
    chosen = [labels[place] for place in choose_per_class(keys, labels, most, seed=seed)]
    assert {label: chosen.count(label) for label in chosen} == {
        label: min(most, labels.count(label)) for label in labels
    }


@given(KEYS, st.text("abc1/", max_size=4), st.integers(0, 9))
def test_random_demonstrations_are_everything_but_the_query(keys: list[str], query: str, seed: int) -> None:
    order = drawn(query, keys, seed=seed)
    assert sorted(keys[place] for place in order) == sorted(set(keys) - {query})
    assert order == drawn(query, keys, seed=seed)


def test_queries_and_seeds_draw_different_demonstrations() -> None:
    keys = [f"s{i}" for i in range(50)]
    orders = {tuple(drawn(f"q{i}", keys, seed=seed)) for i in range(5) for seed in range(2)}
    assert len(orders) == 10


def test_the_nearest_come_last_and_the_query_not_at_all() -> None:
    support = torch.nn.functional.normalize(torch.randn(20, 8, generator=torch.Generator().manual_seed(0)))
    keys = [f"s{i}" for i in range(20)]
    query = torch.nn.functional.normalize(support[3] + 0.5 * support[7], dim=0)
    chosen = nearest("q", query, keys, support, most=4)
    assert chosen[-1] == 3
    similarity = (support @ query)[chosen]
    assert torch.equal(similarity, similarity.sort().values)
    assert nearest("s3", query, keys, support, most=4) == [*nearest("s3", query, keys, support, most=5)[1:]]
    assert 3 not in nearest("s3", query, keys, support, most=20)


def test_equal_images_go_by_the_support_sets_order_whatever_the_last_bits() -> None:
    support = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1e-7], [0.6, 0.8]])
    assert nearest("q", torch.tensor([1.0, 0.0]), list("abcd"), support, most=3) == [3, 2, 1]
    assert nearest("q", torch.tensor([1.0, 1e-7]), list("abcd"), support, most=3) == [3, 2, 1]


def test_pooling_is_over_frames_and_positions() -> None:
    features = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    mean = features.mean((0, 1))
    torch.testing.assert_close(pooled(features), mean / mean.norm())
    assert pooled(features.half()).dtype == torch.float32


@pytest.mark.parametrize(("count", "most", "found"), [(0, 6, 1), (1, 6, 1), (2, 6, 2), (4, 6, 6), (32, 6, 6)])
def test_orders_to_ensemble_over_are_different(count: int, most: int, found: int) -> None:
    orders = shuffles("q", count, most, seed=1)
    assert len({tuple(order) for order in orders}) == len(orders) == found
    assert orders[0] == list(range(count))
    assert all(sorted(order) == orders[0] for order in orders)
    assert orders == shuffles("q", count, most, seed=1)
