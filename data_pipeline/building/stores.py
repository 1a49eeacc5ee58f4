"""Images by their address or name: folders, and tars that img2dataset wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from urllib.parse import unquote, urlsplit

import fsspec

from data_pipeline.building.documents import refuse
from data_pipeline.building.storage import Folder
from data_pipeline.errors import BadSampleError
from data_pipeline.index import open_index
from data_pipeline.media import IMAGE_EXTENSIONS
from data_pipeline.reading import SampleReader
from data_pipeline.shards import SampleRecord

_MAX_METADATA = 1 << 20


class ImageStores:
    """Looks an image up in all stores in turn."""

    def __init__(self, folders: Sequence[Folder], tars: dict[str, tuple[str, SampleRecord]], max_bytes: int):
        """Hold the stores; `open` makes them from URLs.

        Args:
            folders: folders of files.
            tars: samples of img2dataset's tars by the address that they were fetched from.
            max_bytes: largest image.
        """
        self._folders, self._tars, self._max_bytes = folders, tars, max_bytes

    @staticmethod
    @lru_cache(maxsize=1)
    def open(urls: tuple[str, ...], max_bytes: int) -> ImageStores:
        """Open the stores once a process; the addresses of tars are read from their metadata.

        Raises:
            MissingShardError: a store does not exist.
        """
        folders: list[Folder] = []
        tars: dict[str, tuple[str, SampleRecord]] = {}
        for url in urls:
            fs, path = fsspec.core.url_to_fs(url)
            if url.endswith(".tar") or any(str(p).endswith(".tar") for p in fs.ls(path, detail=False)):
                _add_tars(url, tars)
            else:
                folders.append(Folder(url))
        return ImageStores(folders, tars, max_bytes)

    def reader(self, url: str, name: str) -> Callable[[], bytes]:
        """Make what reads an image.

        Args:
            url: its address, or "".
            name: its file name, or "".
        """
        if url in self._tars:
            shard, record = self._tars[url]
            return lambda: _read_member(shard, record, self._max_bytes)
        names = [name] if name else []
        try:
            parts = urlsplit(url)
            if parts.hostname and parts.path:
                names.append(f"{parts.hostname}/{unquote(parts.path).lstrip('/')}")
        except ValueError:
            pass
        for folder in self._folders:
            for candidate in names:
                if folder.exists(candidate):
                    return folder.reader(candidate, self._max_bytes)
                try:
                    folder.inside(candidate)
                except BadSampleError as error:
                    return refuse(error.cause, error.detail)
        return refuse("not in the sources", (url or name)[:200])


def _read_member(shard: str, record: SampleRecord, max_bytes: int) -> bytes:
    """Read the image of a sample."""
    reader = SampleReader(shard, record, max_bytes=max_bytes)
    for extension in IMAGE_EXTENSIONS:
        if reader.has(extension):
            return reader.get(extension)
    raise BadSampleError("not in the sources", f"{record.key} of {shard} has no image")


def _add_tars(url: str, tars: dict[str, tuple[str, SampleRecord]]) -> None:
    """Note which sample of a store holds which address."""
    index = open_index([url])
    for number, entry in enumerate(index.entries):
        for record in index.records(number):
            if "json" not in record.members:
                continue
            try:
                stored = json.loads(SampleReader(entry.url, record, max_bytes=_MAX_METADATA).get("json"))
            except (BadSampleError, ValueError, RecursionError):
                continue  # without an address it cannot be asked for
            if isinstance(stored, dict) and isinstance(stored.get("url"), str):
                tars.setdefault(stored["url"], (entry.url, record))
