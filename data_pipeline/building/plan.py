"""Which files a build reads, cut into parts that are built on their own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import fsspec

from data_pipeline.building.captions import read_captions
from data_pipeline.building.config import BuildConfig
from data_pipeline.errors import MissingShardError
from data_pipeline.media import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS

FORMAT_VERSION = 2
"""Raise it when the same sources and configuration would give other bytes."""
_PAGES = (".html", ".htm", ".xhtml")
_ENDINGS: dict[str, tuple[str, ...]] = {
    "warc": (".warc", ".warc.gz"),
    "obelics": (".jsonl", ".jsonl.gz", ".jsonl.zip", ".parquet"),
    "mmc4": (".jsonl", ".jsonl.gz", ".jsonl.zip", ".parquet"),
}
_FRAME_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One task of a build: a file, a piece of one, or some files of a folder."""

    number: int
    """Place in the order of the corpus."""
    source: str
    """Folder or file, as given or found."""
    source_number: int = 0
    """Place of the source among all, which tells apart files of the same name in two sources."""
    name: str = ""
    """The file's name below its source; part of the keys, so that a corpus may be moved."""
    members: tuple[str, ...] = ()
    """Files of the folder, or clips, by their paths below it."""
    row_group: int = -1
    """Row group of a parquet file; -1 for all."""
    size: int = 0
    """Bytes, by which a source that changed is noticed."""


def plan_parts(config: BuildConfig) -> list[Part]:
    """List the sources and cut them into parts; the same sources always give the same parts.

    Raises:
        MissingShardError: a source is not there, or holds nothing of the kind.
    """
    pieces: list[dict[str, Any]] = []
    for source_number, source in enumerate(config.sources):
        found = [{**piece, "source_number": source_number} for piece in _pieces(config, source)]
        if not found:
            raise MissingShardError(
                f"{source} holds nothing that input {config.input!r} reads: {_wanted(config)}"
            )
        pieces += found
    return [Part(number=number, **piece) for number, piece in enumerate(pieces)]


def fingerprint(config: BuildConfig, parts: list[Part], versions: dict[str, str]) -> str:
    """Hash all that decides the bytes of the corpus."""
    rows: list[Any] = [FORMAT_VERSION, config.identity(), [asdict(part) for part in parts]]
    rows.append(sorted(versions.items()))
    if config.captions:
        rows.append(sorted(read_captions(config.captions).items()))
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def _wanted(config: BuildConfig) -> str:
    endings = {
        "html": " ".join(_PAGES),
        "frames": "folders of numbered frames, each with CLIP.txt beside it or caption.txt in it",
        "pairs": ".tar or .parquet files, or images with .txt or .json beside them or in a table (captions)",
        "videos": ".tar files, or clips with .txt or .json beside them or in a table (captions)",
    }
    return endings.get(config.input) or " ".join(_ENDINGS[config.input])


def _pieces(config: BuildConfig, source: str) -> Iterator[dict[str, Any]]:
    """Cut one source."""
    fs, root = fsspec.core.url_to_fs(source)
    root = str(root).rstrip("/")
    if fs.isfile(root):
        listing = {root: fs.info(root)}
        base = root.rpartition("/")[0]
    else:
        listing = fs.find(root, detail=True)
        base = root
    if not listing:
        raise MissingShardError(f"{source}: no such file or folder, or it is empty")
    sizes = {path[len(base) :].lstrip("/"): int(info["size"] or 0) for path, info in sorted(listing.items())}
    folder = str(fs.unstrip_protocol(base)) if "://" in source else base
    if config.input == "html":
        yield from _groups(config, folder, {n: s for n, s in sizes.items() if n.lower().endswith(_PAGES)})
    elif config.input == "frames":
        yield from _clips(config, folder, sizes)
    elif config.input in _ENDINGS:
        for name, size in sizes.items():
            if name.endswith(_ENDINGS[config.input]):
                yield from _file(fs, folder, name, size)
    elif config.captions:
        endings = IMAGE_EXTENSIONS if config.kind == "pair" else VIDEO_EXTENSIONS
        media = {n: s for n, s in sizes.items() if n.rpartition(".")[2].lower() in endings}
        yield from _groups(config, folder, media)
    else:
        yield from _captioned(config, fs, folder, sizes)


def _groups(config: BuildConfig, folder: str, sizes: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Cut the files of a folder into groups."""
    names = list(sizes)
    for start in range(0, len(names), config.samples_per_part):
        group = tuple(names[start : start + config.samples_per_part])
        yield {"source": folder, "members": group, "size": sum(sizes[name] for name in group)}


def _clips(config: BuildConfig, folder: str, sizes: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Group the folders that hold frames."""
    clips: dict[str, int] = {}
    for name, size in sizes.items():
        clip, _, _ = name.rpartition("/")
        if clip and name.lower().endswith(_FRAME_ENDINGS):
            clips[clip] = clips.get(clip, 0) + size
    yield from _groups(config, folder, clips)


def _file(fs: Any, folder: str, name: str, size: int) -> Iterator[dict[str, Any]]:
    """Take a file of records as one part, a parquet file as one for each row group."""
    url = f"{folder}/{name}"
    if not name.endswith(".parquet"):
        yield {"source": url, "name": name, "size": size}
        return
    from pyarrow.parquet import ParquetFile

    path = fsspec.core.url_to_fs(url)[1]
    with fs.open(path, "rb") as file:
        groups = ParquetFile(file).num_row_groups
    for group in range(groups):
        yield {"source": url, "name": name, "row_group": group, "size": size}


def _captioned(config: BuildConfig, fs: Any, folder: str, sizes: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Tars one by one; files beside their captions by groups; else parquet, which beside either is a log."""
    tars = [name for name in sizes if name.endswith(".tar")]
    for name in tars:
        yield {"source": f"{folder}/{name}", "name": name, "size": sizes[name]}
    if tars:
        return
    texts = {name.rpartition(".")[0] for name in sizes if name.endswith((".txt", ".json"))}
    ours = {
        n: s for n, s in sizes.items() if not n.endswith((".txt", ".json")) and n.rpartition(".")[0] in texts
    }
    ours = {n: s for n, s in ours.items() if not n.endswith(".parquet")}
    yield from _groups(config, folder, ours)
    if not ours and config.input == "pairs":
        for name in (n for n in sizes if n.endswith(".parquet")):
            yield from _file(fs, folder, name, sizes[name])
