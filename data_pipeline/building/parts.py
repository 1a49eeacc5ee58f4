"""One part of a build: read, filter, write a tar of samples and, last, a file that says what is in it."""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import fsspec
import numpy as np

from data_pipeline.building.config import BuildConfig
from data_pipeline.building.documents import Captioned, Document, Tally
from data_pipeline.building.filtering import Filter
from data_pipeline.building.images import HashIndex
from data_pipeline.building.pages import read_pages
from data_pipeline.building.plan import Part
from data_pipeline.building.storage import move_file, put_file
from data_pipeline.shards import ShardWriter, side_name

EVALUATION = "evaluation.npy"
"""Hashes of the evaluation sets, in the work folder."""
_Reader = Callable[[Part, BuildConfig, Tally], Iterable[Document | Captioned]]


@dataclass(frozen=True, kw_only=True)
class PartTask:
    """What a worker needs to build one part."""

    part: Part
    """What it reads."""
    config: BuildConfig
    """How it filters."""
    work: str
    """Folder where parts are kept until the corpus is finished."""
    run: str = ""
    """Fingerprint of the build, by which a worker process knows its caches from those of another build."""


@dataclass(frozen=True, kw_only=True)
class BuiltPart:
    """What one part came to."""

    number: int
    """Number of the part."""
    tally: Tally
    """What was counted."""
    sizes: tuple[int, ...]
    """Bytes that each sample takes in a shard, tar headers included."""
    texts: tuple[tuple[int, int], ...]
    """Words and media of each sample."""
    signatures_NP: np.ndarray
    """MinHash signatures, uint32 [N, permutations]; [N, 0] where documents are not compared."""


def part_stem(number: int) -> str:
    """Name of a part's files without ending."""
    return f"part-{number:06d}"


def build_part(task: PartTask) -> int:
    """Build one part, and return its number; the part's files are there when this returns.

    Raises:
        RuntimeError: the storage fails.
    """
    fs, work = fsspec.core.url_to_fs(task.work)
    stem, attempt = part_stem(task.part.number), uuid.uuid4().hex[:8]
    staging = f"{work}/.{stem}-{attempt}"
    tally = Tally()
    sizes, texts, signatures = [], [], []
    evaluation = _evaluation(task.work, task.run)
    samples = Filter(task.config, evaluation, source_number=task.part.source_number)
    with ShardWriter(_url(fs, staging), max_samples=1 << 60, max_bytes=1 << 60) as writer:
        for found in _reader(task.config)(task.part, task.config, tally):
            sample = samples.apply(found, tally)
            if sample is None:
                continue
            writer.write(sample.key, sample.members)
            sizes.append(sample_size(sample.members))
            texts.append((sample.words, sample.media))
            signatures.append(sample.signature)
    if sizes:
        name = "shard-000000.tar"
        move_file(fs, f"{staging}/{side_name(name)}", f"{work}/{stem}.idx.json")
        move_file(fs, f"{staging}/{name}", f"{work}/{stem}.tar")
    fs.rm(staging, recursive=True)
    record = {
        "number": task.part.number,
        "tally": tally.to_json(),
        "sizes": sizes,
        "texts": texts,
        "signatures": base64.b64encode(b"".join(signatures)).decode(),
    }
    put_file(fs, f"{work}/{stem}.json", json.dumps(record).encode())
    return task.part.number


def read_part(fs: Any, work: str, number: int) -> BuiltPart:
    """Read what `build_part` left."""
    stored = json.loads(fs.cat_file(f"{work}/{part_stem(number)}.json"))
    flat = np.frombuffer(base64.b64decode(stored["signatures"]), "<u4").astype(np.uint32)
    count = len(stored["sizes"])
    return BuiltPart(
        number=number,
        tally=Tally.from_json(stored["tally"]),
        sizes=tuple(stored["sizes"]),
        texts=tuple((words, media) for words, media in stored["texts"]),
        signatures_NP=flat.reshape(count, len(flat) // count if count else 0),
    )


def sample_size(members: Any) -> int:
    """Bytes that a sample takes in a tar, at most: headers and data rounded up to blocks."""
    return sum(len(blob) + 2 * 512 for blob in members.values())


def _url(fs: Any, path: str) -> str:
    """Return a URL that opens the same file system."""
    return str(fs.unstrip_protocol(path))


@lru_cache(maxsize=1)
def _evaluation(work: str, run: str) -> HashIndex | None:
    """Load the hashes of the evaluation sets, once a process and build."""
    del run
    fs, path = fsspec.core.url_to_fs(work)
    if not fs.exists(f"{path}/{EVALUATION}"):
        return None
    with fs.open(f"{path}/{EVALUATION}", "rb") as file:
        stored = np.load(file, allow_pickle=False)
    return HashIndex((int(h) for h in stored[1:]), int(stored[0]))


def _reader(config: BuildConfig) -> _Reader:
    """Choose the reader of an input; each imports its own library."""
    if config.input == "html":
        return read_pages
    if config.input == "warc":
        from data_pipeline.building.warc import read_warc

        return read_warc
    if config.input in ("obelics", "mmc4"):
        from data_pipeline.building.published import read_published

        return read_published
    from data_pipeline.building.captioned import read_captioned

    return read_captioned


def found_parts(fs: Any, work: str, numbers: Iterable[int]) -> Iterator[int]:
    """Yield the parts that an earlier run finished."""
    fs.invalidate_cache()
    names = {str(path).rpartition("/")[2] for path in fs.ls(work, detail=False)}
    for number in numbers:
        if f"{part_stem(number)}.json" in names:
            yield number
