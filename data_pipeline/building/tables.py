"""Rows of published files: JSON lines, compressed or not, and parquet. Never a pickle."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import fsspec

from data_pipeline.building.documents import Tally
from data_pipeline.building.plan import Part

_MAX_LINE = 256 << 20


def read_rows(part: Part, tally: Tally) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the rows of a part with their places; a broken one is counted and passed over.

    Args:
        part: a `.jsonl`, `.jsonl.gz`, `.jsonl.zip` or `.parquet` file.
        tally: counts broken rows.
    """
    rows = _parquet_rows(part) if part.name.endswith(".parquet") else _json_rows(part, tally)
    for place, row in rows:
        if isinstance(row, dict):
            yield place, row
        else:
            tally.drop("broken record", place, f"a {type(row).__name__}, not an object")


def _parquet_rows(part: Part) -> Iterator[tuple[str, Any]]:
    """Read one row group, a few rows at a time: rows may hold images."""
    from pyarrow.parquet import ParquetFile

    fs, path = fsspec.core.url_to_fs(part.source)
    with fs.open(path, "rb") as file:
        number = 0
        for batch in ParquetFile(file).iter_batches(batch_size=64, row_groups=[part.row_group]):
            for row in batch.to_pylist():
                yield f"{part.name}#{part.row_group}.{number}", row
                number += 1


def _json_rows(part: Part, tally: Tally) -> Iterator[tuple[str, Any]]:
    """Read JSON lines; a file cut in the middle gives what stands before the cut."""
    number = 0
    with fsspec.open(part.source, "rb", compression="infer") as raw:
        file = io.BufferedReader(raw) if not hasattr(raw, "readline") else raw
        while True:
            place = f"{part.name}#{number}"
            try:
                line = file.readline(_MAX_LINE)
            except Exception as error:  # zlib, zipfile and EOFError
                tally.drop("damaged file", place, f"{type(error).__name__}: {error}"[:200])
                return
            if not line:
                return
            number += 1
            if not line.strip():
                continue
            try:
                yield place, json.loads(line)
            except (ValueError, RecursionError) as error:
                tally.drop("broken record", place, f"{type(error).__name__}: {error}"[:200])
