"""From parts to shards: near-duplicate documents, the layout of the shards, and the writing of each."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np

from data_pipeline.building.config import BuildConfig
from data_pipeline.building.dedup import near_duplicates
from data_pipeline.building.documents import Tally
from data_pipeline.building.parts import BuiltPart, part_stem
from data_pipeline.building.storage import move_file, put_file
from data_pipeline.shards import INDEX_NAME, TAR_BLOCK, ShardWriter, decode_side, side_name


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """What a worker needs to write one shard."""

    number: int
    """Number of the shard."""
    rows: tuple[tuple[int, tuple[int, ...]], ...]
    """Parts in their order, each with the numbers of the samples that are taken from it."""
    output: str
    """Folder of the corpus."""
    work: str
    """Folder of the parts."""

    @property
    def name(self) -> str:
        """File name of the shard."""
        return f"shard-{self.number:06d}.tar"

    @property
    def done_name(self) -> str:
        """File of the work folder that says that the shard is written."""
        return f"shard-{self.number:06d}.json"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which samples go into which shard."""

    tasks: tuple[ShardTask, ...]
    """One a shard."""
    tally: Tally
    """What all parts counted, near-duplicates included."""
    words: int
    """Words of the samples that are kept."""
    media: int
    """Images or clips of the samples that are kept."""
    samples: int
    """Samples that are kept."""


def lay_out(parts: Sequence[BuiltPart], config: BuildConfig, work: str) -> Layout:
    """Drop near-duplicate documents and cut the rest into shards, in the order of the sources.

    Args:
        parts: all parts, in their order.
        config: sizes of shards, and what a near-duplicate is.
        work: folder of the parts.
    """
    tally = Tally()
    for part in parts:
        tally.merge(part.tally)
    dropped = _duplicates(parts, config, tally)
    shards: list[list[tuple[int, int]]] = []
    filled = words = media = 0
    place = 0
    for part in parts:
        for row, size in enumerate(part.sizes):
            place += 1
            if dropped[place - 1]:
                continue
            full = bool(shards) and len(shards[-1]) >= config.samples_per_shard
            if not shards or full or filled + size + 2 * TAR_BLOCK > config.bytes_per_shard:
                shards.append([])
                filled = 0
            shards[-1].append((part.number, row))
            filled += size
            words += part.texts[row][0]
            media += part.texts[row][1]
    tasks = tuple(
        ShardTask(number=number, rows=_grouped(rows), output=config.output, work=work)
        for number, rows in enumerate(shards)
    )
    return Layout(tasks=tasks, tally=tally, words=words, media=media, samples=sum(map(len, shards)))


def _duplicates(parts: Sequence[BuiltPart], config: BuildConfig, tally: Tally) -> np.ndarray:
    """Mark near-duplicate documents, bool [samples of all parts]."""
    total = sum(len(part.sizes) for part in parts)
    if not config.dedup.documents or config.kind != "interleaved" or total == 0:
        return np.zeros(total, np.bool_)
    dropped = near_duplicates(
        np.concatenate([part.signatures_NP for part in parts if len(part.sizes)]), config.dedup
    )
    count = int(dropped.sum())
    if count:
        tally.documents["near-duplicate document"] += count
    return dropped


def _grouped(rows: Sequence[tuple[int, int]]) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Gather the rows of each part."""
    groups: dict[int, list[int]] = {}
    for part, row in rows:
        groups.setdefault(part, []).append(row)
    return tuple((part, tuple(taken)) for part, taken in groups.items())


def write_shard(task: ShardTask) -> int:
    """Write one shard from the parts, and return its number; its files are there when this returns."""
    fs, output = fsspec.core.url_to_fs(task.output)
    work_fs, work = fsspec.core.url_to_fs(task.work)
    staging = f"{work}/.shard-{task.number:06d}-{uuid.uuid4().hex[:8]}"
    writer = ShardWriter(str(work_fs.unstrip_protocol(staging)), max_samples=1 << 60, max_bytes=1 << 60)
    with writer:
        for part, rows in task.rows:
            records, _ = decode_side(work_fs.cat_file(f"{work}/{part_stem(part)}.idx.json"))
            with work_fs.open(f"{work}/{part_stem(part)}.tar", "rb") as tar:
                for row in rows:
                    members = {}
                    for extension, member in records[row].members.items():
                        tar.seek(member.offset)
                        members[extension] = tar.read(member.size)
                    writer.write(records[row].key, members)
    entry: dict[str, Any] = json.loads(work_fs.cat_file(f"{staging}/{INDEX_NAME}"))["shards"][0]
    move_file(fs, f"{staging}/{side_name(entry['name'])}", f"{output}/{side_name(task.name)}")
    move_file(fs, f"{staging}/{entry['name']}", f"{output}/{task.name}")
    work_fs.rm(staging, recursive=True)
    put_file(work_fs, f"{work}/{task.done_name}", json.dumps(entry | {"name": task.name}).encode())
    return task.number
