"""Means, areas and their intervals."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flamingo_dist.evaluation.figures import mean_figure, roc_auc, roc_auc_figure


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=20))
def test_the_area_is_the_share_of_pairs_in_the_right_order(pairs: list[tuple[int, bool]]) -> None:
    positives = [score for score, positive in pairs if positive]
    negatives = [score for score, positive in pairs if not positive]
    found = roc_auc(np.array([float(s) for s, _ in pairs]), np.array([p for _, p in pairs]))
    if not positives or not negatives:
        assert np.isnan(found)
        return
    right = sum((p > n) + 0.5 * (p == n) for p in positives for n in negatives)
    assert found == pytest.approx(right / (len(positives) * len(negatives)))


def test_an_interval_holds_the_mean_and_shrinks_with_the_queries() -> None:
    few, many = (mean_figure("accuracy", ([1.0, 0.0, 1.0] * count), seed=0) for count in (10, 1000))
    for figure in (few, many):
        assert figure.low < figure.value < figure.high
        assert figure.value == pytest.approx(200 / 3)
    # Standard error of a mean of 3,000: 100 sqrt(2/9 / 3000) = 0.86; 1.96 of it on either side.
    assert many.high - many.low == pytest.approx(4 * 0.86, rel=0.15)
    assert few.high - few.low > 5 * (many.high - many.low)
    assert few == mean_figure("accuracy", [1.0, 0.0, 1.0] * 10, seed=0)
    assert many != mean_figure("accuracy", [1.0, 0.0, 1.0] * 1000, seed=1)


def test_an_area_has_an_interval_too() -> None:
    figure = roc_auc_figure("ROC AUC", [0.1, 0.4, 0.35, 0.8], [False, False, True, True], seed=0)
    assert figure.value == pytest.approx(75.0)
    assert figure.low <= figure.value <= figure.high


def test_what_has_no_figure_is_refused() -> None:
    with pytest.raises(ValueError, match="not one query"):
        mean_figure("CIDEr", [], seed=0)
    with pytest.raises(ValueError, match="both classes"):
        roc_auc_figure("ROC AUC", [1.0, 2.0], [True, True], seed=0)
