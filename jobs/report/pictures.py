"""Held-out images with true and generated captions, embedded in the page."""

import base64
import binascii
from html import escape
from pathlib import Path
from typing import Any

from jobs.report.read import Run

MOST_SAMPLES = 60
"""Samples shown; the rest stay in samples.json."""

_KINDS = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif", b"RIFF": "image/webp"}


def samples_section(run: Run) -> str:
    """Make the section of held-out samples; empty where there are none."""
    if not run.samples:
        return ""
    cards = "".join(_card(run.folder, sample) for sample in run.samples[:MOST_SAMPLES])
    hidden = len(run.samples) - MOST_SAMPLES
    more = f"<p>{hidden} more in samples.json.</p>" if hidden > 0 else ""
    return f'<section><h2>Held-out samples</h2><div class="samples">{cards}</div>{more}</section>'


def embed(folder: Path, image: str) -> str | None:
    """Turn an image of samples.json into a data URL.

    Args:
        folder: The run folder.
        image: Path inside the run folder, a data URL, or an image in base64.

    Returns:
        The data URL, or None where it is no image that a browser shows or the file is missing.
    """
    if image.startswith("data:image/"):
        return image
    content = _file(folder, image)
    if content is None:
        try:
            content = base64.b64decode(image, validate=True)
        except (binascii.Error, ValueError):
            return None
    kind = next((kind for start, kind in _KINDS.items() if content.startswith(start)), None)
    return f"data:{kind};base64,{base64.b64encode(content).decode()}" if kind else None


def _file(folder: Path, image: str) -> bytes | None:
    """Contents of a file of the run folder, None for what is no path to one."""
    if len(image) > 500:  # longer than any path of ours: base64
        return None
    path = (folder / image).resolve()
    return path.read_bytes() if path.is_relative_to(folder.resolve()) and path.is_file() else None


def _card(folder: Path, sample: dict[str, Any]) -> str:
    """One sample: its image or images, the true caption and the generated one."""
    images = sample.get("image") or []
    images = [images] if isinstance(images, str) else images
    urls = [url for url in (embed(folder, image) for image in images) if url]
    shown = "".join(f'<img src="{escape(url)}" alt="held-out image" loading="lazy">' for url in urls)
    shots = sample.get("shots")
    count = len(shots) if isinstance(shots, list) else shots
    origin = [
        str(sample.get("dataset", "")),
        str(sample.get("key", "")),
        "" if count is None else f"{count} shot{'' if count == 1 else 's'}",
    ]
    return (
        f"<article>{shown}<dl><dt>true</dt><dd>{escape(str(sample.get('caption', '')))}</dd>"
        f"<dt>generated</dt><dd>{escape(str(sample.get('generated', '')))}</dd></dl>"
        f'<div class="soft">{escape(", ".join(filter(None, origin)))}</div></article>'
    )
