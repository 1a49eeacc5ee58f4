"""The metrics file of a run: one JSON object a line."""

import json
import math
from pathlib import Path
from typing import Any


class MetricsFile:
    """Appends records; every line is whole, also after a kill."""

    def __init__(self, path: Path) -> None:
        """Open the file, dropping a last line that a kill cut short."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            text = path.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]
            if whole != text:
                path.write_bytes(whole)

    def append(self, record: dict[str, Any]) -> None:
        """Append one record and flush it. JSON has no NaN: non-finite numbers become null."""
        with self.path.open("a") as handle:
            handle.write(json.dumps(_finite(record)) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
