"""What a run ran on: commit, versions of the packages that decide its numbers, kind of machine."""

import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from jobs.doctor.versions import installed
from jobs.report.read import write_json

PACKAGES = ("torch", "deepspeed", "megatron-core", "ray", "transformers", "webdataset")
"""Distributions whose version is recorded, beside Python's."""


def record_environment(run_dir: Path | str, *, recipe: str, extra: Mapping[str, Any] | None = None) -> Path:
    """Write `environment.json` into the run folder; to be called where and when the run starts.

    The report is often written elsewhere and later, so it reads what was recorded and never looks at its own
    machine.

    Args:
        run_dir: The run folder; made if missing.
        recipe: Name of the recipe.
        extra: More JSON values to keep beside, such as {"world_size": 4}.

    Returns:
        Path of the file.
    """
    versions = {"python": platform.python_version(), **dict.fromkeys(PACKAGES), **installed(PACKAGES)}
    path = Path(run_dir) / "environment.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        path,
        {
            "recipe": recipe,
            "commit": commit(),
            "versions": versions,
            "machine": machine(),
            **(extra or {}),
        },
    )
    return path


def commit() -> str | None:
    """Return the commit of the checkout that this code runs from, "-dirty" added where tracked files changed.

    Returns:
        The full hash, or None for an installed package: a repository that merely surrounds it is not its
        history.
    """
    root, own = Path(__file__).parents[2], "jobs/report/environment.py"
    if _git(root, "ls-files", "--error-unmatch", own) is None:
        return None
    head, changes = (
        _git(root, "rev-parse", "HEAD"),
        _git(root, "status", "--porcelain", "--untracked-files=no"),
    )
    return f"{head}-dirty" if head and changes else head


def machine() -> str:
    """Describe the machine in words: accelerators, cores and memory; no names."""
    # The cores that this process may use: SLURM often gives a part of the machine.
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    host = f"{cores} CPU cores, {memory:.0f} GiB memory"
    if not torch.cuda.is_available():
        return f"{host}, no GPU"
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, {host}"


def _git(root: Path, *arguments: str) -> str | None:
    """Output of a git command, None where git or the repository is missing."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
