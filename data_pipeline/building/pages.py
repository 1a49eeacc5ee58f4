"""Folders of web pages with their images beside them."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator
from functools import partial
from urllib.parse import unquote, urlsplit

from data_pipeline.building.config import BuildConfig
from data_pipeline.building.documents import Document, Tally
from data_pipeline.building.html import decode_page, page_items, read_page
from data_pipeline.building.plan import Part
from data_pipeline.building.storage import Folder, tree_reader
from data_pipeline.errors import BadSampleError


def read_pages(part: Part, config: BuildConfig, tally: Tally) -> Iterator[Document]:
    """Read the pages of one part in the order of their paths."""
    folder = Folder(part.source)
    for name in part.members:
        tally.counts["pages found"] += 1
        try:
            page = read_page(decode_page(folder.read(name, config.html.max_bytes)), config.html)
        except BadSampleError as error:
            cause = "page too large" if error.cause.startswith("over ") else error.cause
            tally.drop(cause, name, error.detail)
            continue
        resolve = partial(_reader, folder, _base(name, page.base), config.image.max_bytes)
        items = page_items(page, resolve)
        yield Document(locator=name, name=posixpath.splitext(name)[0], items=items)


def _reader(folder: Folder, start: str, max_bytes: int, src: str) -> Callable[[], bytes]:
    return tree_reader(folder, start, src, max_bytes)


def _base(page: str, base: str) -> str:
    """Return what relative references start from: the page, moved by a `<base>` that has no host."""
    try:
        parts = urlsplit(base)
    except ValueError:
        return page
    path = unquote(parts.path)
    if not path or parts.netloc or parts.scheme:
        return page
    return path.lstrip("/") if path.startswith("/") else posixpath.join(posixpath.dirname(page), path)
