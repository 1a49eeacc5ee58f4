"""From what a source gives to what a corpus keeps: every filter, every drop counted."""

from __future__ import annotations

import json

from data_pipeline.building.config import BuildConfig
from data_pipeline.building.dedup import signature
from data_pipeline.building.documents import (
    Captioned,
    Document,
    ImageItem,
    Sample,
    Tally,
    TextItem,
    clean_text,
    sample_key,
)
from data_pipeline.building.images import HashIndex, check_image
from data_pipeline.building.quality import caption_fault, text_fault
from data_pipeline.building.video import check_video
from data_pipeline.errors import BadSampleError


class Filter:
    """Applies the filters of a configuration."""

    def __init__(
        self, config: BuildConfig, evaluation: HashIndex | None = None, *, source_number: int = 0
    ) -> None:
        """Hold the limits.

        Args:
            config: the build.
            evaluation: hashes of evaluation images that must not be in the corpus.
            source_number: place of the source among all; part of the keys but for the first one's.
        """
        self._prefix = f"{source_number}:" if source_number else ""
        self._config = config
        self._evaluation = evaluation if evaluation is not None and len(evaluation) else None

    def apply(self, found: Document | Captioned, tally: Tally) -> Sample | None:
        """Filter one document or captioned medium; None where nothing is kept.

        Args:
            found: what a source gave.
            tally: counts what is read, kept and left out.
        """
        if isinstance(found, Document):
            return self._document(found, tally)
        return self._captioned(found, tally)

    def _document(self, document: Document, tally: Tally) -> Sample | None:
        tally.counts["read"] += 1
        texts = [clean_text(item.text) for item in document.items if isinstance(item, TextItem)]
        text = "\n\n".join(part for part in texts if part.strip())
        references = sum(isinstance(item, ImageItem) for item in document.items)
        tally.counts["images read"] += references
        fault = text_fault(text, self._config.text, document.url) if text else ("no text", "")
        if fault is not None:
            tally.drop(*_place(fault, document.locator))
            tally.counts["images of documents left out for their text"] += references
            return None
        items, images = self._items(document, tally)
        if not images:
            tally.drop("no image left", document.locator, f"of {references}")
            return None
        record: dict[str, object] = {"items": items}
        if document.url:
            record["url"] = document.url
        compared = self._config.dedup.documents
        words = len(text.split())
        tally.counts.update({"images kept": len(images), "words kept": words})
        return Sample(
            key=sample_key(document.name, self._prefix + document.locator),
            members={"json": _json(record), **images},
            words=words,
            media=len(images),
            signature=signature(text, self._config.dedup).astype("<u4").tobytes() if compared else b"",
        )

    def _items(self, document: Document, tally: Tally) -> tuple[list[dict[str, str]], dict[str, bytes]]:
        """Keep the images that pass, each file once, and join texts between which an image was left out."""
        items: list[dict[str, str]] = []
        images: dict[str, bytes] = {}
        names: dict[bytes, str] = {}
        total = 0
        for item in document.items:
            if isinstance(item, TextItem):
                text = clean_text(item.text).strip()
                if not text:
                    continue
                if items and "text" in items[-1]:
                    items[-1]["text"] += "\n\n" + text
                else:
                    items.append({"text": text})
                continue
            try:
                self._room(len(images), total, item)
                blob = item.load()
                if blob not in names:
                    extension = self._image(blob)
                    if total + len(blob) > self._config.image.max_document_bytes:
                        raise BadSampleError("document full", f"{total + len(blob)} bytes")
                    names[blob] = f"{len(images)}.{extension}"
                    images[names[blob]] = blob
                    total += len(blob)
                else:
                    tally.counts["images repeated in a document"] += 1
                items.append({"image": names[blob]})
            except BadSampleError as error:
                _must_go_on(error)
                tally.drop_image(error.cause, document.locator, f"{item.src[:120]} {error.detail}".strip())
        return items, images

    def _room(self, images: int, total: int, item: ImageItem) -> None:
        """Refuse an image before it is read where the document is full, or its name says that it decorates."""
        limits = self._config.image
        if images >= limits.max_per_document or total >= limits.max_document_bytes:
            raise BadSampleError("document full", f"{images} images, {total} bytes")
        stem = item.src.partition("?")[0].rpartition("/")[2].rpartition(".")[0]
        if stem and stem in limits.skip_names:
            raise BadSampleError("decoration", stem)

    def _image(self, blob: bytes) -> str:
        """Apply the filters of images; returns the ending of the kept file."""
        checked = check_image(blob, self._config.image, hashed=self._evaluation is not None)
        if self._evaluation is not None and self._evaluation.near(checked.hash):
            raise BadSampleError("near-duplicate of an evaluation image", f"{checked.hash:016x}")
        return checked.extension

    def _captioned(self, found: Captioned, tally: Tally) -> Sample | None:
        tally.counts.update({"read": 1, "images read": 1})
        caption = clean_text(found.caption).strip()
        fault = caption_fault(caption, self._config.caption)
        if fault is not None:
            tally.drop(*_place(fault, found.locator))
            return None
        try:
            blob = found.load()
            if self._config.kind == "pair":
                extension = self._image(blob)
            else:
                extension = check_video(blob, found.extension, self._config)
        except BadSampleError as error:
            _must_go_on(error)
            tally.drop(error.cause, found.locator, error.detail)
            return None
        members = {extension: blob, "txt": caption.encode()}
        if found.url:
            members["json"] = _json({"url": found.url})
        words = len(caption.split())
        tally.counts.update({"images kept": 1, "words kept": words})
        return Sample(
            key=sample_key(found.name, self._prefix + found.locator), members=members, words=words, media=1
        )


def _place(fault: tuple[str, str], locator: str) -> tuple[str, str, str]:
    return fault[0], locator, fault[1]


def _json(record: dict[str, object]) -> bytes:
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()


def _must_go_on(error: BadSampleError) -> None:
    """Stop the build at a fault of the storage: an outage must not thin out the corpus.

    Raises:
        RuntimeError: for a fatal fault.
    """
    if error.fatal:
        raise RuntimeError(f"{error.cause}: {error.detail}; start the build again when the storage answers")
