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
from torch.autograd import forward_ad

try:
    import triton

    have_triton = True
    """Whether Triton is installed; without it (macOS, Windows) everything runs on the references."""
    is_interpreted = bool(triton.knobs.runtime.interpret)
    """Whether kernels run under Triton's interpreter, on CPU tensors, in this process."""
except ImportError:
    have_triton = False
    is_interpreted = False

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What the kernels compute on."""

LAUNCH_NEEDS = "it needs CUDA, or a CPU with TRITON_INTERPRET=1 set before the process starts"
"""What errors say where a kernel cannot be launched."""

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


def power_of_two(value: int) -> int:
    """Return the smallest power of two that is at least `value` and 16, the smallest side of a matrix product."""
    return max(16, 1 << (value - 1).bit_length())


def without_wgmma(arch: int) -> bool:
    """Whether `arch` has neither wgmma nor tcgen05, as sm_80 has not: sm_8x and sm_12x."""
    return arch // 10 in (8, 12)


def in_forward_mode() -> bool:
    """Whether forward-mode derivatives are asked for (`torch.func.jvp`, dual tensors), which our operators have not.

    They would come out as zeros without a word: torch takes a custom operator's missing rule for that.
    """
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def can_launch(tensor: Tensor) -> bool:
    """Whether a Triton kernel can run on `tensor` (any shape): on CUDA, or on a CPU under the interpreter."""
    if not have_triton:
        return False
    if is_interpreted:
        return tensor.device.type == "cpu"
    return tensor.device.type == "cuda" and torch.version.hip is None
