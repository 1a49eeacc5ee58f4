"""Which examples a query is shown: a support set chosen by seed, then random or nearest ones (paper, section 4.2).

All draws depend on a seed and on keys alone, so that neither ranks nor batches nor the order of shards change them.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_SIMILARITY_DIGITS = 5
"""Layouts differ in the last bits of fp32 features: similarities that agree to so many digits are ties."""


def _hash(seed: int, *names: str) -> int:
    """Hash a seed and names to 64 bits."""
    text = "\0".join((str(seed), *names)).encode("utf-8", errors="surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


def choose_support(keys: Sequence[str], most: int, *, seed: int) -> list[int]:
    """Choose the support set by seed.

    Args:
        keys: of all examples that there are, all different.
        most: size of the support set; all examples where there are fewer (paper: 2,048).
        seed: of the choice.

    Returns:
        Places in `keys`, in an order that depends on the keys and the seed alone.
    """
    return sorted(range(len(keys)), key=lambda place: (_hash(seed, keys[place]), keys[place]))[:most]


def choose_per_class(keys: Sequence[str], labels: Sequence[str], most: int, *, seed: int) -> list[int]:
    """Choose a support set of at most so many examples of each class (paper: 32).

    Args:
        keys: of all examples that there are, all different.
        labels: class of each.
        most: examples of a class.
        seed: of the choice.

    Returns:
        Places in `keys`, in an order that depends on the keys and the seed alone.
    """
    taken: dict[str, int] = {}
    chosen = []
    for place in choose_support(keys, len(keys), seed=seed):
        taken[labels[place]] = taken.get(labels[place], 0) + 1
        if taken[labels[place]] <= most:
            chosen.append(place)
    return chosen


def drawn(query_key: str, support_keys: Sequence[str], *, seed: int) -> list[int]:
    """Return the support set in a random order of this query's own, without the query itself.

    The first n are its n demonstrations, so that those of 4 shots are among those of 8.

    Args:
        query_key: seeds the order, together with `seed`.
        support_keys: of the support set, in its order.
        seed: of the evaluation.

    Returns:
        Places in `support_keys`.
    """
    order = np.random.default_rng(_hash(seed, "demonstrations", query_key)).permutation(len(support_keys))
    return [place for place in order.tolist() if support_keys[place] != query_key]


def nearest(
    query_key: str, query_C: Tensor, support_keys: Sequence[str], support_NC: Tensor, *, most: int
) -> list[int]:
    """Return the support examples that look most like the query, the most similar last (RICES).

    Paper, appendix "In-context learning with retrieval": cosine of a frozen encoder's features. Equally similar ones
    stand in the order of the support set, and the query itself is none of them.

    Args:
        query_key: key of the query.
        query_C: its features, fp32 [C] (`pooled`).
        support_keys: of the support set, N.
        support_NC: their features, fp32 [N, C].
        most: how many.

    Returns:
        Places in `support_keys`, at most `most`.
    """
    similarity_N = (support_NC @ query_C).double().mul(10**_SIMILARITY_DIGITS).round()
    best = torch.argsort(similarity_N, descending=True, stable=True).tolist()
    return [place for place in best if support_keys[place] != query_key][:most][::-1]


def pooled(features_FSC: Tensor) -> Tensor:
    """Return the direction of a medium's mean feature, fp32 [C] of length 1.

    Args:
        features_FSC: a frozen encoder's features, [F, S, C] floating; frames and positions count alike.
    """
    return F.normalize(features_FSC.float().mean((0, 1)), dim=0)


def shuffles(query_key: str, count: int, most: int, *, seed: int) -> list[list[int]]:
    """Return different orders of `count` demonstrations to ensemble over, the given order first (paper: 6).

    Args:
        query_key: seeds the orders, together with `seed`.
        count: number of demonstrations.
        most: orders wanted; there are fewer where `count` has fewer permutations.
        seed: of the evaluation.
    """
    random = np.random.default_rng(_hash(seed, "orders", query_key))
    orders = [list(range(count))]
    possible = 1
    for factor in range(2, min(count, 8) + 1):
        possible *= factor
    while len(orders) < min(most, possible):
        order = random.permutation(count).tolist()
        if order not in orders:
            orders.append(order)
    return orders
