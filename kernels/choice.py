"""When a Triton kernel runs and when its reference does."""

from torch import Tensor

from kernels.config import can_launch


def use_triton(implementation: str, tensor: Tensor, obstacle: str | None) -> bool:
    """Return whether to run the Triton kernel.

    Args:
        implementation: "auto" takes it on CUDA where it can run, "triton" always, "reference" never.
        tensor: an argument of the function, any shape; the others are on its device.
        obstacle: why the kernel does not take these arguments, or None if it does.

    Raises:
        ValueError: implementation "triton" where the kernel cannot run.
    """
    if implementation == "reference":
        return False
    possible = obstacle is None and can_launch(tensor)
    if implementation == "auto":
        return possible and tensor.device.type == "cuda"
    if not possible:
        reason = obstacle or (
            f"Triton is not installed, or does not run on {tensor.device.type} tensors in this process"
        )
        raise ValueError(
            f"implementation='triton' cannot be used: {reason}. Choose 'auto', which falls back to the reference "
            "where the kernel cannot run, or 'reference'."
        )
    return True


def dtype_obstacle(*tensors: Tensor | None) -> str | None:
    """Return why the kernels do not take the dtypes of `tensors` (any shapes; None is skipped), or None."""
    taken = ("float32", "float16", "bfloat16")
    for tensor in tensors:
        if tensor is not None and str(tensor.dtype).removeprefix("torch.") not in taken:
            return f"the kernel computes on {', '.join(taken)}, not on {tensor.dtype}"
    return None
