"""Samples to token sequences: the paper's formats, the image-causal index phi, and which tokens carry loss.

Pairs and videos read `<BOS><image>caption<EOC><EOS>`, documents
`<BOS>{lead}<EOC><image>{text}<EOC><image>...<EOC>` (paper, sections 2.4 and A.3). phi[l] is the medium that
position l sees: the last one at or before it. Paper: phi "maps to the next image instead" with probability
p_next. As the hidden state at position l predicts token l + 1, an `<image>` tag sees its own image in the
normal mode, and the following one in the next-image mode.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.errors import BadSampleError
from data_pipeline.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenizedSample:
    """One sample as tokens, before padding; t is at most the data set's T."""

    tokens_T: np.ndarray
    """int64 [t]."""
    loss_mask_T: np.ndarray
    """bool [t]; True where the token is a target that carries loss."""
    media_index_T: np.ndarray
    """int32 [t]; 0 sees nothing, m sees the m-th of `media`."""
    media: tuple[str, ...]
    """Members of the sample that fill media slots 1, 2, ... in this order."""


@dataclass(frozen=True, slots=True)
class ImageItem:
    """An image in a document: the name of its member, as "0.png"."""

    member: str


def media_index(is_image_T: np.ndarray, *, next_image: bool = False) -> np.ndarray:
    """Compute phi.

    Args:
        is_image_T: bool [T], True at `<image>` tags.
        next_image: False: last image at or before each position. True: first image after it.

    Returns:
        int32 [T], 0 where there is no such image, else the number of the image counted from 1.
    """
    before_T = np.cumsum(is_image_T, dtype=np.int32)
    if not next_image:
        return before_T
    total = int(before_T[-1]) if len(before_T) else 0
    return np.where(before_T < total, before_T + 1, 0).astype(np.int32)


def format_caption(
    caption: str, medium: str, tokenizer: Tokenizer, *, seq_len: int, leading_space: bool
) -> TokenizedSample:
    """Format a pair or a video: `<BOS><image>caption<EOC><EOS>`.

    A caption that does not fit is cut and loses `<EOC><EOS>`, so that no false end is taught.

    Args:
        caption: text; white space around it is removed.
        medium: member that holds the image or video.
        tokenizer: the language model's tokenizer.
        seq_len: T.
        leading_space: puts one space before the caption (paper: with probability 0.5).

    Raises:
        BadSampleError: "empty caption".
    """
    caption = caption.strip()
    if not caption:
        raise BadSampleError("empty caption", "nothing but white space")
    ids = tokenizer.encode(" " + caption if leading_space else caption)
    tokens = [tokenizer.bos_id, tokenizer.image_id, *ids, tokenizer.eoc_id, tokenizer.eos_id][:seq_len]
    tokens_T = np.array(tokens, np.int64)
    loss_mask_T = np.ones(len(tokens), np.bool_)
    loss_mask_T[:2] = False
    index_T = media_index(tokens_T == tokenizer.image_id)
    return TokenizedSample(tokens_T=tokens_T, loss_mask_T=loss_mask_T, media_index_T=index_T, media=(medium,))


def parse_document(blob: bytes) -> list[str | ImageItem]:
    """Read the JSON of an interleaved document: texts and images in reading order.

    Raises:
        BadSampleError: "bad document" when it is not `{"items": [{"text": ...} | {"image": ...}, ...]}`.
    """
    try:
        rows = json.loads(blob)["items"]
        items: list[str | ImageItem] = []
        for row in rows:
            if isinstance(row.get("text"), str):
                items.append(row["text"].replace("\0", ""))
            elif isinstance(row.get("image"), str):
                items.append(ImageItem(row["image"]))
            else:
                raise ValueError(f"item {row!r} has neither text nor image")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadSampleError("bad document", f"{type(error).__name__}: {error}"[:300]) from error
    return items


