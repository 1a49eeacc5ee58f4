"""Encode one shard: read it, run the encoder over its media, write the features in their place."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import IO, Any

import fsspec
import numpy as np
import torch

from data_pipeline.batch import Skip
from data_pipeline.errors import BadSampleError
from data_pipeline.index import open_index
from data_pipeline.media import (
    FEATURE_EXTENSION,
    IMAGE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    MediaConfig,
    decode_image,
    decode_video,
)
from data_pipeline.shards import INDEX_NAME, SampleRecord, ShardWriter, npy_bytes, side_name
from flamingo_dist.models.vision import VisionConfig, VisionEncoder, build_vision


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """What one worker needs to know to encode one shard."""

    shard: int
    """Number of the shard in the source."""
    name: str
    """File name of the encoded shard."""
    source_url: str
    """The source corpus."""
    folder: str
    """Where the encoded shard goes."""
    vision: VisionConfig
    """The frozen encoder."""
    media: MediaConfig
    """How media are decoded."""
    frames: int
    """Frames taken of each video."""
    batch: int
    """Images handed to the encoder at a time."""


@dataclass(frozen=True, kw_only=True)
class EncodedShard:
    """What became of one shard."""

    name: str
    """File name of the encoded shard."""
    entry: dict[str, Any] | None
    """Its line of `index.json`; None where no sample was left."""
    samples: int
    """Samples written."""
    seen: int
    """Samples read."""
    images: int
    """Images and frames encoded."""
    skips: tuple[Skip, ...]
    """Samples left out."""

    def to_json(self) -> bytes:
        """Pack the record for `from_json`."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, blob: bytes) -> "EncodedShard":
        """Unpack what `to_json` packed."""
        stored = json.loads(blob)
        return cls(**(stored | {"skips": tuple(Skip(**skip) for skip in stored["skips"])}))


@dataclass(kw_only=True)
class DecodedSample:
    """A sample whose media are decoded and wait for the encoder."""

    key: str
    members: dict[str, bytes | np.ndarray]
    """Bytes of the other members; for media uint8 frames [F, 3, H, W]. In the order of the source."""

    @property
    def media(self) -> list[np.ndarray]:
        """The decoded media, uint8 [F, 3, H, W] each."""
        return [value for value in self.members.values() if isinstance(value, np.ndarray)]

    @property
    def frames(self) -> int:
        """Frames of all media."""
        return sum(len(medium) for medium in self.media)


def part_name(shard_name: str) -> str:
    """Name of the file that says that a shard is finished, until the whole corpus is."""
    return shard_name.removesuffix(".tar") + ".part.json"


def encode_shard(task: ShardTask) -> EncodedShard:
    """Encode one shard and write it beside the others.

    Returns:
        Counts, and the samples that were left out because they hold a bad medium.
    """
    encoder = _encoder(task.vision)
    skips: list[Skip] = []
    counts = {"samples": 0, "images": 0}
    fs, path = fsspec.core.url_to_fs(task.folder)
    staging = f"{task.folder}/.{task.name}"
    with ShardWriter(staging, max_samples=1 << 60, max_bytes=1 << 60, overwrite=True) as writer:
        waiting: list[DecodedSample] = []
        for sample in decoded_samples(task.source_url, task.shard, task.media, task.frames, skips):
            waiting.append(sample)
            if sum(s.frames for s in waiting) >= task.batch:
                _flush(waiting, encoder, task, writer, counts, skips)
        _flush(waiting, encoder, task, writer, counts, skips)
    entry = _move(fs, f"{path}/.{task.name}", path, task.name) if counts["samples"] else None
    fs.rm(f"{path}/.{task.name}", recursive=True)
    shard = EncodedShard(
        name=task.name,
        entry=entry,
        samples=counts["samples"],
        seen=counts["samples"] + len(skips),
        images=counts["images"],
        skips=tuple(skips),
    )
    fs.pipe_file(f"{path}/{part_name(task.name)}", shard.to_json())
    return shard


@lru_cache(maxsize=2)
def _encoder(config: VisionConfig) -> VisionEncoder:
    """Build an encoder once for all the shards that a process encodes."""
    return build_vision(config)


