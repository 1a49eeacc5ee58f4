"""Local paths of a run made absolute: Ray's processes work in other folders than the person who named them."""

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace

from data_pipeline.config import DatasetConfig
from flamingo_dist.models.weights import ranges
from jobs.config import DataConfig, RunConfig

_CHOICES = ("auto", "latest")


def absolute(place: str) -> str:
    """Return a relative local path, which may be a brace pattern or a glob, from the root on; URLs as they are."""
    if not place or "://" in place or "::" in place or place.startswith("{/"):
        return place
    return ranges.absolute(os.path.expanduser(place))


def absolute_checkpoint(wanted: str | None) -> str | None:
    """Return what `--resume` names with its path, where it is one, from the root on."""
    if wanted is None or wanted in _CHOICES or wanted.isdigit():
        return wanted
    return absolute(wanted)


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Return `config` with all that it reads, and the cache of features, from the root on."""
    model, lm, vision = config.model, config.model.lm, config.model.vision
    vision = replace(vision, weights=absolute(vision.weights), statistics=absolute(vision.statistics))
    lm = replace(lm, weights=None if lm.weights is None else absolute(lm.weights))
    weights = None if model.weights is None else absolute(model.weights)
    with warnings.catch_warnings(action="ignore"):  # given when `config` was made
        return replace(
            config, model=replace(model, weights=weights, lm=lm, vision=vision), data=_of_data(config.data)
        )


def _of_data(data: DataConfig) -> DataConfig:
    return replace(
        data,
        train=_of_datasets(data.train),
        held_out=_of_datasets(data.held_out),
        tokenizer=replace(data.tokenizer, path=absolute(data.tokenizer.path)),
        cache=absolute(data.cache),
    )


def _of_datasets(datasets: Mapping[str, DatasetConfig]) -> dict[str, DatasetConfig]:
    return {
        name: replace(
            dataset,
            urls=tuple(absolute(url) for url in dataset.urls),
            cache_folder=absolute(dataset.cache_folder),
        )
        for name, dataset in datasets.items()
    }
