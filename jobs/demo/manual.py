"""The pages of an HTML manual as interleaved documents: text and figures in reading order."""

import json
from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath

from PIL import Image, UnidentifiedImageError

from jobs.demo.samples import RawSample, Split, share

MIN_IMAGE_BYTES = 2500
"""Smaller files are icons."""
MIN_SIDE = 64
"""Pixels; a smaller picture is an icon or a button."""
MAX_ASPECT = 3.0
"""Longer side over shorter side; beyond are bars and rulers."""
NAVIGATION_IMAGES = frozenset(
    {"prev", "next", "up", "home", "note", "tip", "warning", "caution", "important"}
)

_BLOCKS = frozenset(
    {"p", "div", "h1", "h2", "h3", "h4", "h5", "h6", "li", "dt", "dd", "ul", "ol", "dl", "tr", "table"}
    | {"pre", "br", "hr", "blockquote", "figure", "figcaption"}
)
_SILENT = frozenset({"head", "script", "style"})
_SILENT_CLASSES = frozenset({"navheader", "navfooter", "toc", "footnotes"})
_VOID = frozenset({"br", "hr", "img", "meta", "link", "input", "col"})


@dataclass(frozen=True)
class PageText:
    """A run of text; lines are blocks of the page."""

    text: str


@dataclass(frozen=True)
class PageImage:
    """A figure, by its path relative to the page."""

    src: str


@dataclass
class PageReader(HTMLParser):
    """Collects a page's text and images in the order of the document, without navigation."""

    items: list[PageText | PageImage] = field(default_factory=list)
    """What was read; complete after `close`."""

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._text: list[str] = []
        self._silent: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Enter an element: a block ends a line, an image is an item, navigation is skipped."""
        given = dict(attrs)
        if self._silent:
            if tag not in _VOID:
                self._silent.append(tag)
            return
        if tag in _SILENT or _SILENT_CLASSES & set((given.get("class") or "").split()):
            self._silent.append(tag)
        elif tag == "img":
            self._end_text()
            self.items.append(PageImage(given.get("src") or ""))
        elif tag in _BLOCKS:
            self._text.append("\n")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Handle `<tag/>`, which has no end tag of its own."""
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        """Leave an element."""
        if self._silent:
            if tag in self._silent:
                while self._silent.pop() != tag:
                    pass
        elif tag in _BLOCKS:
            self._text.append("\n")

    def handle_data(self, data: str) -> None:
        """Keep text, its white space closed up: only block elements end a line."""
        if not self._silent:
            lead, trail = data[:1].isspace(), data[-1:].isspace()
            self._text.append(" " * lead + " ".join(data.split()) + " " * trail)

    def close(self) -> None:
        """End the page and its last run of text."""
        super().close()
        self._end_text()

    def _end_text(self) -> None:
        lines = [" ".join(line.split()) for line in "".join(self._text).split("\n")]
        text = "\n".join(line for line in lines if line)
        self._text = []
        if text and self.items and isinstance(self.items[-1], PageText):
            self.items[-1] = PageText(self.items[-1].text + "\n" + text)
        elif text:
            self.items.append(PageText(text))


def read_page(html: str) -> list[PageText | PageImage]:
    """Return the text and images of a page in document order."""
    reader = PageReader()
    reader.feed(html)
    reader.close()
    return reader.items


def add_pages(folder: Path, fraction: float, *, train: Split, heldout: Split) -> None:
    """Share out the manual's pages over training and held-out documents.

    Args:
        folder: where the `.html` files are; image paths are relative to it.
        fraction: which part of the pages is held out.
        train: receives the training documents.
        heldout: receives the held-out documents.
    """
    for page in sorted(folder.glob("*.html")):
        target = heldout if share("page", page.stem) < fraction else train
        items = read_page(page.read_text(encoding="utf-8", errors="replace"))
        sample = document_sample(page.stem, items, folder, target.dropped)
        if sample is None:
            target.dropped["page without a picture"] += 1
        else:
            target.samples.append(sample)


def document_sample(
    name: str, items: list[PageText | PageImage], folder: Path, dropped: Counter[str]
) -> RawSample | None:
    """Return a page as a record of the interleaved layout, or None where no image of it is kept.

    Args:
        name: the page's name.
        items: from `read_page`.
        folder: what the images' paths are relative to.
        dropped: counts the images that are left out, by cause.
    """
    record: list[dict[str, str]] = []
    images: dict[str, bytes] = {}
    for item in items:
        if isinstance(item, PageImage):
            cause = _unfit(item.src, folder)
            if cause is not None:
                dropped[f"image: {cause}"] += 1
                continue
            path = folder / item.src
            extension = f"{len(images)}{path.suffix.lower()}"
            images[extension] = path.read_bytes()
            record.append({"image": extension})
        elif record and "text" in record[-1]:
            # An image between two runs of text was left out: the runs belong together.
            record[-1]["text"] += "\n" + item.text
        else:
            record.append({"text": item.text})
    if not images:
        return None
    text = json.dumps({"items": record}, ensure_ascii=False).encode()
    return RawSample(key=f"manual/{name.replace('.', '_')}", members={"json": text, **images})


def _unfit(src: str, folder: Path) -> str | None:
    """Return why the image `src` is left out, or None where it is kept."""
    path = folder / src
    if PurePosixPath(src).stem in NAVIGATION_IMAGES:
        return "navigation"
    if not src or not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
        return "not in the package"
    if path.stat().st_size < MIN_IMAGE_BYTES:
        return f"under {MIN_IMAGE_BYTES} bytes"
    try:
        with Image.open(path) as image:
            short, long = sorted(image.size)
    except (UnidentifiedImageError, OSError):
        return "unreadable"
    if short < MIN_SIDE:
        return f"side under {MIN_SIDE} pixels"
    if long / short > MAX_ASPECT:
        return f"longer than {MAX_ASPECT:g} times its width or height"
    return None