def decoded_samples(
    source_url: str, shard: int, media: MediaConfig, frames: int, skips: list[Skip]
) -> Iterator[DecodedSample]:
    """Read and decode the samples of one shard, in order.

    Args:
        source_url: the corpus.
        shard: number of the shard in it.
        media: how media are decoded.
        frames: frames taken of each video.
        skips: takes the bad samples.
    """
    index = open_index([source_url])
    url = index.entries[shard].url
    with fsspec.open(url, "rb") as file:
        for record in index.records(shard):
            try:
                yield _decode_sample(record, file, media, frames)
            except BadSampleError as error:
                skips.append(Skip(key=record.key, shard=url, cause=error.cause, detail=error.detail))


def _decode_sample(record: SampleRecord, file: IO[bytes], media: MediaConfig, frames: int) -> DecodedSample:
    """Return one sample with its media as pixels.

    Raises:
        BadSampleError: a medium is damaged or the shard is cut.
    """
    members: dict[str, bytes | np.ndarray] = {}
    for extension, member in record.members.items():
        file.seek(member.offset)
        blob = file.read(member.size)
        if len(blob) < member.size:
            raise BadSampleError("truncated shard", f"{record.key}.{extension}: {len(blob)} of {member.size}")
        kind = extension.rpartition(".")[2]
        if kind in VIDEO_EXTENSIONS and frames > 1 and "." not in extension:
            members[extension] = decode_video(blob, kind, frames, media)
        elif kind in IMAGE_EXTENSIONS:
            members[extension] = decode_image(blob, media)[None]
        elif kind in VIDEO_EXTENSIONS:
            members[extension] = decode_video(blob, kind, frames, media)
        else:
            members[extension] = blob
    return DecodedSample(key=record.key, members=members)


def _flush(
    waiting: list[DecodedSample],
    encoder: VisionEncoder,
    task: ShardTask,
    writer: ShardWriter,
    counts: dict[str, int],
    skips: list[Skip],
) -> None:
    """Encode the media of `waiting`, write its samples in order, and empty it."""
    media = [medium for sample in waiting for medium in sample.media]
    features = iter(_encode(encoder, media, task.batch))
    for sample in waiting:
        members: dict[str, bytes] = {}
        finite = True
        for extension, value in sample.members.items():
            if isinstance(value, bytes):
                members[extension] = _renamed(value) if extension == "json" else value
            else:
                features_FSC = next(features)
                finite = finite and bool(np.isfinite(features_FSC).all())
                members[_feature_name(extension)] = npy_bytes(features_FSC)
                counts["images"] += len(value)
        if finite:
            writer.write(sample.key, members)
            counts["samples"] += 1
        else:
            skips.append(Skip(key=sample.key, shard=task.name, cause="features not finite in float16"))
    waiting.clear()


def _encode(encoder: VisionEncoder, media: list[np.ndarray], batch: int) -> list[np.ndarray]:
    """Return float16 features [F, S, C] of each medium, uint8 [F, 3, H, W]; `batch` frames at a time."""
    if not media:
        return []
    pixels_N3HW = torch.from_numpy(np.concatenate(media))
    with torch.inference_mode():
        chunks = [encoder(part).to(torch.float16) for part in torch.split(pixels_N3HW, batch)]
    return np.split(torch.cat(chunks).numpy(), np.cumsum([len(medium) for medium in media])[:-1])


def _feature_name(extension: str) -> str:
    """Return the extension of the features of a medium: `png` -> `npy`, `0.png` -> `0.npy`."""
    number, dot, _ = extension.rpartition(".")
    return f"{number}{dot}{FEATURE_EXTENSION}"


def _renamed(blob: bytes) -> bytes:
    """Point the items of an interleaved record to the features; any other JSON stays as it is."""
    try:
        record = json.loads(blob)
        items = record["items"]
        for item in items:
            if "image" in item:
                item["image"] = str(PurePosixPath(item["image"]).with_suffix(f".{FEATURE_EXTENSION}"))
    except (ValueError, KeyError, TypeError):
        return blob  # not a record of ours, or a damaged one: the reader says so
    return json.dumps(record, ensure_ascii=False).encode()


def _move(fs: fsspec.AbstractFileSystem, staging: str, path: str, name: str) -> dict[str, Any]:
    """Move the one shard of `staging` to its place under its own name; returns its line of the index."""
    entry: dict[str, Any] = json.loads(fs.cat_file(f"{staging}/{INDEX_NAME}"))["shards"][0]
    written = entry["name"]
    fs.mv(f"{staging}/{side_name(written)}", f"{path}/{side_name(name)}")
    fs.mv(f"{staging}/{written}", f"{path}/{name}")
    return entry | {"name": name}
