"""Samples as one self-contained HTML page: images in place, tokens, which token sees which image, the loss mask.

Everything of a sample is escaped and the page forbids scripts and loading: a corpus may hold hostile text.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from math import isqrt

import numpy as np
from PIL import Image

from data_pipeline.batch import Batch
from data_pipeline.tokenizer import Tokenizer

_GOLDEN_ANGLE = 137.508
_QUALITY = 85
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem}
body{color:#1c1c1c;background:#fafafa}
h1{font-size:1.3rem}
h2{font-size:1rem;margin:0 0 .6rem;font-family:ui-monospace,monospace;overflow-wrap:anywhere}
.legend,.meta{color:#555;font-size:.85rem}
.sample{background:#fff;border:1px solid #ddd;border-radius:8px;padding:1rem;margin:1rem 0}
.bad{border-color:#c33;background:#fff5f5}
.tokens{white-space:pre-wrap;overflow-wrap:anywhere}
.t{border-radius:2px;box-shadow:inset -1px 0 #0001}
.loss{border-bottom:2px solid #333}
.free{color:#777}
.special{font:.75rem ui-monospace,monospace;background:#444;color:#fff;padding:0 .3em;border-radius:3px}
.medium{display:inline-flex;gap:2px;align-items:flex-end;vertical-align:middle}
.medium{border:4px solid;border-radius:6px;margin:.3rem .3rem .3rem 0}
.medium b{font:.75rem ui-monospace,monospace;padding:0 .3em}
img{display:block;max-height:11rem}
"""


@dataclass(frozen=True, kw_only=True)
class PageInfo:
    """What stands above the samples."""

    title: str
    """Name of the data set or URL."""
    facts: dict[str, str]
    """Settings and counts, by name."""


def render_page(info: PageInfo, batches: Sequence[Batch], tokenizer: Tokenizer) -> str:
    """Render the samples of some batches.

    Args:
        info: heading.
        batches: tokens [B, T], media [B, M, F, 3, H, W] or [B, M, F, S, C].
        tokenizer: the one that made the tokens.

    Returns:
        The page; it needs no other file and no network.
    """
    most = max((batch.media_mask_BM.shape[1] for batch in batches), default=0)
    facts = " &middot; ".join(f"{escape(name)} {escape(value)}" for name, value in info.facts.items())
    cards = [card for batch in batches for card in _cards(batch, tokenizer)]
    colours = "".join(
        f".s{m}{{background:{_colour(m, 90)}}}.b{m}{{border-color:{_colour(m, 55)}}}"
        f".sample:has(.s{m}:hover) .b{m}{{outline:4px solid {_colour(m, 35)}}}"
        for m in range(1, most + 1)
    )
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; img-src data:; "
        "style-src 'unsafe-inline'\">"
        f"<title>{escape(info.title)}</title><style>{_STYLE}{colours}</style></head><body>"
        f"<h1>{escape(info.title)}</h1><p class=meta>{facts}</p>"
        "<p class=legend>A token's colour is the image that it sees; on white it sees none. "
        "<span class='t loss'>Underlined</span> tokens carry loss, <span class='t free'>grey</span> ones do not. "
        "Point at a token for its place and id.</p>" + "".join(cards) + "</body></html>\n"
    )


def _colour(medium: int, lightness: int) -> str:
    """Return the colour of a medium: neighbours lie far apart."""
    return f"hsl({medium * _GOLDEN_ANGLE % 360:.0f} 70% {lightness}%)"


def _cards(batch: Batch, tokenizer: Tokenizer) -> list[str]:
    """Render each sample of a batch; a slot that a bad sample emptied says why."""
    cards = []
    skips = iter(batch.skips)
    for b, key in enumerate(batch.keys):
        if key:
            cards.append(_card(batch, b, tokenizer))
            continue
        skip = next(skips, None)
        told = f"{skip.cause}: {skip.detail} ({skip.shard} {skip.key})" if skip is not None else "empty slot"
        cards.append(f"<div class='sample bad'><h2>skipped</h2>{escape(told)}</div>")
    return cards


