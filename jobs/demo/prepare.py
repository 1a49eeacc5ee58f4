"""Fill the demonstration's cache in one call: fetch the parts, write the shards, encode their media.

`python -m jobs.demo.prepare` does it from a shell; what is there already is left as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import ray
from rich.console import Console

from flamingo_dist.models.vision import VisionConfig
from jobs.demo.corpora import TRAIN, Corpora, CorporaConfig, build_corpora
from jobs.demo.fetch import Parts, fetch_parts
from jobs.encode import EncodeConfig, EncodeReport, corpus_fingerprint, encode_corpus, find_encoded
from jobs.statistics import write_statistics

VIDEO_FRAMES = 8
"""Frames stored of each clip."""
IMAGE_SIZE = 224
"""What the encoder was trained at."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Everything that a demonstration run reads."""

    parts: Parts
    """The fetched packages."""
    corpora: Corpora
    """The data sets as shards of media."""
    vision: VisionConfig
    """The frozen encoder."""
    features: Mapping[str, EncodeReport]
    """The data sets as shards of features, by data set name."""


def demo_encoder(parts: Parts, *, dtype: Literal["float32", "bfloat16"] = "float32") -> VisionConfig:
    """Return the demonstration's encoder as published; `FileNotFoundError` where its weights are missing."""
    weights = str(parts.vision_encoder)
    return VisionConfig(name="efficientnet-lite0", weights=weights, image_size=IMAGE_SIZE, dtype=dtype)


def demo_vision(
    parts: Parts, corpora: Corpora, *, dtype: Literal["float32", "bfloat16"] = "float32"
) -> VisionConfig:
    """Return the encoder with its features standardised over a training data set.

    The statistics are taken once, from some 256 images, and kept in the cache.

    Raises:
        FileNotFoundError: the encoder's weights are missing.
    """
    bare = demo_encoder(parts, dtype=dtype)
    source = corpora.url(next(name for name in (*TRAIN, *corpora.datasets) if name in corpora.datasets))
    path = parts.cache / "statistics" / f"{corpus_fingerprint(source, EncodeConfig(vision=bare))}.safetensors"
    if not path.exists():
        write_statistics(path, source, bare)
    return replace(bare, statistics=str(path))


def frames_of(dataset: str) -> int:
    """Return F, the frames stored of each medium of the data set called `dataset`."""
    return VIDEO_FRAMES if dataset.startswith("videos") else 1


def prepare_demo(
    *,
    corpora: CorporaConfig | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    use_ray: bool = True,
    console: Console | None = None,
) -> Demo:
    """Fetch, build and encode whatever the cache lacks.

    Args:
        corpora: splits of the data sets.
        dtype: what the encoder computes in.
        use_ray: encode on all cores by Ray tasks, on the running Ray or on one of its own.
        console: where progress is shown.

    Returns:
        The parts, the corpora and the features, old and new.

    Raises:
        RuntimeError: no data at all could be had.
        FileNotFoundError: the encoder's weights could not be had; the message says why.
    """
    parts = fetch_parts(console=console)
    built = build_corpora(parts, corpora, console=console)
    vision = demo_vision(parts, built, dtype=dtype)
    features = _encode_all(parts, built, vision, use_ray=use_ray, console=console)
    return Demo(parts=parts, corpora=built, vision=vision, features=features)


def _encode_all(
    parts: Parts, corpora: Corpora, vision: VisionConfig, *, use_ray: bool, console: Console | None
) -> dict[str, EncodeReport]:
    """Encode every data set that is not encoded yet; returns the reports of all."""
    configs = {name: EncodeConfig(vision=vision, frames=frames_of(name)) for name in corpora.datasets}
    targets = {name: str(parts.cache / "features" / name) for name in corpora.datasets}
    reports: dict[str, EncodeReport] = {}
    for name, config in configs.items():
        found = find_encoded(corpora.url(name), targets[name], config)
        if found is not None:
            reports[name] = found
    # One Ray for all data sets: starting it takes longer than encoding the small ones.
    ours = use_ray and len(reports) < len(configs) and not ray.is_initialized()
    if ours:
        ray.init(include_dashboard=False, log_to_driver=False)
    try:
        for name, config in configs.items():
            if name not in reports:
                reports[name] = encode_corpus(
                    corpora.url(name), targets[name], config, use_ray=use_ray, console=console
                )
            if console is not None:
                console.print(f"{name}: {reports[name].line()}", highlight=False)
    finally:
        if ours:
            ray.shutdown()
    return {name: reports[name] for name in configs}


if __name__ == "__main__":
    prepare_demo(console=Console(stderr=True))
