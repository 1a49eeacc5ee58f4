"""Clusters for the integration tests."""

import os
import signal
from collections.abc import Iterator

import pytest

from tests.integration.slurm_cluster import SlurmCluster, missing_requirement


@pytest.fixture(scope="session")
def slurm_daemons() -> Iterator[SlurmCluster]:
    """A running SLURM of two nodes. Skips where SLURM cannot run; under CI that is a failure."""
    missing = missing_requirement()
    if missing and os.environ.get("CI"):
        pytest.fail(missing)
    if missing:
        pytest.skip(missing)
    # A pytest that is terminated would leave the daemons behind: end as for Ctrl-C, with the fixtures' clean-up.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    cluster = SlurmCluster()
    cluster.start()
    yield cluster
    cluster.stop()
    signal.signal(signal.SIGTERM, previous)


@pytest.fixture
def slurm(slurm_daemons: SlurmCluster) -> Iterator[SlurmCluster]:
    """Two idle SLURM nodes; whatever a test leaves on them is cancelled."""
    yield slurm_daemons
    slurm_daemons.cancel_all()
