"""Figures over queries: a mean or an area under the ROC curve, with a bootstrap interval."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One metric over all queries of one setting."""

    metric: str
    """Name, such as "CIDEr"."""
    value: float
    """In the field's units: percent, or CIDEr x 100."""
    low: float
    """Lower end of the 95% interval."""
    high: float
    """Upper end."""
    count: int
    """Queries behind it."""


def mean_figure(metric: str, scores: Sequence[float], *, seed: int, resamples: int = 1000) -> Figure:
    """Return the mean of the queries' scores x 100, with the percentile interval of a bootstrap over queries.

    Args:
        metric: its name.
        scores: one a query, at least one.
        seed: of the resampling.
        resamples: bootstrap samples.

    Raises:
        ValueError: no scores.
    """
    values = np.asarray(scores, dtype=np.float64)
    return _figure(
        metric, len(values), lambda rows: float(values[rows].mean()), seed=seed, resamples=resamples
    )


def roc_auc_figure(
    metric: str, scores: Sequence[float], positive: Sequence[bool], *, seed: int, resamples: int = 1000
) -> Figure:
    """Return the area under the ROC curve x 100 with the interval of a bootstrap over queries.

    Args:
        metric: its name.
        scores: of the positive class, one a query.
        positive: whether a query is of the positive class.
        seed: of the resampling.
        resamples: bootstrap samples; those of one class alone are left out.

    Raises:
        ValueError: no queries, or queries of one class alone.
    """
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
    return _figure(
        metric, len(values), lambda rows: roc_auc(values[rows], truth[rows]), seed=seed, resamples=resamples
    )


def roc_auc(scores_N: np.ndarray, positive_N: np.ndarray) -> float:
    """Return the share of (positive, negative) pairs that the scores order rightly; ties count half.

    Args:
        scores_N: float64 [N].
        positive_N: bool [N].

    Returns:
        The area, NaN where one class is missing.
    """
    positives, negatives = int(positive_N.sum()), int((~positive_N).sum())
    if not positives or not negatives:
        return float("nan")
    _, inverse, counts = np.unique(scores_N, return_inverse=True, return_counts=True)
    ranks_N = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks_N[positive_N].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def _figure(
    metric: str, count: int, of_rows: Callable[[np.ndarray], float], *, seed: int, resamples: int
) -> Figure:
    """Return a figure of the rows 0 ... count - 1, and its interval over rows drawn with replacement."""
    if count == 0:
        raise ValueError(f"{metric}: not one query was answered, so there is nothing to take a mean of.")
    random = np.random.default_rng([seed, count])
    value = of_rows(np.arange(count))
    if np.isnan(value):
        raise ValueError(f"{metric} needs queries of both classes; all {count} are of one.")
    found = np.array([of_rows(random.integers(count, size=count)) for _ in range(resamples)])
    low, high = np.nanpercentile(found, [2.5, 97.5]) if resamples else (value, value)
    return Figure(metric=metric, value=100 * value, low=100 * float(low), high=100 * float(high), count=count)
