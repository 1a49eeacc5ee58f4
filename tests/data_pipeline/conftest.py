"""Fixtures of this room: data sets on disk, and a Ray of two logical CPUs."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import DatasetConfig
from tests.data_pipeline.corpora import one_of_each, pairs_config, write_pairs


@pytest.fixture
def pairs(tmp_path: Path) -> Callable[..., DatasetConfig]:
    """Writes 23 pairs into 5 shards and returns their configuration with the given changes."""
    write_pairs(tmp_path / "pairs", 23)

    def make(**changes: Any) -> DatasetConfig:
        return pairs_config(tmp_path / "pairs", **changes)

    return make


@pytest.fixture
def three_kinds(tmp_path: Path) -> tuple[DatasetConfig, ...]:
    """One data set of each kind."""
    return one_of_each(tmp_path)


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """Ray on two logical CPUs; its sockets need a path far shorter than pytest's."""
    import ray

    folder = tempfile.mkdtemp(prefix="fr", dir="/tmp")
    ray.init(
        address="local",  # never another cluster that runs on this machine
        num_cpus=2,
        include_dashboard=False,
        _temp_dir=folder,
        log_to_driver=False,
        object_store_memory=128 << 20,
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
