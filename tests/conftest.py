import os

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# By default Ray runs its workers at nice 15: beside tests that fill the cores they would wait for minutes.
os.environ.setdefault("RAY_worker_niceness", "0")
if os.environ.get("KMODE") == "interpret":  # tests/kernels/conftest.py; before anything imports Triton
    os.environ["TRITON_INTERPRET"] = "1"

from tests.ranks import RankPool

# The same examples every time: what fails, fails for everyone. HYPOTHESIS_PROFILE=search looks for new ones.
settings.register_profile("fixed", derandomize=True, database=None)
settings.register_profile("search", print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@pytest.fixture(scope="session")
def ranks() -> RankPool:
    """Runs functions as the ranks of a world of real processes."""
    return RankPool()
