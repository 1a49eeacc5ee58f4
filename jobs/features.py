"""Encode all data sets of a run once, and point the run at the features."""

from dataclasses import replace

from rich.console import Console

from data_pipeline.config import DatasetConfig
from jobs.config import RunConfig
from jobs.demo.fetch import cache_folder
from jobs.encode import EncodeConfig, encode_corpus


def encode_features(config: RunConfig) -> RunConfig:
    """Return `config` with every data set streaming features, encoded first where they are not there yet.

    Where `data.encode_features` is off, the configuration is returned as it is.

    Raises:
        ValueError: a data set has several URLs; features are encoded folder by folder.
    """
    if not config.data.encode_features:
        return config
    root = config.data.cache or str(cache_folder() / "features")
    console = Console()

    def encoded(dataset: DatasetConfig) -> DatasetConfig:
        if len(dataset.urls) != 1:
            raise ValueError(
                f"data set {dataset.name}: data.encode_features takes one folder, not {list(dataset.urls)}."
            )
        settings = EncodeConfig(
            vision=config.model.vision, frames=dataset.frames, video_fps=dataset.video_fps
        )
        report = encode_corpus(dataset.urls[0], f"{root}/{dataset.name}", settings, console=console)
        console.print(f"{dataset.name}: {report.line()}")
        return replace(
            dataset,
            urls=(report.url,),
            media="features",
            num_features=config.model.vision.num_features,
            width=config.model.vision.width,
        )

    train = {name: encoded(dataset) for name, dataset in config.data.train.items()}
    held_out = {name: encoded(dataset) for name, dataset in config.data.held_out.items()}
    return replace(config, data=replace(config.data, train=train, held_out=held_out, encode_features=False))