def _card(batch: Batch, b: int, tokenizer: Tokenizer) -> str:
    """Render one sample."""
    tokens_T, loss_T, index_T = batch.tokens_BT[b], batch.loss_mask_BT[b], batch.media_index_BT[b]
    length = _length(tokens_T, loss_T, tokenizer)
    media = [medium_html(batch.media[b, m], int(m) + 1) for m in np.flatnonzero(batch.media_mask_BM[b])]
    parts: list[str] = []
    shown = 0
    for place in range(length):
        token, phi = int(tokens_T[place]), int(index_T[place])
        if token == tokenizer.image_id and shown < len(media):
            parts.append(media[shown])
            shown += 1
        carries = bool(loss_T[place])
        sees = f"sees image {phi}" if phi else "sees no image"
        hint = f"position {place}, id {token}, {sees}, {'loss' if carries else 'no loss'}"
        classes = f"t {'loss' if carries else 'free'}{f' s{phi}' if phi else ''}"
        parts.append(f'<span class="{classes}" title="{hint}">{token_html(token, tokenizer)}</span>')
    padding = len(tokens_T) - length
    with_loss, blind = int(loss_T.sum()), int((index_T[:length] == 0).sum())
    counts = f"{length} tokens, {with_loss} with loss, {blind} that see no image"
    meta = f"{counts}, {padding} of padding, {len(media)} media"
    return (
        f"<div class=sample><h2>{escape(batch.keys[b])}</h2><div class=tokens>{''.join(parts)}</div>"
        f"<div>{''.join(media[shown:])}</div><p class=meta>{meta}</p></div>"
    )


def _length(tokens_T: np.ndarray, loss_T: np.ndarray, tokenizer: Tokenizer) -> int:
    """Count the tokens before the padding, int64 and bool [T]; a padding id that carries loss is none."""
    real = np.flatnonzero((tokens_T != tokenizer.pad_id) | loss_T)
    return int(real[-1]) + 1 if len(real) else 0


def token_html(token: int, tokenizer: Tokenizer) -> str:
    """Show one token: its text, the name of a special one, or its bytes where it is a piece of a character."""
    names = {
        tokenizer.image_id: "<image>",
        tokenizer.eoc_id: "<EOC>",
        tokenizer.bos_id: "<BOS>",
        tokenizer.eos_id: "<EOS>",
        tokenizer.pad_id: "<PAD>",
    }
    if token in names:
        return f"<span class=special>{escape(names[token])}</span>"
    text = tokenizer.decode([token])
    if not text or "\ufffd" in text:
        return f"<span class=special>{token if token > 255 else f'{token:02x}'}</span>"
    return escape(text).replace("\n", "&#8629;\n")


def medium_html(medium: np.ndarray, number: int) -> str:
    """Show one medium with its number: frames side by side, or the strength of features.

    Args:
        medium: uint8 [F, 3, H, W] pixels, or float16 [F, S, C] features.
        number: m of the paper, from 1.
    """
    if medium.dtype == np.uint8:
        frames = [Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0))) for frame in medium]
        label = str(number)
    else:
        frames = [_feature_map(frame) for frame in medium]
        label = f"{number} features {list(medium.shape)}"
    images = "".join(f'<img src="data:image/jpeg;base64,{_jpeg(frame)}" alt="">' for frame in frames)
    return f'<span class="medium b{number}"><b>{label}</b>{images}</span>'


def _feature_map(features_SC: np.ndarray) -> Image.Image:
    """Draw the norm of each position, of float16 [S, C]; as a square where S is one."""
    norms_S = np.linalg.norm(features_SC.astype(np.float32), axis=-1)
    span = float(norms_S.max() - norms_S.min()) or 1.0
    levels_S = ((norms_S - norms_S.min()) / span * 255).astype(np.uint8)
    side = isqrt(len(levels_S))
    grid = levels_S.reshape(side, side) if side * side == len(levels_S) else levels_S[None]
    image = Image.fromarray(grid)
    scale = max(1, 96 // max(image.size))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def _jpeg(image: Image.Image) -> str:
    buffer = BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=_QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()
