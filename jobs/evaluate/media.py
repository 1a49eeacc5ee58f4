"""Media of an evaluation: each is encoded once over the whole job, and every prompt shows it by its latents."""

import json
import shutil
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.batch import Skip
from data_pipeline.errors import BadDataError, BadSampleError
from data_pipeline.media import (
    FEATURE_EXTENSION,
    IMAGE_EXTENSIONS,
    PIL_VIDEO_EXTENSIONS,
    MediaConfig,
    decode_features,
    decode_image,
    decode_video,
)
from data_pipeline.reading import SampleReader
from data_pipeline.storage import Storage
from flamingo_dist.evaluation.demonstrations import pooled
from flamingo_dist.inference.calls import evaluating, latents_of
from flamingo_dist.models.flamingo import Flamingo, FlamingoConfig
from flamingo_dist.parallel.topology import MegatronMPU, Topology, world_device
from jobs.evaluate.examples import Example

_THREADS = 4
"""Decoding threads of a process."""
_BATCH = 16
"""Media encoded at a time."""


class MediaStore:
    """Latents and pooled features of all media, in files that every process of the machine maps: one copy for all."""

    def __init__(self, folder: Path, keys: Sequence[str], config: FlamingoConfig, dtype: torch.dtype) -> None:
        """Open the files, which are made if need be.

        Args:
            folder: on a disk of this machine.
            keys: names of the media, in the order of the rows.
            config: the network.
            dtype: of its latents.
        """
        self.row = {key: row for row, key in enumerate(keys)}
        latents, pooled_features = _shapes(len(keys), config)
        self.latents_NRE = _mapped(folder / "latents", latents, dtype)
        self.pooled_NC = _mapped(folder / "pooled", pooled_features, torch.float32)

    def latents_of(self, keys: Sequence[str]) -> Tensor:
        """Return the latents [M, R, E] of M media, in the order in which they are named."""
        return self.latents_NRE[[self.row[key] for key in keys]]


def check_room(folder: Path, media: int, config: FlamingoConfig, dtype: torch.dtype) -> None:
    """Refuse a disk on which the files of a `MediaStore` do not fit: a full one would kill the processes that map them.

    Args:
        folder: of the store.
        media: how many it will hold.
        config: the network.
        dtype: of its latents.

    Raises:
        ValueError: says how much is needed.
    """
    latents, pooled_features = _shapes(media, config)
    needed = int(np.prod(latents)) * dtype.itemsize + 4 * int(np.prod(pooled_features))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"the latents of {media} images and videos take {needed / 1e9:.1f} GB, and {folder} has "
            f"{free / 1e9:.1f} GB: set TMPDIR to a larger disk of this machine, or ask about fewer (--limit, "
            "--support-size)."
        )


def _shapes(media: int, config: FlamingoConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of the latents and of the pooled features of so many media."""
    return (media, config.resampler.latents, config.gated.media_width), (media, config.vision.width)


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor of `shape` that lives in a file."""
    size = int(np.prod(shape))
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)


def place_of(example: Example) -> str:
    """Name a medium by where it lies: an example of both sets has one."""
    return f"{example.url}#{example.key}"


@dataclass(frozen=True, kw_only=True)
class MediaReader:
    """Reads and decodes media as training's held-out data are."""

    config: MediaConfig
    """Size and limits."""
    features: tuple[int, int]
    """Positions and width of stored features."""
    trained_frames: int
    """Frames that videos have where nothing else is asked for."""
    frames: int
    """Frames asked for; 0 asks for nothing."""
    storage: Storage
    """How shards are read."""

    def __call__(self, example: Example) -> np.ndarray:
        """Return uint8 [F, 3, H, W], or float16 features [F, S, C].

        Raises:
            BadSampleError: the medium cannot be shown.
        """
        reader = SampleReader(
            example.url,
            example.record,
            max_bytes=self.config.max_bytes,
            storage=self.storage,
            shard_bytes=example.shard_bytes,
        )
        blob, extension = reader.get(example.medium), example.medium
        if extension == FEATURE_EXTENSION:
            return decode_features(blob, self.frames or None, *self.features)
        is_clip = extension not in IMAGE_EXTENSIONS or (extension in PIL_VIDEO_EXTENSIONS and self.frames > 1)
        if is_clip:
            return decode_video(blob, extension, self.frames or self.trained_frames, self.config)
        return decode_image(blob, self.config)[None]


