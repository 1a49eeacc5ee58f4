"""Clusters for the integration tests."""

import os
from collections.abc import Iterator

import pytest

from tests.integration.slurm_cluster import SlurmCluster, missing_requirement


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """Two idle SLURM nodes. Skips where SLURM cannot run; under CI that is a failure."""
    missing = missing_requirement()
    if missing and os.environ.get("CI"):
        pytest.fail(missing)
    if missing:
        pytest.skip(missing)
    cluster = SlurmCluster()
    cluster.start()
    yield cluster
    cluster.stop()
