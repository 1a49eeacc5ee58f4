"""What a saved position knows of the contents of shards: a few numbers, however many shards there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_PRIME = (1 << 61) - 1
_HEX_DIGITS = 15  # of a digest, 60 bits: below the prime


def summarise(digests: Sequence[str]) -> dict[str, list[int]]:
    """Sum up the digests of shards so that two sums of the same shards tell which one of them changed.

    With the digest h of shard n, the sums of h, n h and n^2 h modulo a prime are kept. When one shard has another
    digest, the three move by d, n d and n^2 d: their quotients give n.

    Args:
        digests: at least 15 hexadecimal digits a shard, or "" where none is known.

    Returns:
        `of`: how many digests are known, and a sum that tells of which shards; `sums`: the three.
    """
    known = of = first = second = third = 0
    for number, digest in enumerate(digests):
        if digest:
            h = int(digest[:_HEX_DIGITS], 16)
            known, of = known + 1, of + (number + 1) ** 2
            first, second, third = first + h, second + h * number, third + h * number * number
    return {"of": [known, of % _PRIME], "sums": [first % _PRIME, second % _PRIME, third % _PRIME]}


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Compare two summaries of the same number of shards.

    Args:
        before: an earlier `summarise`.
        now: a later one.

    Returns:
        None where nothing changed, or where digests of other shards were known: these cannot be compared. Else the
        number of the shard that changed, or () for several.
    """
    if before["of"] != now["of"] or before["sums"] == now["sums"]:
        return None
    moved = [(new - old) % _PRIME for old, new in zip(before["sums"], now["sums"], strict=True)]
    if not moved[0] or moved[1] * moved[1] % _PRIME != moved[0] * moved[2] % _PRIME:
        return ()
    return (moved[1] * pow(moved[0], -1, _PRIME) % _PRIME,)
