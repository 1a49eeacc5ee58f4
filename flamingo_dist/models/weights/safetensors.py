"""Slices of safetensors files at any fsspec URL: the one reader of their headers and tensors.

Of a matrix, rows are one byte range; columns are one range a row, and where the bytes between are few they are
read along (`ranges.REMOTE_GAP`), in blocks, into a buffer of bounded size. Nothing larger than the wanted slice and
one block is held.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flamingo_dist.from_json import json_object
from flamingo_dist.models.weights.ranges import RangeFile, join_url, list_names
from flamingo_dist.models.weights.source import ALL

BLOCK_BYTES = 32 << 20
"""Largest piece that is read beside the slice that it goes to."""
INDEX = "model.safetensors.index.json"
"""Says which file holds which tensor, as Hugging Face's libraries write and read it."""
SINGLE = "model.safetensors"
"""The file of a folder without an index."""
_LARGEST_HEADER = 100_000_000
_LENGTH_BYTES = 8
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What weights may be stored in."""
_COUNTER_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8}
"""Masks and counters that stand beside weights: known, never read."""


class StoredTensor(NamedTuple):
    """Where a tensor lies."""

    file: RangeFile
    """The file."""
    kind: str
    """What the format calls its dtype."""
    shape: tuple[int, ...]
    """Its shape, row-major."""
    start: int
    """Its first byte in the file."""


@dataclass(frozen=True, kw_only=True)
class _Header:
    """What a file's header states."""

    file: RangeFile
    tensors: Mapping[str, StoredTensor]
    size: int
    """Bytes that the whole file must have."""

    def check_size(self) -> None:
        """Raise `ValueError` unless the file has the bytes that its header states."""
        found = self.file.size()
        if found != self.size:
            raise ValueError(
                f"{self.file.url} is cut off or damaged: it has {found} bytes, its header states {self.size}."
            )


