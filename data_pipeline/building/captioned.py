"""Pairs and clips: img2dataset's and video2dataset's output, and folders of numbered frames.

Both tools write tars (`KEY.jpg`, `KEY.txt`, `KEY.json`), plain files of the same names in folders of shards, or
parquet files with the columns `key`, `jpg`, `caption`, `url`.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from typing import Any

from data_pipeline.building.captions import read_captions
from data_pipeline.building.config import BuildConfig
from data_pipeline.building.documents import Captioned, Tally
from data_pipeline.building.plan import Part
from data_pipeline.building.storage import Folder
from data_pipeline.building.tables import read_rows
from data_pipeline.building.video import encode_frames
from data_pipeline.errors import BadSampleError
from data_pipeline.index import open_index
from data_pipeline.media import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from data_pipeline.reading import SampleReader

_MAX_TEXT = 4 << 20
_DIGITS = re.compile(r"(\d+)")
_FRAMES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read_captioned(part: Part, config: BuildConfig, tally: Tally) -> Iterator[Captioned]:
    """Read the captioned media of a part."""
    if config.input == "frames":
        yield from _clips(part, config, tally)
    elif part.name.endswith(".tar"):
        yield from _tar(part, config, tally)
    elif part.name.endswith(".parquet"):
        yield from _parquet(part, tally)
    else:
        yield from _files(part, config, tally)


def _wanted(config: BuildConfig) -> tuple[str, ...]:
    return IMAGE_EXTENSIONS if config.kind == "pair" else VIDEO_EXTENSIONS


def _limit(config: BuildConfig) -> int:
    return config.image.max_bytes if config.kind == "pair" else config.video.max_bytes


def _caption(text: bytes | None, record: bytes | None, *, first_line: bool) -> tuple[str, str]:
    """Return the caption and the address from the bytes of `.txt` and `.json`; either may be absent.

    Args:
        text: bytes of `.txt`.
        record: bytes of `.json`.
        first_line: leave out what stands below the first line of `.txt`.

    Raises:
        BadSampleError: "bad text", "bad document".
    """
    stored: Any = {}
    if record is not None:
        try:
            stored = json.loads(record)
        except (ValueError, RecursionError) as error:
            if text is None:
                raise BadSampleError("bad document", f"{type(error).__name__}: {error}"[:200]) from error
    stored = stored if isinstance(stored, dict) else {}
    url = stored.get("url") or stored.get("videoLoc") or ""
    if text is not None:
        try:
            written = text.decode("utf-8")
            if first_line:
                written = written.partition("\n")[0]
            return written, url if isinstance(url, str) else ""
        except UnicodeDecodeError as error:
            raise BadSampleError("bad text", f"not UTF-8: {error}") from error
    caption = stored.get("caption")
    if caption is None and isinstance(stored.get("captions"), list):
        caption = next((c for c in stored["captions"] if isinstance(c, str)), None)
    return caption if isinstance(caption, str) else "", url if isinstance(url, str) else ""


def _tar(part: Part, config: BuildConfig, tally: Tally) -> Iterator[Captioned]:
    """Read a tar; what stands before a cut is used."""
    try:
        index = open_index([part.source])
    except ValueError as error:
        tally.drop("damaged file", part.name, str(error)[:200])
        return
    for skip in index.skips:
        tally.drop("damaged file", part.name, skip.detail)
    wanted, limit = _wanted(config), _limit(config)
    for number, record in enumerate(index.records(0)):
        place = f"{part.name}#{number}"
        reader = SampleReader(part.source, record, max_bytes=max(limit, _MAX_TEXT))
        extension = next((e for e in wanted if reader.has(e)), None)
        if extension is None:
            tally.drop("no medium", place, f"{record.key}: {sorted(record.members)}")
            continue
        try:
            texts = [reader.get(e) if reader.has(e) else None for e in ("txt", "json")]
            caption, url = _caption(*texts, first_line=config.caption.first_line)
        except BadSampleError as error:
            tally.drop(error.cause, place, error.detail)
            continue
        name = f"{part.name.removesuffix('.tar')}/{record.key}".replace(".", "_")
        yield Captioned(
            locator=place,
            name=name,
            caption=caption,
            load=lambda reader=reader, extension=extension: reader.get(extension),  # type: ignore[misc]
            extension=extension,
            url=url,
        )


def _files(part: Part, config: BuildConfig, tally: Tally) -> Iterator[Captioned]:
    """Read files that have their captions beside them, or in a table."""
    folder, wanted = Folder(part.source), _wanted(config)
    for name in part.members:
        stem, _, extension = name.rpartition(".")
        if extension.lower() not in wanted:
            tally.drop("no medium", name, f"a .{extension} file")
            continue
        try:
            if config.captions:
                table = read_captions(config.captions)
                if name not in table:
                    raise BadSampleError("no caption in the table")
                caption, url = table[name], ""
            else:
                texts = [
                    folder.read(f"{stem}.{e}", _MAX_TEXT) if folder.exists(f"{stem}.{e}") else None
                    for e in ("txt", "json")
                ]
                caption, url = _caption(*texts, first_line=config.caption.first_line)
        except BadSampleError as error:
            tally.drop(error.cause, name, error.detail)
            continue
        yield Captioned(
            locator=name,
            name=stem.replace(".", "_"),
            caption=caption,
            load=folder.reader(name, _limit(config)),
            extension=extension.lower(),
            url=url,
        )


def _parquet(part: Part, tally: Tally) -> Iterator[Captioned]:
    """Read img2dataset's parquet output; rows of downloads that failed hold no image."""
    for place, row in read_rows(part, tally):
        extension = next((e for e in IMAGE_EXTENSIONS if isinstance(row.get(e), bytes)), None)
        if extension is None:
            tally.drop("no medium", place, f"status {row.get('status')!r}")
            continue
        blob: bytes = row[extension]
        url = row.get("url")
        yield Captioned(
            locator=place,
            name=f"{part.name.removesuffix('.parquet')}/{row.get('key') or place.rpartition('#')[2]}".replace(
                ".", "_"
            ),
            caption=str(row.get("caption") or row.get("txt") or ""),
            load=lambda blob=blob: blob,  # type: ignore[misc]
            extension=extension,
            url=url if isinstance(url, str) else "",
        )


