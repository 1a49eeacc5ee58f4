"""Encode a corpus once: every medium is replaced by the features of a frozen vision encoder.

A frozen encoder gives the same features in every epoch, so a run that can spare the disk need not run it in
each. The result is a corpus of the same layout, keys and order with `.npy` members (float16 [F, S, C]); its
folder is named after all that decides it, so it is found again where it fits and never where it does not.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import fsspec
import ray
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from data_pipeline.batch import Skip
from data_pipeline.index import ShardEntry, open_index
from data_pipeline.media import MediaConfig
from data_pipeline.shards import INDEX_NAME, encode_index
from flamingo_dist.models.vision import VisionConfig
from jobs.encode_shard import EncodedShard, ShardTask, encode_shard, part_name

FORMAT_VERSION = 1
"""Raise it when the same encoder and corpus would give other features or another layout."""
REPORT_NAME = "encode.json"
TASKS_PER_CPU = 4
"""Tasks handed to Ray ahead of time; the rest wait here, so that a large corpus does not flood its queue."""


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """Which features are stored."""

    vision: VisionConfig
    """The frozen encoder."""
    frames: int = 1
    """Frames taken of each video; 1 for corpora of images: `.webp` and `.gif` members are then stills."""
    video_fps: float | None = None
    """Frames a second of the clip; None spreads the frames over the whole video."""
    batch: int = 16
    """Images handed to the encoder at a time."""

    def __post_init__(self) -> None:
        if self.frames < 1 or self.batch < 1:
            raise ValueError(f"frames is {self.frames} and batch is {self.batch}: give 1 or more")

    @property
    def media(self) -> MediaConfig:
        """How media are decoded; a run that encodes live sees equal features with the same settings."""
        return media_config(self.vision, video_fps=self.video_fps)


def media_config(vision: VisionConfig, *, video_fps: float | None = None) -> MediaConfig:
    """Return how media are decoded for `vision`: its size and border colour, without augmentation."""
    return MediaConfig(
        image_size=vision.image_size,
        pad_colour=vision.pad_colour,
        video_fps=video_fps,
        hflip_p=0.0,
        colour_jitter=0.0,
    )


@dataclass(frozen=True, kw_only=True)
class EncodeReport:
    """What encoding one corpus came to."""

    url: str
    """Folder of the encoded shards, to be given to the data pipeline in place of the source."""
    samples: int
    """Samples written."""
    images: int
    """Images and frames encoded."""
    skips: tuple[Skip, ...]
    """Samples left out because a medium is bad, and damaged shards."""
    seconds: float
    """Wall time of the encoding."""
    reused: bool
    """True where the features were there already."""

    @property
    def causes(self) -> dict[str, int]:
        """How many samples were left out, by cause."""
        return dict(Counter(skip.cause for skip in self.skips))

    def line(self) -> str:
        """Return the report in one line."""
        left_out = ", ".join(f"{count} {cause}" for cause, count in self.causes.items())
        rate = f"{self.images / self.seconds:.0f} images/s" if self.seconds else ""
        how = "found" if self.reused else f"encoded in {self.seconds:.1f} s, {rate}"
        bad = f"; left out: {left_out}" if left_out else ""
        return f"{self.samples} samples, {self.images} images, {how}{bad}"


def encode_corpus(
    source_url: str,
    target_url: str,
    config: EncodeConfig,
    *,
    use_ray: bool = True,
    console: Console | None = None,
) -> EncodeReport:
    """Encode every medium of a corpus, shard by shard, or find it encoded.

    The features go to `target_url`/FINGERPRINT. A run that was cut off goes on with the shards it lacks.

    Args:
        source_url: folder, tar or pattern of WebDataset shards, any fsspec URL.
        target_url: folder that holds the encoded versions of this corpus.
        config: encoder and sampling of frames.
        use_ray: encode as Ray tasks of one CPU each, one for a shard, on the running Ray or on one started
            here; False encodes in this process.
        console: where the progress bar is drawn.

    Returns:
        Where the features are, and what was left out.

    Raises:
        MissingShardError: the source does not exist.
        FileNotFoundError: the encoder's weights are not there.
        RuntimeError: not one sample could be encoded.
    """
    started = time.monotonic()
    folder = f"{target_url.rstrip('/')}/{corpus_fingerprint(source_url, config)}"
    fs, path = fsspec.core.url_to_fs(folder)
    held = _read_report(fs, path, folder)
    if held is not None:
        return held
    fs.makedirs(path, exist_ok=True)
    index = open_index([source_url])
    tasks = _tasks(source_url, folder, config, len(index.entries))
    done = _encoded_shards(fs, path, tasks)
    todo = [task for task in tasks if task.name not in done]
    run = _run_on_ray if use_ray else _run_here
    for shard in _with_progress(run(todo), index.entries, done, console):
        done[shard.name] = shard
    shards = [done[task.name] for task in tasks]
    report = EncodeReport(
        url=folder,
        samples=sum(shard.samples for shard in shards),
        images=sum(shard.images for shard in shards),
        skips=(*index.skips, *(skip for shard in shards for skip in shard.skips)),
        seconds=round(time.monotonic() - started, 3),
        reused=False,
    )
    if report.samples == 0:
        raise RuntimeError(f"no sample of {source_url} could be encoded: {report.causes}")
    _publish(fs, path, shards, report)
    return report


def find_encoded(source_url: str, target_url: str, config: EncodeConfig) -> EncodeReport | None:
    """Return the report of `encode_corpus` with these arguments if its features are there, else None."""
    folder = f"{target_url.rstrip('/')}/{corpus_fingerprint(source_url, config)}"
    fs, path = fsspec.core.url_to_fs(folder)
    return _read_report(fs, path, folder)


def corpus_fingerprint(source_url: str, config: EncodeConfig) -> str:
    """Return a short hash of the encoder, its weights, the sampling of frames and the source's shards.

    Where the source has an `index.json`, the checksums of its shards take part; else their names and sizes.
    """
    fs, path = fsspec.core.url_to_fs(source_url)
    index_path = f"{path.rstrip('/')}/{INDEX_NAME}"
    source = fs.cat_file(index_path).hex() if fs.exists(index_path) else open_index([source_url]).fingerprint
    media = asdict(config.media)
    del media["jpeg_margin"]  # never set here; features stored before there was such a setting stay valid
    parts = (FORMAT_VERSION, config.vision.fingerprint(), config.frames, media, source)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _tasks(source_url: str, folder: str, config: EncodeConfig, shards: int) -> list[ShardTask]:
    """Return one task for each shard of the source."""
    return [
        ShardTask(
            shard=number,
            name=f"shard-{number:06d}.tar",
            source_url=source_url,
            folder=folder,
            vision=config.vision,
            media=config.media,
            frames=config.frames,
            batch=config.batch,
        )
        for number in range(shards)
    ]


def _run_here(tasks: Sequence[ShardTask]) -> Iterator[EncodedShard]:
    """Encode shard by shard in this process."""
    return map(encode_shard, tasks)


def _encode_in_worker(task: ShardTask) -> EncodedShard:
    """Encode one shard on the one CPU that the task was given."""
    torch.set_num_threads(1)
    return encode_shard(task)


def _run_on_ray(tasks: Sequence[ShardTask]) -> Iterator[EncodedShard]:
    """Encode shards as Ray tasks; yields each as it ends. Starts Ray where none runs, and ends it again."""
    if not tasks:
        return
    ours = not ray.is_initialized()
    if ours:
        ray.init(include_dashboard=False, log_to_driver=False)
    try:
        remote: Callable[..., Any] = ray.remote(num_cpus=1)(_encode_in_worker).remote
        ahead = TASKS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
        waiting = list(tasks)
        running: list[Any] = []
        while waiting or running:
            while waiting and len(running) < ahead:
                running.append(remote(waiting.pop(0)))
            ready, running = ray.wait(running, num_returns=1)
            yield from ray.get(ready)
    finally:
        if ours:
            ray.shutdown()


def _with_progress(
    shards: Iterator[EncodedShard],
    entries: Sequence[ShardEntry],
    done: dict[str, EncodedShard],
    console: Console | None,
) -> Iterator[EncodedShard]:
    """Pass on `shards` while a bar counts their samples."""
    if console is None:
        yield from shards
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("samples"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        total = sum(entry.samples for entry in entries)
        bar = progress.add_task("encoding", total=total, completed=sum(s.seen for s in done.values()))
        for shard in shards:
            progress.advance(bar, shard.seen)
            yield shard


def _encoded_shards(
    fs: fsspec.AbstractFileSystem, path: str, tasks: Sequence[ShardTask]
) -> dict[str, EncodedShard]:
    """Return the shards that an earlier, cut-off run left finished, by name."""
    done = {}
    for task in tasks:
        part = f"{path}/{part_name(task.name)}"
        if fs.exists(part):
            done[task.name] = EncodedShard.from_json(fs.cat_file(part))
    return done


def _publish(
    fs: fsspec.AbstractFileSystem, path: str, shards: Sequence[EncodedShard], report: EncodeReport
) -> None:
    """Write the report and, last, the index that makes the corpus complete."""
    stored = asdict(report) | {"url": ""}
    fs.pipe_file(f"{path}/{REPORT_NAME}", json.dumps(stored, indent=1).encode())
    fs.pipe_file(f"{path}/{INDEX_NAME}", encode_index([s.entry for s in shards if s.entry is not None]))
    for shard in shards:
        fs.rm_file(f"{path}/{part_name(shard.name)}")


def _read_report(fs: fsspec.AbstractFileSystem, path: str, folder: str) -> EncodeReport | None:
    """Return the report of a finished encoding, or None."""
    if not fs.exists(f"{path}/{INDEX_NAME}"):
        return None
    stored = json.loads(fs.cat_file(f"{path}/{REPORT_NAME}"))
    skips = tuple(Skip(**skip) for skip in stored["skips"])
    return EncodeReport(**(stored | {"url": folder, "skips": skips, "reused": True}))
