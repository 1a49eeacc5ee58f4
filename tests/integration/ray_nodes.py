"""What runs on a Ray node, seen from outside: its raylet is known by the node's temporary folder."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path


def processes() -> list[tuple[int, int, str]]:
    """Return id, parent's id and command line of every process."""
    command = ["ps", "-ww", "-eo", "pid=,ppid=,args="]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [line.split(maxsplit=2) for line in lines]
    return [(int(row[0]), int(row[1]), row[2]) for row in rows if len(row) == 3]


def below(folder: Path) -> list[tuple[int, str]]:
    """Return id and command line of the processes that speak of a temporary folder or a folder in it."""
    return [(pid, line) for pid, _, line in processes() if f"{folder}/" in line]


def raylets(folder: Path) -> list[int]:
    """Return the ids of the raylets of a temporary folder."""
    return [pid for pid, line in below(folder) if "/raylet/raylet " in line]


def trainers(folder: Path) -> int:
    """Return how many training processes of Ray Train the node of a temporary folder runs now."""
    parents = set(raylets(folder))
    return sum(ppid in parents and "ray::RayTrainWorker" in line for _, ppid, line in processes())


def wait_for_trainers(
    folders: list[Path], seconds: float, *, expected: int, running: Callable[[], bool]
) -> list[int]:
    """Wait until the nodes together run the expected number of training processes; return each one's.

    Gives up when the run is no longer `running`.
    """
    deadline = time.monotonic() + seconds
    counts = [0] * len(folders)
    while sum(counts) < expected and time.monotonic() < deadline and running():
        counts = [trainers(folder) for folder in folders]
        time.sleep(0.3)
    return counts