def _clips(part: Part, config: BuildConfig, tally: Tally) -> Iterator[Captioned]:
    """Read folders of numbered frames."""
    folder = Folder(part.source)
    for clip in part.members:
        path = folder.inside(clip)
        names = [posixpath.basename(str(p)) for p in folder.fs.ls(path, detail=False)]
        frames = sorted((n for n in names if n.lower().endswith(_FRAMES)), key=_natural)
        text = next((t for t in (f"{clip}.txt", f"{clip}/caption.txt") if folder.exists(t)), None)
        record = next((t for t in (f"{clip}.json", f"{clip}/caption.json") if folder.exists(t)), None)
        try:
            caption, url = _caption(
                folder.read(text, _MAX_TEXT) if text else None,
                folder.read(record, _MAX_TEXT) if record else None,
                first_line=config.caption.first_line,
            )
        except BadSampleError as error:
            tally.drop(error.cause, clip, error.detail)
            continue

        def load(clip: str = clip, frames: list[str] = frames) -> bytes:
            if len(frames) > config.video.max_frames:
                raise BadSampleError("number of frames", f"{len(frames)}, at most {config.video.max_frames}")
            return encode_frames([folder.read(f"{clip}/{f}", config.image.max_bytes) for f in frames], config)

        yield Captioned(
            locator=clip, name=clip.replace(".", "_"), caption=caption, load=load, extension="mp4", url=url
        )


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key by which frame 10 comes after frame 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in _DIGITS.split(name)]
