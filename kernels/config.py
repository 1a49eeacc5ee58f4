"""What every Triton kernel here has to know before it is defined: whether there is Triton, and its mode.

The mode is decided once, when Triton is first imported: `TRITON_INTERPRET=1` has to be in the environment by
then (set later it half works, and fails with an unrelated message). Nothing here touches the GPU driver, so
everything may be imported on a machine without one.

There is no autotuning: tiles come from tables keyed on head width, dtype and architecture. A table makes the
same choice in every rank and every run, needs no launches to warm up, and can be compiled and inspected without
a GPU (`kernels.testing.dry`).
"""

import torch
from torch import Tensor

try:
    import triton

    have_triton = True
    """Whether Triton is installed; without it (macOS, Windows) everything runs on the references."""
    is_interpreted = bool(triton.knobs.runtime.interpret)
    """Whether kernels run under Triton's interpreter, on CPU tensors, in this process."""
except ImportError:
    have_triton = False
    is_interpreted = False

INTERPRETER_ARCH = 0
"""What `architecture` says under the interpreter: tables may give it small tiles."""

FILL_PROGRAMS = 264
"""Programs that fill the largest machine we tune for: two on each of an H100's 132 processors."""


def architecture(device: torch.device) -> int:
    """Return the compute capability that kernels on `device` are compiled for, as 10 * major + minor.

    Under the interpreter it is `INTERPRETER_ARCH`; under the dry device, the architecture that it stands for.
    """
    if is_interpreted:
        return INTERPRETER_ARCH
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    return int(triton.runtime.driver.active.get_current_target().arch)


def can_launch(tensor: Tensor) -> bool:
    """Whether a Triton kernel can run on `tensor` (any shape): on CUDA, or on a CPU under the interpreter."""
    if not have_triton:
        return False
    if is_interpreted:
        return tensor.device.type == "cpu"
    return tensor.device.type == "cuda" and torch.version.hip is None