def format_document(
    items: Sequence[str | ImageItem],
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    max_media: int,
    next_image: bool = False,
    rng: np.random.Generator | None = None,
    loss_before_first_image: bool = True,
    window_needs_image: bool = True,
) -> TokenizedSample:
    """Format a document and cut a window of at most `seq_len` tokens with at most `max_media` images.

    The window ends before the first image that does not fit, so that no text sees a wrong image. Text of a
    window before its first image sees nothing (normal mode), as does text after its last one (next-image
    mode).

    Args:
        items: texts and images in reading order.
        tokenizer: the language model's tokenizer.
        seq_len: T.
        max_media: M; the first M images of the window are kept.
        next_image: phi points to the next image (paper: drawn with probability p_next for each document).
        rng: draws the window's start; None starts at the document's beginning.
        loss_before_first_image: False takes the loss from every target whose predicting position sees no
            image.
        window_needs_image: draws only among windows that hold an image, if the document has one: a window
            without one would train nothing but the gated feed-forward.

    Raises:
        BadSampleError: "no text" when no text token of the window carries loss.
    """
    tokens_T, names = _document_tokens(items, tokenizer)
    tags = np.flatnonzero(tokens_T == tokenizer.image_id)
    start = 0
    if rng is not None and len(tokens_T) > seq_len:
        start = _draw_start(tags, len(tokens_T), seq_len, rng, needs_image=window_needs_image)
    stop = min(start + seq_len, len(tokens_T))
    inside = np.flatnonzero((tags >= start) & (tags < stop))
    if len(inside) > max_media:
        stop = int(tags[inside[max_media]])
        inside = inside[:max_media]
    window_T = tokens_T[start:stop]
    is_image_T = window_T == tokenizer.image_id
    index_T = media_index(is_image_T, next_image=next_image)
    loss_mask_T = ~is_image_T
    # Nothing predicts the first token of a window; at the document's beginning it is BOS.
    loss_mask_T[:1] = False
    if not loss_before_first_image:
        loss_mask_T[1:] &= index_T[:-1] > 0
    if not (loss_mask_T & (window_T < tokenizer.vocab_size)).any():
        raise BadSampleError("no text", f"no text token with loss among {len(window_T)} tokens")
    return TokenizedSample(
        tokens_T=window_T,
        loss_mask_T=loss_mask_T,
        media_index_T=index_T,
        media=tuple(names[i] for i in inside),
    )


def _document_tokens(items: Sequence[str | ImageItem], tokenizer: Tokenizer) -> tuple[np.ndarray, list[str]]:
    """Tokenize a whole document: int64 [t] and the members of its images in order.

    Texts that follow one another are joined by a line break; white space around a run of text is removed.
    """
    tokens = [tokenizer.bos_id]
    names: list[str] = []
    run: list[str] = []

    def flush() -> None:
        text = "\n".join(part for part in (p.strip() for p in run) if part)
        tokens.extend(tokenizer.encode(text) if text else [])
        tokens.append(tokenizer.eoc_id)
        run.clear()

    for item in items:
        if isinstance(item, str):
            run.append(item)
        else:
            flush()
            tokens.append(tokenizer.image_id)
            names.append(item.member)
    flush()
    return np.array(tokens, np.int64), names


def _draw_start(
    tags: np.ndarray, length: int, seq_len: int, rng: np.random.Generator, *, needs_image: bool
) -> int:
    """Draw the first position of a window from those that are allowed.

    Args:
        tags: positions of `<image>` in the document, int64 [images].
        length: tokens of the document, more than seq_len.
        seq_len: T.
        rng: source of the draw.
        needs_image: allows only windows that hold a tag with at least one token after it.
    """
    starts = length - seq_len + 1
    if not needs_image or len(tags) == 0:
        return int(rng.integers(starts))
    # A tag at p lies inside, with a token after it, for starts p - seq_len + 2 ... p.
    edges = np.zeros(starts + 1, np.int64)
    np.add.at(edges, np.clip(tags - seq_len + 2, 0, starts), 1)
    np.add.at(edges, np.clip(tags + 1, 0, starts), -1)
    allowed = np.flatnonzero(np.cumsum(edges[:-1]) > 0)
    return int(allowed[rng.integers(len(allowed))]) if len(allowed) else int(rng.integers(starts))
