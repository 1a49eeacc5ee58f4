"""Files of vision encoders at any fsspec URL: tensors, JSON, and what identifies or copies them."""

import hashlib
import shutil
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flamingo_dist.from_json import json_object
from flamingo_dist.models.vision.haiku_file import read_pickle
from flamingo_dist.models.weights.ranges import RangeFile, join_url, list_names
from flamingo_dist.models.weights.safetensors import INDEX, SINGLE, SafetensorsSource
from flamingo_dist.models.weights.source import ALL, WeightSource

_TORCH = (".pth", ".pt", ".bin")
_CONFIGS = ("config.json", "preprocessor_config.json", "processor_config.json")
"""What says how a folder's weights are used."""


class Arrays:
    """Tensors that are all in memory; each is given away once, so that its memory can go."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        """Hold tensors of any shape, of torch or numpy."""
        self._tensors = dict(tensors)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every tensor, by its name."""
        return self._shapes

    def read(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """Return the tensor `name`, of any shape, or its slice `[rows, columns]`; once."""
        tensor = self._tensors.pop(name)
        # A copy: arrays of a pickle are views of its read-only bytes.
        value = tensor if isinstance(tensor, Tensor) else torch.from_numpy(np.array(tensor, np.float32))
        if rows != ALL:
            value = value[rows]
        return value if columns == ALL else value[:, columns]


def open_tensors(url: str, *, absent: str) -> WeightSource:
    """Open a file of tensors by what it holds, or a folder of safetensors.

    Args:
        url: `.safetensors`, a folder with some, torch's `.pth`, an `.npz`, or haiku's pickle, at any fsspec URL.
        absent: what to say where there is none.

    Raises:
        FileNotFoundError: there is nothing at `url`.
        ValueError: what is there cannot be read.
    """
    path = PurePosixPath(url)
    if path.suffix == ".safetensors":
        if not RangeFile(url).exists():
            raise FileNotFoundError(absent)
        return SafetensorsSource(url)
    if path.suffix not in (*_TORCH, ".npz") and _is_folder(url):
        return SafetensorsSource(url)
    file = RangeFile(url)
    if not file.exists():
        raise FileNotFoundError(absent)
    with file.opened() as opened:
        if path.suffix in _TORCH:
            return Arrays(torch.load(opened, map_location="cpu", weights_only=True))
        if opened.peek(2)[:2] != b"PK":  # the published `.npz` are pickles
            return Arrays(read_pickle(opened, url))
        with np.load(opened, allow_pickle=False) as archive:
            return Arrays(dict(archive))


def _is_folder(url: str) -> bool:
    """Return whether `url` is a folder with safetensors; storages without folders are asked for the usual names."""
    return any(RangeFile(join_url(url, name)).exists() for name in (SINGLE, INDEX)) or bool(
        list_names(url, ".safetensors")
    )


def read_json(folder: str, name: str) -> dict[str, Any] | None:
    """Return the JSON object in the file `name` of a folder, or None where there is no such file.

    Raises:
        ValueError: it holds something else.
    """
    file = RangeFile(join_url(folder, name))
    return json_object(file.read_all(), file.url) if file.exists() else None


def content_hash(url: str) -> str:
    """Return the hash of a file, or of a folder's weights and of what says how they are used.

    Wherever the same files are, it is the same. What is remote is read once a process.

    Raises:
        FileNotFoundError: there is neither.
    """
    return _remote_hash(url) if "://" in url else _hash(url)


@lru_cache(maxsize=16)
def _remote_hash(url: str) -> str:
    return _hash(url)


def _hash(url: str) -> str:
    if not _is_one_file(url):
        lines = [f"{name}:{_hash(file)}\n" for name, file in sorted(folder_files(url).items())]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with RangeFile(url).opened() as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_one_file(url: str) -> bool:
    return PurePosixPath(url).suffix in (".safetensors", ".npz", ".json", *_TORCH) or RangeFile(url).exists()


def folder_files(url: str) -> dict[str, str]:
    """Return the URLs of a folder's safetensors and of what says how they are used, by name.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    names = list_names(url, ".safetensors") + list_names(url, "config.json")
    if not names:  # a storage that cannot list
        try:
            names = [*SafetensorsSource(url).files]
        except ValueError as error:
            raise FileNotFoundError(str(error)) from error
        names += [name for name in _CONFIGS if RangeFile(join_url(url, name)).exists()]
    return {name: join_url(url, name) for name in names}


def copy_weights(url: str, folder: Path) -> str:
    """Copy a file, or a folder's files, at any fsspec URL into the local `folder` and return the copy's name there."""
    name = url.rstrip("/").rsplit("/", 1)[-1]
    if "://" not in url and Path(url).is_dir():
        shutil.copytree(url, folder / name)
        return name
    files = {name: url}
    if not _is_one_file(url):
        files = {f"{name}/{part}": file for part, file in folder_files(url).items()}
    for part, file in files.items():
        (folder / part).parent.mkdir(exist_ok=True)
        RangeFile(file).copy_to(folder / part)
    return name
