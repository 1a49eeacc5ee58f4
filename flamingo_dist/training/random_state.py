"""The global random generators of a process: saved, restored, and derived anew for another layout.

Nothing that a step computes draws from them: the network has no dropout, and data, initial weights and augmentation
have generators of their own, seeded by names and positions. They are kept for what a user adds.
"""

import hashlib
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Return the states of Python's, numpy's and torch's global generators, as `torch.load` takes them safely."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(folder: Path, *, rank: int, step: int, same_layout: bool) -> None:
    """Set the global generators from the checkpoint in `folder`.

    Args:
        folder: the checkpoint's folder.
        rank: this process.
        step: the checkpoint's step.
        same_layout: whether the ranks stand for what they stood for at the save. If not, no saved state is this rank's:
            the generators are seeded by the step and the rank.
    """
    if same_layout:
        _set_random_state(torch.load(state_file(folder, rank), weights_only=True))
        return
    digest = hashlib.sha256(f"flamingo resume {step} {rank}".encode()).digest()
    seed = int.from_bytes(digest[:4], "little")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # every device's, too


def state_file(folder: Path, rank: int) -> Path:
    """Return where a rank's states are in a checkpoint."""
    return folder / f"rng-{rank:05d}.pt"


def _set_random_state(state: Mapping[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
