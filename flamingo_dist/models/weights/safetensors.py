"""Slices of safetensors files at any fsspec URL.

Of a matrix, rows are one byte range; columns are one range a row, and where the bytes between are few they are
read along (`ranges.REMOTE_GAP`), in blocks, into a buffer of bounded size. Nothing larger than the wanted slice and
one block is held.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flamingo_dist.models.weights.ranges import RangeFile, join_url
from flamingo_dist.models.weights.source import ALL

BLOCK_BYTES = 32 << 20
"""Largest piece that is read beside the slice that it goes to."""
_LARGEST_HEADER = 100_000_000
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies."""

    file: RangeFile
    """The file."""
    dtype: torch.dtype
    """Its dtype."""
    shape: tuple[int, ...]
    """Its shape, row-major."""
    start: int
    """Its first byte in the file."""


class SafetensorsSource:
    """One `.safetensors` file, or a folder with one or several; only headers and asked slices are read."""

    def __init__(self, url: str) -> None:
        """Read the headers.

        Raises:
            ValueError: there is no such file, or it is damaged.
        """
        self.url = url
        self.files = {name: RangeFile(file) for name, file in _find_files(url).items()}
        self._tensors: dict[str, StoredTensor] = {}
        for file in self.files.values():
            for name, tensor in _read_header(file).items():
                if name in self._tensors:
                    raise ValueError(
                        f"tensor {name} is in both {self._tensors[name].file.url} and {file.url}."
                    )
                self._tensors[name] = tensor

    @property
    def bytes_read(self) -> int:
        """Bytes read so far, headers included."""
        return sum(file.bytes_read for file in self.files.values())

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every stored tensor, by its name."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """Return the slice `[rows, columns]` (or `[rows]` of a vector) of the tensor `name`, in its stored dtype.

        Raises:
            KeyError: there is no such tensor.
            OSError: the storage does not give it.
        """
        stored = self._tensors[name]
        first, last, _ = rows.indices(stored.shape[0])
        if len(stored.shape) == 1:
            out = torch.empty(max(0, last - first), dtype=stored.dtype)
            return _fill(stored, out[None], first, 1, 0)[0]
        left, right, _ = columns.indices(stored.shape[1])
        out = torch.empty(max(0, last - first), max(0, right - left), dtype=stored.dtype)
        return _fill(stored, out, first * stored.shape[1] + left, last - first, stored.shape[1])


def _fill(stored: StoredTensor, out: Tensor, first: int, rows: int, stride: int) -> Tensor:
    """Fill `out` [rows, c] from element `first` of the stored tensor on, `stride` elements from row to row."""
    if out.numel() == 0:
        return out
    size, width = stored.dtype.itemsize, out.shape[1]
    start = stored.start + first * size
    flat = out.view(torch.uint8).numpy()
    if rows == 1 or width == stride:
        _read_blocks(stored.file, flat.reshape(-1).data, start)
        return out
    gap = (stride - width) * size
    if gap > stored.file.max_gap:
        for row in range(rows):
            stored.file.read_into(flat[row].data, start + row * stride * size)
        return out
    height = max(1, BLOCK_BYTES // (stride * size))
    for top in range(0, rows, height):
        count = min(height, rows - top)
        block = torch.empty(count * stride * size - gap, dtype=torch.uint8).numpy()
        stored.file.read_into(block.data, start + top * stride * size)
        for row in range(count):
            begin = row * stride * size
            flat[top + row] = block[begin : begin + width * size]
    return out


def _read_blocks(file: RangeFile, buffer: memoryview, start: int) -> None:
    """Fill `buffer` from byte `start` on in pieces, so that what a remote read returns is never large."""
    for at in range(0, len(buffer), BLOCK_BYTES):
        file.read_into(buffer[at : at + BLOCK_BYTES], start + at)


def _find_files(url: str) -> dict[str, str]:
    """Return the URLs of the files with weights by name: of an index, of the usual single file, or all there are."""
    if url.endswith(".safetensors"):
        return {url.rsplit("/", 1)[-1]: url}
    index = RangeFile(join_url(url, "model.safetensors.index.json"))
    if index.exists():
        names = sorted(set(json.loads(index.read_all())["weight_map"].values()))
        return {name: join_url(url, name) for name in names}
    if RangeFile(join_url(url, "model.safetensors")).exists():
        return {"model.safetensors": join_url(url, "model.safetensors")}
    raise ValueError(
        f"{url} holds neither model.safetensors nor model.safetensors.index.json; give a Hugging Face folder, the "
        "URL of a .safetensors file, or a .gguf file."
    )


def _read_header(file: RangeFile) -> dict[str, StoredTensor]:
    """Return what a file's header states."""
    length = bytearray(8)
    try:
        file.read_into(memoryview(length), 0)
        (size,) = struct.unpack("<Q", length)
        if size > _LARGEST_HEADER:
            raise ValueError(f"{file.url} is no safetensors file: its header would have {size} bytes.")
        blob = bytearray(size)
        file.read_into(memoryview(blob), 8)
        entries = json.loads(bytes(blob))
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{file.url} cannot be read as safetensors: {type(error).__name__}: {error}"
        ) from error
    entries.pop("__metadata__", None)
    tensors = {}
    for name, entry in entries.items():
        shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            # Masks and counters beside the weights; whoever wants such a tensor learns its dtype by its name.
            dtype = torch.uint8 if entry["dtype"] in ("U8", "BOOL") else _refuse(file, name, entry["dtype"])
        if stop - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(
                f"{file.url}: tensor {name} has {stop - start} bytes, its shape {shape} wants others."
            )
        tensors[name] = StoredTensor(file=file, dtype=dtype, shape=shape, start=8 + size + start)
    return tensors


def _refuse(file: RangeFile, name: str, dtype: str) -> torch.dtype:
    raise ValueError(f"{file.url}: tensor {name} is stored as {dtype}; known are {', '.join(DTYPES)}.")
