"""Web pages: text and images in the order of the document, by a parser that follows the HTML standard."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from dataclasses import dataclass

from selectolax.lexbor import LexborHTMLParser, LexborNode

from data_pipeline.building.config import HtmlConfig
from data_pipeline.building.documents import ImageItem, TextItem, clean_text
from data_pipeline.errors import BadSampleError

_PARAGRAPHS = frozenset(
    {"p", "div", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "dl", "table", "pre", "blockquote", "figure"}
    | {"section", "article", "main", "header", "aside", "address", "hr", "body", "details", "fieldset"}
)
_LINES = frozenset({"br", "li", "dt", "dd", "tr", "figcaption", "caption", "summary", "option", "legend"})
_CELLS = frozenset({"td", "th"})
_TAG = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]*)")
_CLOSED_BY_OTHERS = frozenset(
    {
        "p",
        "li",
        "dt",
        "dd",
        "tr",
        "td",
        "th",
        "tbody",
        "thead",
        "tfoot",
        "colgroup",
        "option",
        "optgroup",
        "rp",
        "rt",
    }
    | {
        "area",
        "base",
        "br",
        "col",
        "embed",
        "hr",
        "img",
        "input",
        "link",
        "meta",
        "source",
        "track",
        "wbr",
        "param",
    }
)
"""Elements that hold nothing, or that often have no end tag of their own."""
_META_CHARSET = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([A-Za-z0-9_:.\-]{1,40})""", re.I)
_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_LAZY = ("data-src", "data-original", "data-lazy-src")
_PARAGRAPH, _LINE = "\x1e", "\x1f"  # controls that no text holds, since they are removed from it
_HIDDEN = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.I)


@dataclass(frozen=True)
class Page:
    """A page in reading order."""

    items: list[str | tuple[str, str]]
    """Texts, and (src, alternative text) of images."""
    base: str
    """`<base href>`, which relative references start from; "" where there is none."""


def decode_page(blob: bytes, charset: str | None = None) -> str:
    """Decode a page's bytes as browsers do: byte order mark, transport, `<meta>`, UTF-8, Windows-1252.

    Args:
        blob: the page.
        charset: what the transport said.
    """
    for mark, encoding in _BOMS:
        if blob.startswith(mark):
            return blob[len(mark) :].decode(encoding, errors="replace")
    declared = _META_CHARSET.search(blob[:4096])
    for name in (charset, declared.group(1).decode("ascii") if declared else None, "utf-8"):
        if name is None:
            continue
        try:
            info = codecs.lookup(name)
            if getattr(info, "_is_text_encoding", True):
                return blob.decode(info.name, errors="strict" if info.name == "utf-8" else "replace")
        except (LookupError, UnicodeError):
            continue
    return blob.decode("cp1252", errors="replace")


def read_page(html: str, config: HtmlConfig) -> Page:
    """Read a page.

    The tree is walked without recursion: pages nest elements thousands deep.

    Raises:
        BadSampleError: "page too large" for more nodes, or more of them open at once, than are allowed.
    """
    if _depth(html) > config.max_depth:
        raise BadSampleError("page too large", f"more than {config.max_depth} elements open at once")
    tree = LexborHTMLParser(html)
    reader = _Reader(config)
    base = tree.css_first("base[href]")
    root = tree.body or tree.root
    if root is not None:
        reader.walk(root)
    return Page(reader.finish(), (base.attributes.get("href") or "") if base is not None else "")


def _depth(html: str) -> int:
    """Return how many elements stand open at once at most, by their tags; a parser would take the square of it."""
    open_now = deepest = 0
    for end, name in _TAG.findall(html):
        if name.lower() not in _CLOSED_BY_OTHERS:
            open_now = max(0, open_now - 1) if end else open_now + 1
            deepest = max(deepest, open_now)
    return deepest


