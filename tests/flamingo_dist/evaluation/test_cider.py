"""CIDEr against pycocoevalcap's tokens and scores (`write_caption_golden.py`), and what must hold of any captions."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flamingo_dist.evaluation.caption_tokens import caption_tokens
from flamingo_dist.evaluation.cider import cider_scores

GOLDEN: dict[str, Any] = json.loads(
    Path(__file__).with_name("golden_captions.json").read_text(encoding="utf-8")
)
WORDS = st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f"]), min_size=1, max_size=9)
IMAGES = st.lists(st.tuples(WORDS, st.lists(WORDS, min_size=1, max_size=3)), min_size=2, max_size=5)


@pytest.mark.parametrize("text", GOLDEN["tokens"])
def test_tokens_are_the_stanford_tokenizers(text: str) -> None:
    assert caption_tokens(text) == GOLDEN["tokens"][text]


def test_scores_are_pycocoevalcaps() -> None:
    captions = [caption_tokens(image["caption"]) for image in GOLDEN["images"]]
    references = [[caption_tokens(r) for r in image["references"]] for image in GOLDEN["images"]]
    scores = cider_scores(captions, references)
    assert scores == pytest.approx(GOLDEN["scores"], rel=1e-9, abs=1e-12)
    assert sum(scores) / len(scores) == pytest.approx(GOLDEN["cider"], rel=1e-9)


@given(IMAGES)
def test_a_caption_scores_most_where_it_is_the_reference(images: Any) -> None:
    references = [found for _, found in images]
    scores = cider_scores([caption for caption, _ in images], references)
    assert all(0 <= score <= 10 + 1e-9 for score in scores)
    alone = [[found[0]] for found in references]
    for own, other in zip(
        cider_scores([found[0] for found in references], alone),
        cider_scores([caption for caption, _ in images], alone),
        strict=True,
    ):
        assert own >= other - 1e-9


@given(IMAGES, st.randoms(use_true_random=False))
def test_the_order_of_images_and_references_does_not_matter(images: Any, random: Any) -> None:
    scores = cider_scores([caption for caption, _ in images], [found for _, found in images])
    order = list(range(len(images)))
    random.shuffle(order)
    turned = cider_scores([images[i][0] for i in order], [images[i][1][::-1] for i in order])
    assert turned == pytest.approx([scores[i] for i in order])


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(ValueError, match="2 captions and 1 lists"):
        cider_scores([["a"], ["b"]], [[["a"]]])
    with pytest.raises(ValueError, match="of which 1 are empty"):
        cider_scores([["a"]], [[]])


@given(st.text())
def test_any_text_has_tokens(text: str) -> None:
    assert all(token == token.lower().strip() and token for token in caption_tokens(text))
