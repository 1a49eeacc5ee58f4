"""What the frozen weights of a run hold, told by a few of their bytes, so that a resume finds out others."""

import hashlib

from flamingo_dist.models.weights.ranges import RangeFile, join_url, list_names
from jobs.config import RunConfig

PROBE_BYTES = 1 << 16
"""Bytes that are looked at in the middle of each file: headers are alike in all models of one shape."""
ENDINGS = (".safetensors", ".gguf", ".npz", ".pt", ".bin", ".json")
RANDOM = "random"


def frozen_contents(config: RunConfig) -> dict[str, str]:
    """Return a short hash of each of the run's published weights by setting, "random" where there are none.

    Of a folder, names, sizes and some bytes of the files count, not its place: weights may move.

    Raises:
        FileNotFoundError: weights are not there.
        OSError: the storage fails.
    """
    model = config.model
    places = {
        "model.weights": model.weights,
        "model.lm.weights": model.lm.weights,
        "model.vision.weights": model.vision.weights,
        "model.vision.statistics": model.vision.statistics,
    }
    return {setting: _contents(place) if place else RANDOM for setting, place in places.items()}


def _contents(place: str) -> str:
    """Return a short hash of the file or folder at `place`, any fsspec URL."""
    if place.endswith(ENDINGS):
        names = [""]
    else:
        names = sorted({name for ending in ENDINGS[:-1] for name in list_names(place, ending)})
        # A storage that cannot list: the index, or the one file, says as much.
        listed = ("model.safetensors.index.json", "model.safetensors")
        names = names or [name for name in listed if RangeFile(join_url(place, name)).exists()]
    found = hashlib.sha256()
    for name in names:
        file = RangeFile(join_url(place, name) if name else place)
        size = file.size()
        probe = bytearray(min(PROBE_BYTES, size))
        file.read_into(memoryview(probe), (size - len(probe)) // 2)
        found.update(f"{name} {size} ".encode() + probe)
    return found.hexdigest()[:16]
