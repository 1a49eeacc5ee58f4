"""Near-duplicate documents: MinHash signatures, bands, and the components that they join."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
from rensa import RMinHash

from data_pipeline.building.config import DedupConfig

_SEED = 1
_PUNCTUATION = re.compile(r"[\W_]+")
ALGORITHM = str(getattr(RMinHash, "ALGORITHM_VERSION", ""))
"""Version of the hashing; signatures of two versions are not compared."""


def signature(text: str, config: DedupConfig) -> np.ndarray:
    """Return the MinHash signature of a text's word shingles, uint32 [permutations]."""
    words = _PUNCTUATION.sub(" ", text.lower()).split()
    size = min(config.shingle, max(1, len(words)))
    shingles = {" ".join(words[i : i + size]) for i in range(len(words) - size + 1)}
    minhash = RMinHash(num_perm=config.permutations, seed=_SEED)
    minhash.update(sorted(shingles))
    return np.array(minhash.digest(), np.uint32)


def similarity(first: np.ndarray, second: np.ndarray) -> float:
    """Estimate the Jaccard similarity of two texts from their signatures, uint32 [permutations] each."""
    return float(np.mean(first == second))


def near_duplicates(signatures_NP: np.ndarray, config: DedupConfig) -> np.ndarray:
    """Find documents that are near-duplicates of an earlier one.

    Documents that agree on all rows of a band are compared with the first of them; pairs that reach the
    similarity are joined, and of each joined group the first document stays. The work is a sort a band.

    Args:
        signatures_NP: uint32 [N, permutations], in the order of the corpus.
        config: bands and least similarity.

    Returns:
        bool [N], True for those to be left out.
    """
    parent = np.arange(len(signatures_NP))
    for first, second in _candidates(signatures_NP, config.bands):
        a, b = _root(parent, first), _root(parent, second)
        if a != b and similarity(signatures_NP[first], signatures_NP[second]) >= config.jaccard:
            parent[max(a, b)] = min(a, b)
    return np.array([_root(parent, i) != i for i in range(len(parent))], np.bool_)


def _candidates(signatures_NP: np.ndarray, bands: int) -> Iterator[tuple[int, int]]:
    """Yield (first, other) of documents that agree on a band."""
    if len(signatures_NP) < 2:
        return
    rows = signatures_NP.shape[1] // bands
    for band in range(bands):
        part = np.ascontiguousarray(signatures_NP[:, band * rows : (band + 1) * rows])
        keys = part.view(np.dtype((np.void, part.itemsize * rows))).reshape(-1)
        order = np.argsort(keys, kind="stable")
        same = np.concatenate([[False], keys[order][1:] == keys[order][:-1]])
        # The first document of the run of equal keys that each place belongs to.
        firsts = order[np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))]
        for place in np.flatnonzero(same):
            yield int(firsts[place]), int(order[place])


def _root(parent: np.ndarray, node: int) -> int:
    """Find the group of a document, halving the path on the way."""
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = int(parent[node])
    return node
