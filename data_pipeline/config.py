"""Configuration of one data set."""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from data_pipeline.cache import LocalCache
from data_pipeline.media import MediaConfig
from data_pipeline.schedule import WeightSchedule
from data_pipeline.storage import Storage

_Kind = Literal["pair", "interleaved", "video"]
_Mode = Literal["train", "eval"]
_Media = Literal["pixels", "features"]
_KINDS, _MODES, _MEDIA = get_args(_Kind), get_args(_Mode), get_args(_Media)
_FREE_FIELDS = frozenset(
    {
        "urls",
        "weight",
        "weight_schedule",
        "bad_sample_budget",
        "bad_sample_floor",
        "threads",
        "cache_shards",
        "storage_options",
        "read_attempts",
        "cache_folder",
        "cache_bytes",
        "cache_chunk_bytes",
        "max_seconds",
    }
)


@dataclass(frozen=True, kw_only=True)
class DatasetConfig(MediaConfig):
    """One data set: its shards, the shape of its batches, its formatting and augmentation.

    The fields of `MediaConfig` (image size, limits, frame rate, flips) belong to it too.
    """

    name: str
    """Unique name; part of every random draw and of the metrics."""
    kind: _Kind
    """Layout of the samples, see `data_pipeline.shards`."""
    urls: tuple[str, ...]
    """Folders, `.tar` files, brace patterns or globs, on any fsspec file system."""
    batch_size: int
    """Samples a step over all data-parallel ranks (G)."""
    weight: float = 1.0
    """Lambda, the weight of the data set's loss (paper: M3W 1.0, ALIGN 0.2, LTIP 0.2, VTP 0.03)."""
    weight_schedule: WeightSchedule = field(default_factory=WeightSchedule)
    """Lambda by step, in place of `weight`; without points, `weight` stays."""
    mode: _Mode = "train"
    """"eval": fixed order, no augmentation, phi to the previous image, first caption, window at the start."""
    seq_len: int = 64
    """T, tokens a sample (paper: 256 for documents, 32 or 64 for pairs, 32 for video)."""
    pack: int = 1
    """Pairs or videos that share a row; text, images and positions of each stay its own."""
    row_len: int = 0
    """Tokens of a row of `pack` samples; 0 is pack * seq_len. Below it, the longest captions of a row are cut
    until they fit."""
    max_media: int = 1
    """M, media a sample (paper: 5 for documents, 1 else)."""
    frames: int = 1
    """F, frames a medium (paper: 8 for video, 1 else)."""
    media: _Media = "pixels"
    """"features": members hold float16 [F, S, C] of a frozen encoder instead of images."""
    num_features: int | None = None
    """S, spatial positions of a frame; for features only."""
    width: int | None = None
    """C, channels of the encoder; for features only."""
    p_next: float = 0.5
    """Probability that a document's text sees the next image instead of the previous (paper: 0.5)."""
    leading_space_p: float = 0.5
    """Probability of one space before the caption of a pair or video (paper: 0.5)."""
    loss_before_first_image: bool = True
    """False: no loss on targets whose predicting position sees no image (paper: sums over all text)."""
    window_needs_image: bool = True
    """Random windows of documents hold an image if the document has one."""
    shuffle: bool = True
    """False keeps the order of the shards in training."""
    shuffle_shards: int = 8
    """Shards whose samples are mixed with one another in an epoch."""
    bad_sample_budget: float = 0.01
    """Largest share of bad samples among those read before the run fails."""
    bad_sample_floor: int = 10
    """Bad samples that never fail a run by themselves, whatever the share."""
    threads: int = 1
    """Threads that fetch and decode the samples of a batch; more help on remote storage."""
    cache_shards: int = 32
    """Shards whose offsets a reader keeps in memory."""
    storage_options: str = ""
    """Arguments of the fsspec file system as JSON, as '{"endpoint_url": "http://..."}' for S3; no credentials."""
    read_attempts: int = 8
    """Times that a read of the storage is tried, with growing pauses, before the run stops."""
    cache_folder: str = ""
    """Folder of a node's disk that keeps what was read, for all readers of the node; "" keeps nothing."""
    cache_bytes: int = 32 << 30
    """Bound of that folder in bytes; what was not used longest goes first."""
    cache_chunk_bytes: int = 4 << 20
    """Bytes that are read at once where there is a cache: the read-ahead."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in {"kind": _KINDS, "mode": _MODES, "media": _MEDIA}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} {getattr(self, name)!r} of data set {self.name!r}: choose one of {', '.join(allowed)}"
                )
        self._check_counts()
        if isinstance(cast(object, self.urls), str):
            raise ValueError(
                f"urls {self.urls!r} of data set {self.name!r}: give a tuple, as ({self.urls!r},)"
            )
        for name in ("p_next", "leading_space_p", "bad_sample_budget"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"{name} {getattr(self, name)} of data set {self.name!r}: must lie in [0, 1]"
                )
        if not 0 <= self.weight < math.inf:
            raise ValueError(
                f"weight {self.weight} of data set {self.name!r}: must be finite and not negative; 0 leaves it out"
            )
        if self.kind != "interleaved" and self.max_media != 1:
            raise ValueError(
                f"max_media {self.max_media} of data set {self.name!r}: a {self.kind} holds one medium; "
                "use 1, or kind 'interleaved'"
            )
        if self.kind != "video" and self.frames != 1:
            raise ValueError(
                f"frames {self.frames} of data set {self.name!r}: an image has one frame; "
                "use 1, or kind 'video'"
            )
        self._check_features()
        self._check_packing()
        self.storage()

    def _check_counts(self) -> None:
        """Check the fields that count something."""
        if not self.name or not self.urls:
            raise ValueError(f"data set {self.name!r} with urls {self.urls!r}: both must be given")
        least = {
            "batch_size": 1,
            "seq_len": 8,
            "max_media": 1,
            "frames": 1,
            "pack": 1,
            "row_len": 0,
            "shuffle_shards": 1,
            "threads": 1,
            "bad_sample_floor": 0,
            "cache_shards": 1,
            "read_attempts": 1,
        }
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(
                    f"{name} {getattr(self, name)} of data set {self.name!r}: must be at least {smallest}"
                )

    def _check_packing(self) -> None:
        """Check that rows hold what is packed into them."""
        if self.pack == 1 and self.row_len:
            raise ValueError(
                f"row_len {self.row_len} of data set {self.name!r}: only rows of pack > 1 have one"
            )
        if self.pack == 1:
            return
        if self.kind == "interleaved" or self.mode == "eval":
            raise ValueError(
                f"pack {self.pack} of data set {self.name!r}: only pairs and videos in mode 'train' are packed, "
                f"this is {self.kind!r} in mode {self.mode!r}; use 1"
            )
        if self.batch_size % self.pack or (self.row_len and self.row_len < 8 * self.pack):
            raise ValueError(
                f"pack {self.pack} of data set {self.name!r}: batch_size {self.batch_size} must be a multiple of "
                f"it, and row_len {self.row_len} 0 or at least {8 * self.pack}"
            )

    def _check_features(self) -> None:
        """Check that features have a shape, and pixels none."""
        shape = (self.num_features, self.width)
        if self.media == "features" and (None in shape or min(s or 0 for s in shape) < 1):
            raise ValueError(
                f"num_features {shape[0]}, width {shape[1]} of data set {self.name!r}: features need both, "
                "the S and C of the encoder that made them"
            )
        if self.media == "pixels" and shape != (None, None):
            raise ValueError(
                f"num_features {shape[0]}, width {shape[1]} of data set {self.name!r} with media='pixels': "
                "leave both out, or set media='features'"
            )
        if self.media == "features" and self.colour_jitter:
            warnings.warn(f"colour_jitter of data set {self.name!r} has no effect on features", stacklevel=4)

    @property
    def tokens_per_row(self) -> int:
        """T of a batch: tokens of a row, which holds `pack` samples."""
        return (self.row_len or self.pack * self.seq_len) if self.pack > 1 else self.seq_len

    def weight_at(self, step: int) -> float:
        """Return lambda at a step."""
        return self.weight_schedule.at(step) if self.weight_schedule.points else self.weight

    @property
    def media_shape(self) -> tuple[int, ...]:
        """Shape of a row's media: (M, F, 3, H, W) for pixels, (M, F, S, C) for features."""
        slots = self.max_media * self.pack
        if self.media == "pixels":
            return (slots, self.frames, 3, self.image_size, self.image_size)
        assert self.num_features is not None, "checked in __post_init__"
        assert self.width is not None, "checked in __post_init__"
        return (slots, self.frames, self.num_features, self.width)

    def storage(self) -> Storage:
        """Return how the files of this data set are read."""
        cache = None
        if self.cache_folder:
            cache = LocalCache(
                folder=self.cache_folder, max_bytes=self.cache_bytes, chunk_bytes=self.cache_chunk_bytes
            )
        return Storage(self.storage_options, attempts=self.read_attempts, cache=cache)

    def settings(self) -> dict[str, Any]:
        """Return the fields that decide what a position holds, as plain JSON values.

        Where the shards lie, the loss weight, the budget and the number of threads may change between a
        checkpoint and its continuation; these may not.
        """
        fields = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _FREE_FIELDS
        }
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    def local_batch_size(self, dp_size: int) -> int:
        """Return the samples of one data-parallel rank.

        Raises:
            ValueError: when the global batch does not divide.
        """
        unit = dp_size * self.pack
        if self.batch_size % unit:
            below = self.batch_size - self.batch_size % unit
            choices = [str(n) for n in (below, below + unit) if n]
            rows = f" in rows of {self.pack}" if self.pack > 1 else ""
            raise ValueError(
                f"batch_size {self.batch_size} of data set {self.name!r} does not divide among {dp_size} "
                f"data-parallel ranks{rows}; use {' or '.join(choices)}, or another number of ranks"
            )
        return self.batch_size // dp_size
