"""CIDEr-D of generated captions (Vedantam et al. 2015, section 5), as pycocoevalcap's `Cider` computes it."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeAlias

_ORDERS = 4
"""n-grams of one to four words."""
_SIGMA = 6.0
"""Width of the penalty on lengths that differ, in n-grams."""

_NGram: TypeAlias = tuple[str, ...]
_Vector: TypeAlias = tuple[dict[_NGram, float], ...]
"""tf-idf weights of a caption's n-grams, by n."""


def cider_scores(
    captions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> list[float]:
    """Score one generated caption an image against people's; CIDEr is the mean, tables show it x 100.

    n-grams are weighed by how few images' references hold them, so a score depends on all the images. What
    pycocoevalcap does besides is kept, that figures may be compared: lengths are counted in pairs of words, and an
    n-gram of no reference weighs as one of a single image.

    Args:
        captions: tokens of the generated caption of each image (`caption_tokens`).
        references: for each image, tokens of its reference captions, at least one.

    Returns:
        One score an image, from 0; 10 for a caption that equals the only reference.

    Raises:
        ValueError: unequal numbers, or an image without a reference.
    """
    if len(captions) != len(references) or not all(references):
        raise ValueError(
            f"cider_scores() got {len(captions)} captions and {len(references)} lists of references, of which "
            f"{sum(not r for r in references)} are empty: give one caption and at least one reference an image."
        )
    counted = [[_n_grams(reference) for reference in image] for image in references]
    images_with: Counter[_NGram] = Counter()
    for image in counted:
        images_with.update(set().union(*image))
    log_images = math.log(max(len(references), 1))
    return [
        _score(_n_grams(caption), image, images_with, log_images)
        for caption, image in zip(captions, counted, strict=True)
    ]


def _n_grams(tokens: Sequence[str]) -> Counter[_NGram]:
    """Count the n-grams of a caption."""
    return Counter(
        tuple(tokens[start : start + n])
        for n in range(1, _ORDERS + 1)
        for start in range(len(tokens) - n + 1)
    )


def _score(
    caption: Counter[_NGram],
    references: Sequence[Counter[_NGram]],
    images_with: Mapping[_NGram, int],
    log_images: float,
) -> float:
    """Return the mean similarity to the references over n, x 10."""
    own, own_length = _weigh(caption, images_with, log_images)
    total = 0.0
    for reference in references:
        theirs, their_length = _weigh(reference, images_with, log_images)
        penalty = math.exp(-((own_length - their_length) ** 2) / (2 * _SIGMA**2))
        total += penalty * sum(map(_clipped_cosine, own, theirs)) / _ORDERS
    return 10.0 * total / len(references)


def _weigh(
    counts: Counter[_NGram], images_with: Mapping[_NGram, int], log_images: float
) -> tuple[_Vector, int]:
    """Return tf-idf weights by n, and the length in pairs of words."""
    vector: _Vector = tuple({} for _ in range(_ORDERS))
    for n_gram, count in counts.items():
        rarity = log_images - math.log(max(1, images_with.get(n_gram, 0)))
        vector[len(n_gram) - 1][n_gram] = count * rarity
    return vector, sum(count for n_gram, count in counts.items() if len(n_gram) == 2)


def _clipped_cosine(own: Mapping[_NGram, float], theirs: Mapping[_NGram, float]) -> float:
    """Return the cosine, to which an n-gram adds no more than the reference's own weight."""
    product = sum(
        min(weight, theirs.get(n_gram, 0.0)) * theirs.get(n_gram, 0.0) for n_gram, weight in own.items()
    )
    norms = math.sqrt(sum(w * w for w in own.values()) * sum(w * w for w in theirs.values()))
    return product / norms if norms else 0.0