class _Reader:
    """Collects a page's texts and images."""

    def __init__(self, config: HtmlConfig) -> None:
        self._config = config
        self._skip_tags, self._skip_classes = frozenset(config.skip_tags), frozenset(config.skip_classes)
        self._items: list[str | tuple[str, str]] = []
        self._text: list[str] = []
        self._pre = 0

    def walk(self, root: LexborNode) -> None:
        """Visit the tree in document order."""
        visited = 0
        stack: list[tuple[LexborNode, bool]] = [(root, False)]
        while stack:
            node, leaving = stack.pop()
            if leaving:
                self._leave(node.tag or "")
                continue
            visited += 1
            if visited > self._config.max_nodes:
                raise BadSampleError("page too large", f"more than {self._config.max_nodes} nodes")
            # A neighbour waits below this node and its children, so that those come first.
            if node is not root and (after := node.next) is not None:
                stack.append((after, False))
            if node.is_text_node:
                self._add(node.text_content or "")
            elif node.is_element_node and not self._skipped(node):
                self._enter(node)
                stack.append((node, True))
                if (child := node.first_child) is not None:
                    stack.append((child, False))

    def finish(self) -> list[str | tuple[str, str]]:
        """End the last run of text and return everything."""
        self._end_text()
        return self._items

    def _skipped(self, node: LexborNode) -> bool:
        if node.tag in self._skip_tags:
            return True
        attributes = node.attributes
        if not attributes:
            return False
        if "hidden" in attributes or attributes.get("aria-hidden") == "true":
            return True
        if _HIDDEN.search(attributes.get("style") or ""):
            return True
        return not self._skip_classes.isdisjoint((attributes.get("class") or "").lower().split())

    def _enter(self, node: LexborNode) -> None:
        tag = node.tag
        if tag == "img":
            self._end_text()
            attributes = node.attributes
            self._items.append((_source(attributes), " ".join((attributes.get("alt") or "").split())))
        elif tag in _PARAGRAPHS:
            self._text.append(_PARAGRAPH)
            self._pre += tag == "pre"
        elif tag in _LINES:
            self._text.append(_LINE)

    def _leave(self, tag: str) -> None:
        if tag in _PARAGRAPHS:
            self._text.append(_PARAGRAPH)
            self._pre -= tag == "pre"
        elif tag in _LINES:
            self._text.append(_LINE)
        elif tag in _CELLS:
            self._text.append(" ")

    def _add(self, text: str) -> None:
        """Keep text with its white space closed up: only elements end a line, but in `<pre>`."""
        text = clean_text(text)
        if self._pre:
            self._text.append(text.replace("\n", _LINE))
            return
        closed = " ".join(text.split())
        lead, trail = text[:1].isspace(), text[-1:].isspace()
        self._text.append(" " * lead + closed + " " * (trail and bool(closed)))

    def _end_text(self) -> None:
        text = _tidy("".join(self._text))
        self._text = []
        if text:
            self._items.append(text)


def _tidy(text: str) -> str:
    """Close up spaces, drop empty lines and paragraphs; paragraphs are separated by an empty line."""
    paragraphs = []
    for paragraph in text.split(_PARAGRAPH):
        lines = [" ".join(line.split()) for line in paragraph.split(_LINE)]
        if kept := "\n".join(line for line in lines if line):
            paragraphs.append(kept)
    return "\n\n".join(paragraphs)


def _source(attributes: dict[str, str | None]) -> str:
    """Return the address of an image; pages that load lazily keep it elsewhere and show a blank meanwhile."""
    src = (attributes.get("src") or "").strip()
    if not src or src.startswith("data:image/gif") or src.startswith("data:image/svg"):
        for name in _LAZY:
            if value := (attributes.get(name) or "").strip():
                return value
        if candidates := (attributes.get("srcset") or attributes.get("data-srcset") or "").strip():
            return candidates.split(",")[-1].split()[0] if candidates.split(",")[-1].split() else src
    return src


def page_items(page: Page, resolve: Callable[[str], Callable[[], bytes]]) -> list[TextItem | ImageItem]:
    """Bind the images of a page to what reads them.

    Args:
        page: from `read_page`.
        resolve: makes the reader of an image from its address.
    """
    return [
        TextItem(item) if isinstance(item, str) else ImageItem(item[0], resolve(item[0]))
        for item in page.items
    ]
