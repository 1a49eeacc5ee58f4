import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from tests.ranks import RankPool


@pytest.fixture(scope="session")
def ranks() -> RankPool:
    """Runs functions as the ranks of a world of real processes."""
    return RankPool()
