"""Perceptual hashes of evaluation sets, which a corpus must not hold."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from typing import Any

import fsspec
import numpy as np

from data_pipeline.building.config import ImageConfig
from data_pipeline.building.images import check_image
from data_pipeline.errors import BadSampleError, MissingShardError
from data_pipeline.index import open_index
from data_pipeline.media import IMAGE_EXTENSIONS
from data_pipeline.reading import SampleReader

_ALL = ImageConfig(min_side=1, max_aspect=1e9, colour_range=0)


def evaluation_hashes(urls: tuple[str, ...]) -> np.ndarray:
    """Hash the images of evaluation sets.

    Args:
        urls: folders of images, or folders and tars of shards.

    Returns:
        uint64 [N], sorted.

    Raises:
        MissingShardError: a set is not there or holds no image that can be read.
    """
    found: set[int] = set()
    for url in urls:
        readable = 0
        for blob in _images(url):
            try:
                found.add(check_image(blob, _ALL).hash)
                readable += 1
            except BadSampleError:
                continue  # an evaluation image that cannot be decoded cannot be recognised either
        if not readable:
            raise MissingShardError(f"{url} holds no image that can be read; correct dedup.against")
    return np.array(sorted(found), np.uint64)


def pack_hashes(hashes_N: np.ndarray, distance: int) -> bytes:
    """Pack hashes uint64 [N] with the distance in front, as an `.npy` file."""
    buffer = BytesIO()
    np.save(buffer, np.concatenate([[np.uint64(distance)], hashes_N]).astype(np.uint64), allow_pickle=False)
    return buffer.getvalue()


def _images(url: str) -> Iterator[bytes]:
    """Yield all images of one set."""
    fs, path = fsspec.core.url_to_fs(url)
    if url.endswith(".tar") or _has_tars(fs, path):
        index = open_index([url])
        for number, entry in enumerate(index.entries):
            for record in index.records(number):
                reader = SampleReader(entry.url, record, max_bytes=_ALL.max_bytes)
                for extension in record.members:
                    if extension.rpartition(".")[2] in IMAGE_EXTENSIONS:
                        yield reader.get(extension)
        return
    for name in sorted(fs.find(path)):
        if str(name).rpartition(".")[2].lower() in IMAGE_EXTENSIONS:
            yield fs.cat_file(name)


def _has_tars(fs: Any, path: str) -> bool:
    """Whether a folder holds shards.

    Raises:
        MissingShardError: no such folder.
    """
    try:
        return any(str(name).endswith(".tar") for name in fs.ls(path, detail=False))
    except FileNotFoundError as error:
        raise MissingShardError(f"{path}: no such folder; correct dedup.against") from error
