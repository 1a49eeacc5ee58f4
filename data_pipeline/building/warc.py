"""Web archives: pages and images from the records of one WARC file; nothing is fetched."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from email.message import Message
from typing import IO, Any
from urllib.parse import urldefrag, urljoin

import fsspec
from warcio.archiveiterator import ArchiveIterator

from data_pipeline.building.config import BuildConfig
from data_pipeline.building.documents import Document, Tally, refuse
from data_pipeline.building.html import decode_page, page_items, read_page
from data_pipeline.building.plan import Part
from data_pipeline.building.storage import data_uri
from data_pipeline.errors import BadSampleError

_PAGE_TYPES = ("text/html", "application/xhtml+xml")
_RECORD_FAULTS = (Exception,)  # the libraries below raise anything from zlib.error to UnicodeDecodeError


class WarcImages:
    """The images of an archive by their address; their bytes stay in the file."""

    def __init__(self, path: str, fs: Any, max_bytes: int) -> None:
        """Read through the archive once.

        Args:
            path: the file.
            fs: its file system.
            max_bytes: largest image that is read.
        """
        self._fs, self._path, self._max_bytes = fs, path, max_bytes
        self._offsets: dict[str, int] = {}
        digests: dict[str, int] = {}
        repeats: list[tuple[str, str]] = []
        with fs.open(path, "rb") as file, contextlib.suppress(*_RECORD_FAULTS):
            # A damaged record ends this pass as it ends the next, which reports it.
            archive = ArchiveIterator(file)
            for record in archive:
                address = str(record.rec_headers.get_header("WARC-Target-URI") or "").strip("<>")
                digest = record.rec_headers.get_header("WARC-Payload-Digest")
                if record.rec_type == "revisit" and digest:
                    repeats.append((address, digest))
                elif _is_whole(record) and _content_type(record)[0].startswith("image/"):
                    self._offsets.setdefault(_plain(address), archive.offset)
                    if digest:
                        digests.setdefault(digest, archive.offset)
        for address, digest in repeats:
            if digest in digests:
                self._offsets.setdefault(_plain(address), digests[digest])

    def __len__(self) -> int:
        return len(self._offsets)

    def reader(self, page_url: str, base: str, src: str) -> Callable[[], bytes]:
        """Make what reads the image that a page refers to.

        Args:
            page_url: address of the page.
            base: its `<base href>`, or "".
            src: the reference.
        """
        if src[:5].lower() == "data:":
            return data_uri(src, self._max_bytes)
        try:
            address = _plain(urljoin(urljoin(page_url, base), src.strip()))
        except ValueError as error:
            return refuse("bad address", f"{src[:80]}: {error}")
        if not src.strip():
            return refuse("bad address", "empty")
        other = "http" + address[5:] if address.startswith("https:") else "https" + address[4:]
        offset = self._offsets.get(address, self._offsets.get(other))
        if offset is None:
            return refuse("not in the sources", address[:200])
        return lambda: self._read(offset, address)

    def _read(self, offset: int, address: str) -> bytes:
        try:
            with self._fs.open(self._path, "rb") as file:
                file.seek(offset)
                record = next(iter(ArchiveIterator(file)))
                blob: bytes = read_stream(record.content_stream(), self._max_bytes)
        except BadSampleError:
            raise
        except _RECORD_FAULTS as error:
            raise BadSampleError(
                "corrupt image", f"{address[:200]}: {type(error).__name__}: {error}"
            ) from error
        return blob


def read_stream(stream: IO[bytes], max_bytes: int) -> bytes:
    """Read a stream to its end; a compressed one may unpack to more than its record is long.

    Raises:
        BadSampleError: for more than `max_bytes`.
    """
    pieces, total = [], 0
    while piece := stream.read(1 << 16):
        pieces.append(piece)
        total += len(piece)
        if total > max_bytes:
            raise BadSampleError(f"over {max_bytes} bytes", "")
    return b"".join(pieces)


def read_warc(part: Part, config: BuildConfig, tally: Tally) -> Iterator[Document]:
    """Read the pages of an archive in the order of its records.

    A damaged record ends what can be read of the file: it is counted, and what stands before it is kept.
    """
    fs, path = fsspec.core.url_to_fs(part.source)
    images = WarcImages(path, fs, config.image.max_bytes)
    place = 0
    with fs.open(path, "rb") as file:
        archive = ArchiveIterator(file)
        records = iter(archive)
        while True:
            try:
                record = next(records, None)
                place = archive.offset if record is not None else place
            except _RECORD_FAULTS as error:
                detail = f"{type(error).__name__}: {str(error).strip()[:200]}"
                tally.drop("damaged archive", f"{part.name}, after the record at byte {place}", detail)
                return
            if record is None:
                return
            document = _read_page(record, f"{part.name}#{place}", images, config, tally)
            if document is not None:
                yield document


def _read_page(
    record: Any, locator: str, images: WarcImages, config: BuildConfig, tally: Tally
) -> Document | None:
    """Read one record if it is a page."""
    content_type, charset = _content_type(record)
    if not _is_whole(record) or content_type not in _PAGE_TYPES:
        return None
    url = str(record.rec_headers.get_header("WARC-Target-URI") or "").strip("<>")
    tally.counts["pages found"] += 1
    try:
        blob = read_stream(record.content_stream(), config.html.max_bytes)
    except BadSampleError as error:
        tally.drop("page too large", locator, f"{url}: {error.cause}")
        return None
    except _RECORD_FAULTS as error:
        tally.drop("damaged page", locator, f"{url}: {type(error).__name__}: {error}")
        return None
    try:
        page = read_page(decode_page(blob, charset), config.html)
    except BadSampleError as error:
        tally.drop(error.cause, locator, f"{url}: {error.detail}")
        return None
    items = page_items(page, lambda src: images.reader(url, page.base, src))
    name = url.partition("://")[2].partition("?")[0].removesuffix(".html").rstrip("/") or "page"
    return Document(locator=locator, name=f"{name}".replace(".", "_"), items=items, url=url)


def _is_whole(record: Any) -> bool:
    """Whether a record holds content that the server sent as a success."""
    if record.rec_type == "resource":
        return True
    headers = record.http_headers
    return record.rec_type == "response" and headers is not None and headers.get_statuscode() == "200"


def _content_type(record: Any) -> tuple[str, str | None]:
    """Media type of a record in lower case, and its charset."""
    if record.rec_type == "resource":
        raw = record.rec_headers.get_header("Content-Type")
    else:
        raw = record.http_headers.get_header("Content-Type") if record.http_headers is not None else None
    message = Message()
    message["Content-Type"] = str(raw or "").replace("\n", " ").replace("\r", " ")
    charset = message.get_param("charset")
    return message.get_content_type() if raw else "", charset if isinstance(charset, str) else None


def _plain(address: str) -> str:
    """Drop the fragment."""
    return urldefrag(address).url