def encode_media(
    model: Flamingo,
    examples: Sequence[Example],
    reader: MediaReader,
    store: MediaStore,
    topology: Topology,
    folder: Path,
) -> dict[str, Skip]:
    """Encode this data-parallel rank's share of the media into the store, and wait for the others' shares.

    Args:
        model: the network.
        examples: all that there are, one a row of the store.
        reader: gives their media.
        store: takes latents and pooled features.
        topology: this process's place.
        folder: where ranks tell each other what they could not show.

    Returns:
        Media of all ranks that cannot be shown, by `place_of`.

    Raises:
        BadDataError: a shard is gone or its storage fails.
    """
    bad: list[tuple[str, Skip]] = []
    with ThreadPoolExecutor(_THREADS) as pool, evaluating(model):
        for chunk in _decoded(examples[topology.data_rank :: topology.data], reader, pool):
            shown: dict[tuple[int, ...], list[tuple[Example, np.ndarray]]] = {}
            for example, found in chunk:
                if _agreed(not isinstance(found, BadSampleError), topology):
                    assert isinstance(found, np.ndarray), "agreed by all"
                    shown.setdefault(found.shape, []).append((example, found))
                else:
                    bad.append((place_of(example), _skip(example, found)))
            for alike in shown.values():
                _encode(model, alike, store, topology)
    if topology.tensor_rank == 0:
        told = json.dumps([(place, asdict(skip)) for place, skip in bad])
        (folder / f"left-out-{topology.data_rank}").write_text(told)
    dist.barrier()
    lists = [json.loads((folder / f"left-out-{rank}").read_text()) for rank in range(topology.data)]
    return {place: Skip(**skip) for told in lists for place, skip in told}


_Decoded = tuple[Example, "np.ndarray | BadSampleError"]


def _decoded(
    examples: Sequence[Example], reader: MediaReader, pool: ThreadPoolExecutor
) -> Iterator[list[_Decoded]]:
    """Give the media in order, some at a time, while the next ones are being decoded."""

    def decode(example: Example) -> "np.ndarray | BadSampleError":
        try:
            return reader(example)
        except BadSampleError as error:
            return error

    ahead: deque[tuple[Example, Future[np.ndarray | BadSampleError]]] = deque()
    waiting = iter(examples)
    while True:
        while len(ahead) < 2 * _BATCH and (example := next(waiting, None)) is not None:
            ahead.append((example, pool.submit(decode, example)))
        if not ahead:
            return
        taken = [ahead.popleft() for _ in range(min(_BATCH, len(ahead)))]
        yield [(example, future.result()) for example, future in taken]


def _agreed(shown: bool, topology: Topology) -> bool:
    """Return whether all tensor-parallel peers can show a medium: one alone would leave the others waiting."""
    if topology.tensor == 1:
        return shown
    flag = torch.tensor(int(shown), device=world_device())
    dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=MegatronMPU().get_model_parallel_group())
    return bool(flag.item())


def _skip(example: Example, found: object) -> Skip:
    cause, detail = "too slow", "for another process of the machine"
    if isinstance(found, BadSampleError):
        if found.fatal:
            raise BadDataError(f"{example.key} of {example.url}: {found.cause}, {found.detail}")
        cause, detail = found.cause, found.detail
    return Skip(key=example.key, shard=example.url, cause=cause, detail=detail)


def _encode(
    model: Flamingo, alike: Sequence[tuple[Example, np.ndarray]], store: MediaStore, topology: Topology
) -> None:
    """Encode media of one shape and write their rows."""
    media_NF = torch.from_numpy(np.stack([found for _, found in alike])).to(world_device())
    features_NFSC = model.encode_pixels(media_NF) if media_NF.dtype == torch.uint8 else media_NF
    shown_N1 = torch.ones(len(alike), 1, dtype=torch.bool, device=media_NF.device)
    latents_N1RE = latents_of(model, features_NFSC[:, None], shown_N1)
    if topology.tensor_rank == 0:
        rows = [store.row[place_of(example)] for example, _ in alike]
        store.latents_NRE[rows] = latents_N1RE[:, 0].cpu()
        store.pooled_NC[rows] = torch.stack([pooled(features_FSC) for features_FSC in features_NFSC]).cpu()


def without(examples: Sequence[Example], bad: Mapping[str, Skip]) -> list[Example]:
    """Return the examples whose media can be shown."""
    return [example for example in examples if place_of(example) not in bad]
