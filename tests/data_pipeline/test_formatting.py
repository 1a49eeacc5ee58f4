"""Formats, phi, windows and loss masks, against a slow reference written from the paper's sentences."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import BadSampleError
from data_pipeline.formatting import ImageItem, format_caption, format_document, media_index, parse_document
from data_pipeline.tokenizer import Tokenizer

TOK = Tokenizer.bytes_level()
BOS, EOS, IMG, EOC = TOK.bos_id, TOK.eos_id, TOK.image_id, TOK.eoc_id

texts = st.text(alphabet="abc d", min_size=0, max_size=12)
documents = st.lists(
    st.one_of(texts, st.integers(0, 9).map(lambda i: ImageItem(f"{i}.png"))), min_size=1, max_size=12
)


def slow_phi(tokens: list[int], next_image: bool) -> list[int]:
    """For each position, look along the sequence for the image it sees."""
    tags = [p for p, t in enumerate(tokens) if t == IMG]
    phi = []
    for position in range(len(tokens)):
        if next_image:
            after = [n for n, p in enumerate(tags, 1) if p > position]
            phi.append(after[0] if after else 0)
        else:
            before = [n for n, p in enumerate(tags, 1) if p <= position]
            phi.append(before[-1] if before else 0)
    return phi


def slow_document(items: list[object]) -> list[int]:
    """<BOS>{lead}<EOC><image>{text}<EOC><image>...<EOC>, through a string with one character a tag."""
    string = ""
    for item in items:
        string += "\x01" if isinstance(item, ImageItem) else f"\x02{item}"
    segments = string.split("\x01")
    tokens = [BOS]
    for number, segment in enumerate(segments):
        parts = [p.strip() for p in segment.split("\x02") if p.strip()]
        tokens += ([IMG] if number else []) + list("\n".join(parts).encode()) + [EOC]
    return tokens


@given(st.lists(st.booleans(), max_size=40), st.booleans())
def test_phi_equals_the_slow_reference(tags: list[bool], next_image: bool) -> None:
    phi = media_index(np.array(tags, np.bool_), next_image=next_image)
    assert phi.dtype == np.int32
    assert phi.tolist() == slow_phi([IMG if t else 0 for t in tags], next_image)


@given(documents, st.integers(8, 60), st.integers(1, 4), st.booleans(), st.integers(0, 2**32), st.booleans())
def test_document_windows(
    items: list[str | ImageItem], seq_len: int, max_media: int, next_image: bool, seed: int, loss_before: bool
) -> None:
    whole = slow_document(items)
    names = [item.member for item in items if isinstance(item, ImageItem)]
    try:
        sample = format_document(
            items,
            TOK,
            seq_len=seq_len,
            max_media=max_media,
            next_image=next_image,
            rng=np.random.default_rng(seed),
            loss_before_first_image=loss_before,
        )
    except BadSampleError:
        # A document with text that fits as a whole is never refused.
        fits = len(whole) <= seq_len and len(names) <= max_media
        assert not (loss_before and fits and any(t < 256 for t in whole))
        return
    tokens = sample.tokens_T.tolist()
    assert 1 <= len(tokens) <= seq_len
    # A window is a contiguous piece of the document, at which the names of the images agree.
    places = [s for s in range(len(whole)) if whole[s : s + len(tokens)] == tokens]
    assert any(tuple(names[whole[:s].count(IMG) :][: tokens.count(IMG)]) == sample.media for s in places), (
        "no such window"
    )
    assert len(sample.media) == tokens.count(IMG) <= max_media
    if IMG in whole:
        assert IMG in tokens[:-1], "the document has images, so the window has one with a token after it"
    # A window ends early only before an image that did not fit.
    if len(tokens) < min(seq_len, len(whole)):
        assert len(sample.media) == max_media
        assert any(whole[s + len(tokens)] == IMG for s in places if s + len(tokens) < len(whole))
    assert sample.media_index_T.tolist() == slow_phi(tokens, next_image)
    assert sample.media_index_T.max() <= len(sample.media)
    for position, token in enumerate(tokens):
        wanted = position > 0 and token not in (IMG, BOS)
        if wanted and not loss_before:
            wanted = slow_phi(tokens, next_image)[position - 1] > 0
        assert sample.loss_mask_T[position] == wanted


@given(texts, st.integers(8, 40), st.booleans())
def test_captions(caption: str, seq_len: int, space: bool) -> None:
    if not caption.strip():
        with pytest.raises(BadSampleError, match="empty caption"):
            format_caption(caption, "png", TOK, seq_len=seq_len, leading_space=space)
        return
    sample = format_caption(caption, "png", TOK, seq_len=seq_len, leading_space=space)
    body = list(((" " if space else "") + caption.strip()).encode())
    whole = [BOS, IMG, *body, EOC, EOS]
    assert sample.tokens_T.tolist() == whole[:seq_len]
    assert sample.loss_mask_T.tolist() == ([False, False] + [True] * (len(whole) - 2))[:seq_len]
    assert sample.media_index_T.tolist() == ([0] + [1] * (len(whole) - 1))[:seq_len]
    assert sample.media == ("png",)


def test_the_papers_figure() -> None:
    items: list[str | ImageItem] = ["Hi", ImageItem("0.png"), "a", ImageItem("1.png"), "b"]
    sample = format_document(items, TOK, seq_len=64, max_media=5)
    h, i, a, b = (ord(c) for c in "Hiab")
    assert sample.tokens_T.tolist() == [BOS, h, i, EOC, IMG, a, EOC, IMG, b, EOC]
    assert sample.media_index_T.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    following = format_document(items, TOK, seq_len=64, max_media=5, next_image=True)
    assert following.media_index_T.tolist() == [1, 1, 1, 1, 2, 2, 2, 0, 0, 0]
    assert sample.media == following.media == ("0.png", "1.png")


def test_a_surplus_image_cuts_the_window_so_nothing_sees_a_wrong_one() -> None:
    items: list[str | ImageItem] = []
    for n in range(3):
        items += [ImageItem(f"{n}.png"), f"t{n}"]
    for following in (False, True):
        sample = format_document(items, TOK, seq_len=64, max_media=2, next_image=following)
        assert bytes(t for t in sample.tokens_T if t < 256) == b"t0t1"
        assert sample.tokens_T[-1] == EOC
        assert sample.media == ("0.png", "1.png")
    # In next-image mode the text of the last kept image belongs to the dropped one: it sees nothing.
    assert sample.media_index_T[-3:].tolist() == [0, 0, 0]


def test_consecutive_images_show_the_last_only() -> None:
    items: list[str | ImageItem] = ["x", ImageItem("0.png"), ImageItem("1.png"), "y"]
    sample = format_document(items, TOK, seq_len=64, max_media=5)
    assert sample.tokens_T.tolist() == [BOS, ord("x"), EOC, IMG, EOC, IMG, ord("y"), EOC]
    assert sample.media_index_T.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]


def test_window_in_the_middle_sees_nothing_before_its_first_image() -> None:
    items: list[str | ImageItem] = ["a" * 50, ImageItem("0.png"), "b" * 50, ImageItem("1.png"), "c" * 50]
    starts = set()
    for seed in range(200):
        sample = format_document(items, TOK, seq_len=20, max_media=2, rng=np.random.default_rng(seed))
        tags = np.flatnonzero(sample.tokens_T == IMG)
        assert len(tags) == 1
        assert tags[0] < 19, "text follows the image"
        assert (sample.media_index_T[: tags[0]] == 0).all()
        assert (sample.media_index_T[tags[0] :] == 1).all()
        own = ord("b") if sample.media == ("0.png",) else ord("c")
        assert set(sample.tokens_T[tags[0] + 1 :]) <= {own, EOC}
        starts.add((int(tags[0]), sample.media))
    assert len(starts) > 25, "windows differ"


def test_no_text() -> None:
    with pytest.raises(BadSampleError, match="no text"):
        format_document([ImageItem("0.png"), ImageItem("1.png")], TOK, seq_len=64, max_media=5)
    # "text <image>": without loss before the first image nothing is left to learn.
    only_lead: list[str | ImageItem] = ["lead", ImageItem("0.png")]
    assert format_document(only_lead, TOK, seq_len=64, max_media=5).loss_mask_T.sum() == 6
    with pytest.raises(BadSampleError, match="no text"):
        format_document(only_lead, TOK, seq_len=64, max_media=5, loss_before_first_image=False)
    with pytest.raises(BadSampleError, match="no text"):
        format_document([], TOK, seq_len=64, max_media=5)


def test_text_cannot_forge_tags() -> None:
    sample = format_caption("<image><EOC>", "png", TOK, seq_len=64, leading_space=False)
    assert (sample.tokens_T == IMG).sum() == 1


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"{",
        b"[]",
        b'{"items": 3}',
        b'{"items": [{"video": "x"}]}',
        b'{"items": ["x"]}',
        b"\xff\xfe",
        b"[" * 9999,
    ],
)
def test_bad_documents(blob: bytes) -> None:
    with pytest.raises(BadSampleError, match="bad document"):
        parse_document(blob)


def test_parse_document() -> None:
    blob = json.dumps({"items": [{"text": "a"}, {"image": "0.png"}]}).encode()
    assert parse_document(blob) == ["a", ImageItem("0.png")]
