"""Results: one row for each contender, shape and mode; CSV and JSON."""

import csv
import json
import math
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

Status = Literal["timed", "refused", "left out"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the results. What was not measured is None."""

    level: str
    """`core`, `layer` or `step`."""
    op: str
    """Operation, or the layer or network around it."""
    shape: str
    """Name of the shape."""
    sizes: str
    """Its numbers, as `name=value` pairs."""
    contender: str
    ours: bool
    """Whether kernels of this project take part."""
    mode: str
    """`fwd`, `bwd`, `fwd+bwd` or `step`."""
    dtype: str
    status: Status
    """`refused`: its numbers are wrong or its tests are red, so it gets no speed. `left out`: it cannot run."""
    reason: str = ""
    """Why there is no speed."""
    median_ms: float | None = None
    q20_ms: float | None = None
    q80_ms: float | None = None
    repeats: int | None = None
    clock: str = ""
    """`events`, `graph` or `clock`."""
    gb_per_s: float | None = None
    """Least bytes of the operation by the time it took, 1e9 bytes/s."""
    copy_share: float | None = None
    """That rate as a share of a copy's in the same run."""
    tflop_per_s: float | None = None
    """Needed FLOPs by the time, 1e12/s."""
    tokens_per_s: float | None = None
    """For a step."""
    useful_mfu: float | None = None
    """For a step: needed FLOPs by the time, as a share of a large matrix product's rate in the same run."""
    peak_mb: float | None = None
    """Memory above the inputs at the peak of forward and backward, 1e6 bytes."""
    saved_mb: float | None = None
    """What is kept for the backward beyond the inputs, 1e6 bytes."""
    worst_error: float | None = None
    """Largest error of outputs and gradients against fp64."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Results:
    """A run: where it ran, and its rows."""

    environment: dict[str, Any]
    rows: list[Row]

    @property
    def measured(self) -> bool:
        """Whether it ran on a GPU, so that its times mean something."""
        return bool(self.environment.get("gpu"))


def environment(device: torch.device, **extra: Any) -> dict[str, Any]:
    """Return what the figures depend on: GPU, versions, commit, and what is passed beside."""
    try:
        import triton

        triton_version: str | None = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "device": device.type,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton_version,
        "python": platform.python_version(),
        "commit": _commit(),
        **extra,
    }


def _commit() -> str | None:
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    dirty = git("status", "--porcelain", "--untracked-files=no") if head else None
    return f"{head}-dirty" if dirty else head


COLUMNS = [field.name for field in fields(Row)]
_OF_RUN = ("gpu", "torch", "triton", "commit")
"""Parts of the environment that every line of the CSV repeats, so that lines of several runs can be put together."""


def write_json(results: Results, path: Path) -> None:
    """Write a run as JSON; the folder is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {"environment": results.environment, "rows": [_plain(row) for row in results.rows]}
    path.write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write(results: Results, folder: Path, name: str) -> Path:
    """Write `name.csv` and `name.json` into `folder` and return the path of the first.

    Args:
        results: the run.
        folder: made if missing.
        name: of both files, without an ending.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / f"{name}.csv"
    constant = {key: results.environment.get(key) for key in _OF_RUN}
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *_OF_RUN])
        writer.writeheader()
        for row in results.rows:
            writer.writerow({**_plain(row), **constant})
    write_json(results, folder / f"{name}.json")
    return table


def read(paths: Sequence[Path]) -> Results:
    """Return the runs of JSON files as one; they must be of one GPU.

    Raises:
        ValueError: the files are of different GPUs, or one is no result.
    """
    runs = []
    for path in paths:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not {"environment", "rows"} <= set(data):
            raise ValueError(f"{path} is no result of `flamingo bench`: it lacks an environment or rows.")
        runs.append(Results(environment=data["environment"], rows=[Row(**row) for row in data["rows"]]))
    gpus = {str(run.environment.get("gpu")) for run in runs}
    if len(gpus) > 1:
        raise ValueError(f"results of {', '.join(sorted(gpus))} do not belong on one page; give one GPU's.")
    together: dict[str, Any] = {}
    for run in reversed(runs):
        together |= run.environment
    return Results(environment=together, rows=[row for run in runs for row in run.rows])


def _plain(row: Row) -> dict[str, Any]:
    """Return a row for writing: JSON has no infinities."""
    return {
        key: ("inf" if isinstance(value, float) and not math.isfinite(value) else value)
        for key, value in asdict(row).items()
    }
