"""Weights that a run starts from: whole files, of the run's own network, in a dtype that training reads."""

from pathlib import PurePosixPath

from flamingo_dist.models.exchange.folder import NetworkFolder
from flamingo_dist.models.flamingo import FlamingoConfig
from flamingo_dist.models.lm_config import LMConfig
from flamingo_dist.models.weights import open_lm_weights
from flamingo_dist.models.weights.layout import lm_layout
from flamingo_dist.models.weights.ranges import RangeFile
from flamingo_dist.models.weights.safetensors import SafetensorsSource
from flamingo_dist.planning.empty import empty_network
from flamingo_dist.planning.hardware import GIB
from jobs.console import first_line
from jobs.doctor.findings import Finding, fail, ok

ATTEMPTS = 2
"""Times that a read is tried: a run is patient with a busy storage, the doctor is not."""
NOTHING = slice(0, 0)
"""Rows of a tensor that are read to have its dtype looked at, and no byte of it."""
_GGUF = b"GGUF"
"""What such a file begins with."""
_ONE_FILE = (".gguf", ".npz", ".pth", ".pt", ".bin")
"""Endings of weights that are one file, but for `.safetensors`."""


def check_all_weights(model: FlamingoConfig) -> list[Finding]:
    """Check all the weights that a network names."""
    found = []
    if model.weights:
        found.append(check_network(model))
    if model.lm.weights:
        found.append(check_lm_weights(model.lm))
    for what, path in (
        ("vision weights", model.vision.weights),
        ("vision statistics", model.vision.statistics),
    ):
        if path:
            found.append(check_weights(what, path))
    return found


def check_network(model: FlamingoConfig) -> Finding:
    """Check that the folder `model.weights` holds the parameters of this network, as training does."""
    check, folder = "network weights", model.weights or ""
    try:
        says = _found_whole(folder)
        network = NetworkFolder(folder, tp_rank=0, tp_size=1)
        network.check(empty_network(model), model)
        for name in network.tensors.shapes():
            network.tensors.read(name, NOTHING)
    except Exception as error:  # of storages, and of whatever a damaged folder makes stumble
        remedy = "set --model.weights to a folder that flamingo export or import wrote of this network"
        return fail(check, f"{folder}: {first_line(error)}", remedy)
    return ok(check, f"{folder}: {says}")


def check_lm_weights(lm: LMConfig) -> Finding:
    """Check that `lm.weights` are whole and of this language model, as training does; no value is read."""
    check, path = "LM weights", lm.weights or ""
    whole = check_weights(check, path)
    if whole.level != "ok":
        return whole
    try:
        source = open_lm_weights(lm)
        if not path.endswith(".gguf"):  # which is dequantised whole, whatever is asked for
            for name in lm_layout(lm).stored:
                source.read(name, NOTHING)
    except Exception as error:  # file systems raise errors of libraries that need not be installed
        remedy = "set --model.lm.weights to weights of this language model, or take the recipe that is theirs"
        return fail(check, f"{path}: {first_line(error)}", remedy)
    return whole


def check_weights(what: str, path: str) -> Finding:
    """Check that weights can be read and are whole, by their headers alone.

    Args:
        what: name for the finding.
        path: a file, or a folder of `.safetensors` files, on any fsspec file system.
    """
    remedy = "download them anew, or correct the path"
    try:
        says = _found_whole(path)
    except Exception as error:  # file systems raise errors of libraries that need not be installed
        return fail(what, f"{path}: {first_line(error)}", remedy)
    return ok(what, f"{path}: {says}")


def _found_whole(path: str) -> str:
    """Return how many files of weights there are and how large, without reading them.

    Raises:
        ValueError: a file is cut off, or not what its name says.
        OSError: it cannot be read.
    """
    if PurePosixPath(path).suffix in _ONE_FILE:
        file = RangeFile(path, attempts=ATTEMPTS)
        files, size = 1, file.size()
        if size == 0:
            raise ValueError(f"{path} is empty")
        head = bytearray(min(size, len(_GGUF)))
        file.read_into(memoryview(head), 0)
        if path.endswith(".gguf") and head != _GGUF:
            raise ValueError(f"{path} is no GGUF file: it begins with {bytes(head)!r}")
    else:
        source = SafetensorsSource(path, attempts=ATTEMPTS)
        files, size = len(source.files), source.check_whole()
    return f"{files} files, {size / GIB:.2f} GiB"
