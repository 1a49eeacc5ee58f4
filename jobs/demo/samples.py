"""What the readers of the demonstration's parts have in common: samples, counted drops, stable splits."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class RawSample:
    """One sample on its way into a shard."""

    key: str
    """Unique in its data set; no dot in the last part."""
    members: Mapping[str, bytes]
    """File contents by extension, as `data_pipeline.shards.ShardWriter.write` takes them."""


@dataclass(kw_only=True)
class Split:
    """The samples of one data set, and what was left out of it by cause."""

    samples: list[RawSample] = field(default_factory=list)
    """In the order in which they are written."""
    dropped: Counter[str] = field(default_factory=Counter)
    """How many candidates were left out, by cause."""


def share(*parts: str) -> float:
    """Return a number in [0, 1) that depends on `parts` alone.

    A thing is held out where its share is below the held-out fraction, so raising the fraction only ever adds
    to what is held out.
    """
    digest = hashlib.sha256("\0".join(parts).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def shuffled(samples: list[RawSample]) -> list[RawSample]:
    """Return `samples` in an order that looks random and depends on their keys alone.

    Sources come sorted by kind: without this a shard would hold one kind only.
    """
    return sorted(samples, key=lambda sample: (share("order", sample.key), sample.key))


def words(text: str) -> tuple[str, ...]:
    """Return the lower-case words of `text`, without punctuation and leading articles."""
    cleaned = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    while cleaned and cleaned[0] in {"a", "an", "the"}:
        cleaned = cleaned[1:]
    return tuple(cleaned)


def mentions(text: str, phrase: str) -> bool:
    """Return whether the words of `phrase` stand in `text` side by side (a plural s is allowed)."""
    wanted, given = words(phrase), words(text)
    if not wanted:
        return False
    for start in range(len(given) - len(wanted) + 1):
        window = given[start : start + len(wanted)]
        if all(a == b or a == b + "s" or a == b + "es" for a, b in zip(window, wanted, strict=True)):
            return True
    return False
