"""What every source gives: documents of text and image references, or media with captions."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from data_pipeline.errors import BadSampleError

_EXAMPLES = 5
_UNSAFE = re.compile(r"[^A-Za-z0-9_\-]+")
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
_KEY_CHARS = 80


@dataclass(frozen=True, slots=True)
class TextItem:
    """A run of text; blocks are separated by an empty line, lines by a line break."""

    text: str


@dataclass(frozen=True, slots=True)
class ImageItem:
    """An image that a document refers to; its bytes are read only when they are wanted."""

    src: str
    """The reference as the document gives it."""
    load: Callable[[], bytes]
    """Reads the bytes; raises BadSampleError for one that cannot or must not be read."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """An interleaved document before it is filtered."""

    locator: str
    """Where it stands: file name and place in it. Unique in the corpus."""
    name: str
    """Readable part of its key."""
    items: list[TextItem | ImageItem]
    """In reading order."""
    url: str = ""
    """Address of the page, where it has one."""


@dataclass(frozen=True, kw_only=True)
class Captioned:
    """An image or clip with its caption before it is filtered."""

    locator: str
    """Where it stands. Unique in the corpus."""
    name: str
    """Readable part of its key."""
    caption: str
    """The text."""
    load: Callable[[], bytes]
    """Reads the encoded medium."""
    extension: str
    """Ending of the medium's file."""
    url: str = ""
    """Address that the medium came from, where it is known."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample that is kept."""

    key: str
    """Unique in the corpus; no dot in its last part."""
    members: Mapping[str, bytes]
    """Bytes by extension, in writing order."""
    words: int
    """Words of its text."""
    media: int
    """Images or clips."""
    signature: bytes = b""
    """MinHash signature, little-endian uint32 [permutations]; empty where documents are not compared."""


@dataclass
class Tally:
    """Counts of what was read, kept and left out, with a few examples of each cause."""

    counts: Counter[str] = field(default_factory=Counter)
    """`documents read`, `images read`, ..."""
    documents: Counter[str] = field(default_factory=Counter)
    """Samples left out, by cause."""
    images: Counter[str] = field(default_factory=Counter)
    """Images left out, by cause."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """By cause, the first places where it was met."""

    def drop(self, cause: str, where: str, detail: str = "") -> None:
        """Count a sample that is left out."""
        self.documents[cause] += 1
        self._example(cause, where, detail)

    def drop_image(self, cause: str, where: str, detail: str = "") -> None:
        """Count an image that is left out."""
        self.images[cause] += 1
        self._example(f"image: {cause}", where, detail)

    def _example(self, cause: str, where: str, detail: str) -> None:
        held = self.examples.setdefault(cause, [])
        if len(held) < _EXAMPLES:
            held.append(f"{where}: {detail}"[:300] if detail else where[:300])

    def merge(self, other: Tally) -> None:
        """Add what another part counted; parts are merged in their order."""
        self.counts.update(other.counts)
        self.documents.update(other.documents)
        self.images.update(other.images)
        for cause, examples in other.examples.items():
            held = self.examples.setdefault(cause, [])
            held += examples[: _EXAMPLES - len(held)]

    def to_json(self) -> dict[str, object]:
        """Return plain values, sorted, so that equal counts are equal bytes."""
        return {
            "counts": dict(sorted(self.counts.items())),
            "documents": dict(sorted(self.documents.items())),
            "images": dict(sorted(self.images.items())),
            "examples": dict(sorted(self.examples.items())),
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, dict[str, object]]) -> Tally:
        """Read what `to_json` gave."""
        made = cls()
        for name in ("counts", "documents", "images"):
            getattr(made, name).update(stored[name])
        made.examples = {cause: list(rows) for cause, rows in stored["examples"].items()}  # type: ignore[call-overload]  # JSON lists
        return made


def sample_key(name: str, locator: str) -> str:
    """Make a key: a readable name and a hash of the place, so that no two samples of a corpus share one."""
    readable = "/".join(_UNSAFE.sub("_", part).strip("_") for part in name.split("/"))
    readable = "/".join(part for part in readable.split("/") if part)[-_KEY_CHARS:].lstrip("/_") or "sample"
    return f"{readable}-{hashlib.sha256(locator.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def clean_text(text: str) -> str:
    """Remove NUL bytes, control characters and lone surrogates, which tokenizers and JSON readers choke on."""
    return _CONTROLS.sub("", text)


def refuse(cause: str, detail: str = "") -> Callable[[], bytes]:
    """Make the `load` of an image that is known to be of no use."""

    def load() -> bytes:
        raise BadSampleError(cause, detail)

    return load
