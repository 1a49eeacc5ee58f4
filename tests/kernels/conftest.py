"""Kernel tests run in one of four modes, each in a process of its own, chosen by the environment's KMODE.

reference   the default: what needs no Triton at all
interpret   Triton's interpreter on CPU tensors: numerics
dry         kernels are compiled for GPUs that are not there (`kernels.testing.dry`): figures of the binaries
cuda        a real GPU: numerics, natively

`pytestmark = pytest.mark.modes("interpret", "cuda")` says in which modes a test runs; without the mark it runs in
reference mode. Tests of other modes are deselected, not skipped: they run in their own phase. Files that import
Triton are called test_triton_*.py, so that they can be left alone where it does not exist.
"""

import importlib.util
import os

import pytest

ALL_MODES = ("reference", "interpret", "dry", "cuda")
MODE = os.environ.get("KMODE", "reference")
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_triton_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    if MODE not in ALL_MODES:
        raise pytest.UsageError(f"KMODE={MODE!r} is not known; choose one of {', '.join(ALL_MODES)}.")
    asked = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if asked != (MODE == "interpret"):  # tests/conftest.py sets it for the interpreter
        raise pytest.UsageError(
            f"KMODE={MODE} but TRITON_INTERPRET={'1' if asked else '0'}; set KMODE alone."
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = os.path.dirname(__file__)
    kept, dropped = [], []
    _check_machine()
    for item in items:
        mark = item.get_closest_marker("modes")
        wanted = mark.args if mark else ("reference",)
        unknown = set(wanted) - set(ALL_MODES)
        if unknown:
            raise pytest.UsageError(f"{item.nodeid}: modes {sorted(unknown)} are not known.")
        if not str(item.path).startswith(here) or MODE in wanted:
            kept.append(item)
        else:
            dropped.append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


def _check_machine() -> None:
    """Fail where this mode cannot run: without a GPU, or (under CI alone) without Triton."""
    if MODE != "reference" and importlib.util.find_spec("triton") is None:
        message = f"KMODE={MODE}: triton is not installed (it exists for Linux alone), nothing can run."
        if os.environ.get("CI") == "true":
            raise pytest.UsageError(message)
        print(message)
    if MODE == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError("KMODE=cuda needs a CUDA device and a torch built for it.")


@pytest.fixture(scope="session")
def device() -> str:
    """Where this mode's tensors are."""
    return "cuda" if MODE == "cuda" else "cpu"