class SafetensorsSource:
    """One `.safetensors` file, or a folder with one or several; only headers and asked slices are read."""

    def __init__(self, url: str, *, attempts: int | None = None) -> None:
        """Read the headers.

        Args:
            url: a file, or a folder with an index, with `model.safetensors`, or with files of any names.
            attempts: times that a read is tried; None is `ranges.ATTEMPTS`.

        Raises:
            ValueError: there is no such file, or it is damaged. Whether a file is cut off is seen at once where it
                is local, else by `check_whole` or when its end is read.
        """
        self.url = url
        self.files = {name: RangeFile(file, attempts=attempts) for name, file in _find_files(url).items()}
        self._headers = [_read_header(file) for file in self.files.values()]
        self._tensors: dict[str, StoredTensor] = {}
        for header in self._headers:
            for name, tensor in header.tensors.items():
                if name in self._tensors:
                    raise ValueError(
                        f"tensor {name} is in both {self._tensors[name].file.url} and {header.file.url}."
                    )
                self._tensors[name] = tensor

    @property
    def where(self) -> str:
        """What errors call the source."""
        return self.url

    @property
    def bytes_read(self) -> int:
        """Bytes read so far, headers included."""
        return sum(file.bytes_read for file in self.files.values())

    def check_whole(self) -> int:
        """Ask how large the files are, and return their bytes in all.

        Raises:
            ValueError: a file is cut off.
            OSError: the storage does not say.
        """
        for header in self._headers:
            header.check_size()
        return sum(header.size for header in self._headers)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every stored tensor, by its name."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """Return a tensor of any shape in its stored dtype, or a part of it.

        Args:
            name: the tensor.
            rows: part of its first dimension.
            columns: part of its second dimension; without effect on a vector.

        Raises:
            KeyError: there is no such tensor.
            ValueError: it is stored as integers, as no weights are.
            OSError: the storage does not give it.
        """
        stored = self._tensors[name]
        if stored.kind not in DTYPES:
            raise _unknown(stored.file, name, stored.kind)
        height, width, *rest = (*stored.shape, 1, 1)[: max(2, len(stored.shape))]
        first, last, _ = rows.indices(height)
        left, right, _ = (columns if len(stored.shape) > 1 else ALL).indices(width)
        shape = [max(0, last - first), max(0, right - left), *rest]
        out = torch.empty(shape, dtype=DTYPES[stored.kind])
        unit = math.prod(rest)
        _fill(stored, out.view(shape[0], shape[1] * unit), (first * width + left) * unit, width * unit)
        return out if len(stored.shape) > 1 else out.view(shape[0] if stored.shape else ())


def _fill(stored: StoredTensor, out: Tensor, first: int, stride: int) -> None:
    """Fill `out` [rows, c] from element `first` of the stored tensor on, `stride` elements from row to row."""
    if out.numel() == 0:
        return
    size, (rows, width) = out.dtype.itemsize, out.shape
    start = stored.start + first * size
    flat = out.view(torch.uint8).numpy()
    if rows == 1 or width == stride:
        _read_blocks(stored.file, flat.reshape(-1).data, start)
        return
    gap = (stride - width) * size
    if gap > stored.file.max_gap:
        for row in range(rows):
            stored.file.read_into(flat[row].data, start + row * stride * size)
        return
    height = max(1, BLOCK_BYTES // (stride * size))
    for top in range(0, rows, height):
        count = min(height, rows - top)
        block = torch.empty(count * stride * size - gap, dtype=torch.uint8).numpy()
        stored.file.read_into(block.data, start + top * stride * size)
        for row in range(count):
            begin = row * stride * size
            flat[top + row] = block[begin : begin + width * size]


def _read_blocks(file: RangeFile, buffer: memoryview, start: int) -> None:
    """Fill `buffer` from byte `start` on in pieces, so that what a remote read returns is never large."""
    for at in range(0, len(buffer), BLOCK_BYTES):
        file.read_into(buffer[at : at + BLOCK_BYTES], start + at)


def _find_files(url: str) -> dict[str, str]:
    """Return the URLs of the files with weights by name: of an index, of the usual single file, or all there are."""
    if url.endswith(".safetensors"):
        return {url.rsplit("/", 1)[-1]: url}
    index = RangeFile(join_url(url, INDEX))
    if index.exists():
        names = _indexed(index)
    elif RangeFile(join_url(url, SINGLE)).exists():
        names = [SINGLE]
    else:
        names = list_names(url, ".safetensors")
    if not names:
        raise ValueError(
            f"{url} holds neither {SINGLE} nor {INDEX} nor any other .safetensors file; give a Hugging Face folder, "
            "the URL of a .safetensors file, or a .gguf file."
        )
    return {name: join_url(url, name) for name in names}


def _indexed(index: RangeFile) -> list[str]:
    """Return the names of the files that an index names."""
    files = json_object(index.read_all(), index.url).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise ValueError(
            f"{index.url} is no index of safetensors: its weight_map must say which file holds which tensor."
        )
    return sorted(set(files.values()))


def _read_header(file: RangeFile) -> _Header:
    """Return what a file's header states."""
    try:
        size, blob = _header_bytes(file)
    except FileNotFoundError as error:
        raise ValueError(f"{file.url} is not there.") from error
    entries = json_object(blob, f"{file.url} cannot be read as safetensors: its header")
    entries.pop("__metadata__", None)
    tensors, end = {}, 0
    read = [(name, *_entry(file, name, entry)) for name, entry in entries.items()]
    for name, kind, shape, start, stop in sorted(read, key=lambda one: one[3:]):
        item = DTYPES[kind].itemsize if kind in DTYPES else _COUNTER_BYTES.get(kind)
        if item is None:
            raise _unknown(file, name, kind)
        if (start, stop) != (end, end + math.prod(shape) * item):
            raise ValueError(
                f"{file.url} is damaged: its header puts tensor {name}, {kind} of shape {shape}, at bytes {start} to "
                f"{stop} instead of {end} to {end + math.prod(shape) * item}."
            )
        end = stop
        tensors[name] = StoredTensor(file=file, kind=kind, shape=shape, start=size + start)
    header = _Header(file=file, tensors=tensors, size=size + end)
    if file.is_local:
        header.check_size()
    return header


def _entry(file: RangeFile, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Return dtype, shape, first and end byte of a tensor from its entry in the header."""
    match entry:
        case {"dtype": str(kind), "shape": [*shape], "data_offsets": [int(start), int(stop)]} if all(
            type(size) is int and size >= 0 for size in shape
        ):
            return kind, tuple(shape), start, stop
    raise ValueError(
        f"{file.url} is damaged: its header says {str(entry)[:100]} of tensor {name}, but must say dtype, shape and "
        "data_offsets."
    )


def _header_bytes(file: RangeFile) -> tuple[int, bytes]:
    """Return where a file's tensors begin, and its header; a local file that is too short is read no further."""
    most = file.size() if file.is_local else _LENGTH_BYTES + _LARGEST_HEADER
    length = bytearray(min(most, _LENGTH_BYTES))
    file.read_into(memoryview(length), 0)
    size = int.from_bytes(length, "little")
    if len(length) < _LENGTH_BYTES or size > _LARGEST_HEADER:
        raise ValueError(f"{file.url} is no safetensors file: its header would have {size} bytes.")
    if _LENGTH_BYTES + size > most:
        raise ValueError(f"{file.url} is cut off: it has {most} bytes, its header alone {size}.")
    blob = bytearray(size)
    file.read_into(memoryview(blob), _LENGTH_BYTES)
    return _LENGTH_BYTES + size, bytes(blob)


def _unknown(file: RangeFile, name: str, kind: str) -> ValueError:
    return ValueError(
        f"{file.url}: tensor {name} is stored as {kind}; weights are read from {', '.join(DTYPES)}."
    )
