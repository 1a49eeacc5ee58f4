import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
if os.environ.get("KMODE") == "interpret":  # tests/kernels/conftest.py; before anything imports Triton
    os.environ["TRITON_INTERPRET"] = "1"

from tests.ranks import RankPool


@pytest.fixture(scope="session")
def ranks() -> RankPool:
    """Runs functions as the ranks of a world of real processes."""
    return RankPool()
