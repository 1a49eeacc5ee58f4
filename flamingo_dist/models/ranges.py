"""Names of a step's parts, which profilers show; they cost nothing while none is listening."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

Part = Literal["data", "vision encoder", "resampler", "gated blocks", "frozen LM", "loss", "optimizer"]
"""What a range can be. Backward and recomputation have no ranges of their own: they follow from the forward's."""
_NOTHING = nullcontext()


def part(name: Part) -> AbstractContextManager[object]:
    """Return a context whose body torch's profiler and NVTX tools show under `name`."""
    if torch._C._autograd._profiler_enabled():
        return torch.profiler.record_function(name)
    return _NOTHING
