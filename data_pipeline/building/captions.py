"""Tables of captions by file name, as Hugging Face's ImageFolder has them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import fsspec


@lru_cache(maxsize=2)  # every part of a build that runs in this process wants the same one
def read_captions(url: str) -> Mapping[str, str]:
    """Read a table of captions.

    Args:
        url: a `.csv` file, or JSON lines.

    Returns:
        Captions by file name.

    Raises:
        ValueError: a row without `file_name` and a `text` or `caption`.
    """
    captions: dict[str, str] = {}
    with fsspec.open(url, "rt", encoding="utf-8", compression="infer", newline="") as file:
        ending = url.removesuffix(".gz").rpartition(".")[2]
        rows: Iterable[Any] = (
            csv.DictReader(file) if ending == "csv" else map(json.loads, filter(str.strip, file))
        )
        for number, row in enumerate(rows):
            name, text = row.get("file_name"), row.get("text", row.get("caption"))
            if not isinstance(name, str) or not isinstance(text, str):
                raise ValueError(f"{url}, row {number}: {row!r:.200} needs file_name, and text or caption")
            captions[name] = text
    return captions
