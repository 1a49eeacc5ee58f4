"""OBELICS and MMC4: their published records, with images from local stores and never from the network.

OBELICS: parallel lists `texts` and `images`, in which one of the two is None at each place.
MMC4: `text_list`, and `image_info` whose `matched_text_index` names the sentence that an image stands before.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Iterator
from typing import Any

from data_pipeline.building.config import BuildConfig
from data_pipeline.building.documents import Document, ImageItem, Tally, TextItem, refuse
from data_pipeline.building.plan import Part
from data_pipeline.building.stores import ImageStores
from data_pipeline.building.tables import read_rows
from data_pipeline.errors import BadSampleError

_Row = dict[str, Any]


def read_published(part: Part, config: BuildConfig, tally: Tally) -> Iterator[Document]:
    """Read the records of a part."""
    stores = ImageStores.open(config.images, config.image.max_bytes)
    items_of = _obelics_items if config.input == "obelics" else _mmc4_items
    for place, row in read_rows(part, tally):
        try:
            items = items_of(row, stores, config, tally, place)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            tally.drop("broken record", place, f"{type(error).__name__}: {error}"[:200])
            continue
        url = _address(row)
        name = url.partition("://")[2].partition("?")[0].rstrip("/").replace(".", "_") or config.input
        yield Document(locator=place, name=name, items=items, url=url)


def _address(row: _Row) -> str:
    """Return the page's address: MMC4 has it in the record, OBELICS in one of its metadata."""
    for field in ("url", "document_url"):
        if isinstance(row.get(field), str):
            return str(row[field])
    general = row.get("general_metadata")
    if isinstance(general, str):
        try:
            general = json.loads(general)
        except ValueError:
            return ""
    return str(general.get("url") or "") if isinstance(general, dict) else ""


def _obelics_items(
    row: _Row, stores: ImageStores, config: BuildConfig, tally: Tally, place: str
) -> list[TextItem | ImageItem]:
    """Return the items of an OBELICS record."""
    texts, images = row["texts"], row["images"]
    if len(texts) != len(images):
        raise ValueError(f"{len(texts)} texts and {len(images)} images")
    items: list[TextItem | ImageItem] = []
    for text, image in zip(texts, images, strict=True):
        if isinstance(text, str):
            items.append(TextItem(text))
        if image is not None:
            items.append(_image(image, stores, config.image.max_bytes))
    return items


def _mmc4_items(
    row: _Row, stores: ImageStores, config: BuildConfig, tally: Tally, place: str
) -> list[TextItem | ImageItem]:
    """Return the items of an MMC4 record: each image before the sentence that it was matched with."""
    sentences = [str(sentence) for sentence in row["text_list"]]
    before: dict[int, list[ImageItem]] = {}
    for info in row["image_info"]:
        at = int(info["matched_text_index"])
        if not 0 <= at < len(sentences):
            raise ValueError(f"matched_text_index {at} with {len(sentences)} sentences")
        similarity = float(info.get("matched_sim", 1.0))
        if similarity < config.min_similarity:
            tally.counts["images read"] += 1
            tally.drop_image(f"similarity under {config.min_similarity:g}", place, f"{similarity:.3f}")
            continue
        before.setdefault(at, []).append(_mmc4_image(info, stores, config.image.max_bytes))
    items: list[TextItem | ImageItem] = []
    run: list[str] = []
    for at, sentence in enumerate(sentences):
        if at in before:
            if run:
                items.append(TextItem(" ".join(run)))
                run = []
            items += before[at]
        run.append(sentence)
    return [*items, TextItem(" ".join(run))] if run else items


def _mmc4_image(info: _Row, stores: ImageStores, max_bytes: int) -> ImageItem:
    """Return an image of an MMC4 record: in the record itself, or by its name, or by its address."""
    if isinstance(info.get("image_base64"), str):
        return ImageItem("image_base64", _decoder(info["image_base64"], max_bytes))
    name, url = str(info.get("image_name") or ""), str(info.get("raw_url") or "")
    return ImageItem(name or url, stores.reader(url, name))


def _image(image: Any, stores: ImageStores, max_bytes: int) -> ImageItem:
    """Return an image of an OBELICS record: its address, or its bytes as Hugging Face datasets store them."""
    if isinstance(image, str):
        return ImageItem(image, stores.reader(image, ""))
    if isinstance(image, dict) and isinstance(image.get("bytes"), bytes):
        blob: bytes = image["bytes"]
        return ImageItem(str(image.get("path") or ""), lambda: blob)
    if isinstance(image, dict) and isinstance(image.get("path"), str):
        return ImageItem(image["path"], stores.reader("", image["path"]))
    return ImageItem("", refuse("bad address", repr(image)[:80]))


def _decoder(text: str, max_bytes: int) -> Callable[[], bytes]:
    """Make what decodes an image that a record holds as base64."""

    def load() -> bytes:
        if len(text) > 2 * max_bytes:
            raise BadSampleError(f"over {max_bytes} bytes", f"{len(text)} characters of base64")
        try:
            return base64.b64decode(text)
        except (binascii.Error, ValueError) as error:
            raise BadSampleError("corrupt image", f"base64: {error}") from error

    return load
