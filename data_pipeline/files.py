"""Files that are whole or absent, whenever the process that writes them is killed."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def write_whole(path: Path | str, blob: bytes) -> None:
    """Write a file of this machine by way of another beside it, over whatever is there.

    Args:
        path: the file; its folder is made if need be.
        blob: its contents.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        staging.write_bytes(blob)
        os.replace(staging, target)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
