"""What takes part in a comparison."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jobs.bench.cases import Case
from kernels.config import can_launch

Function = Callable[..., tuple[Tensor, ...]]
"""From the inputs of a case to the outputs."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """A contender made ready for one case."""

    call: Function
    """What is timed. What it needs beyond the inputs (a mask, an index) was made before, unless its name says so."""
    note: str = ""
    """What belongs beside its figures, such as the backend that was chosen."""
    forward_only: str = ""
    """Why it has no backward here, if it has none."""


class LeftOutError(Exception):
    """A contender cannot run this case; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to compute an operation."""

    name: str
    build: Callable[[Case], Built]
    """Makes it ready, or raises `LeftOutError`."""
    ours: bool = False
    """Whether it is a kernel of this project."""
    compiled: bool = False
    """Whether torch.compile takes part: tens of seconds of preparation for each shape."""


def check_launch(case: Case) -> None:
    """Raise `LeftOutError` where Triton kernels cannot run on the tensors of `case`."""
    if not can_launch(case.inputs[0]):
        raise LeftOutError("Triton kernels need CUDA, or a CPU with TRITON_INTERPRET=1 set before the start")


def compile_(
    function: Callable[..., Any], device: torch.device, *, tuned: bool = False
) -> Callable[..., Any]:
    """Return `function` under torch.compile, for static shapes; on a CPU only traced, for want of time.

    With `tuned` Inductor times its choices of tiles and takes the best.

    Donated buffers are turned off: they forbid running a backward pass twice, as timing does.
    """
    import torch._functorch.config as functorch

    functorch.donated_buffer = False
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    options: dict[str, Any] | None = {"max_autotune": True} if tuned and backend == "inductor" else None
    compiled: Callable[..., Any] = torch.compile(function, dynamic=False, backend=backend, options=options)
    return compiled


def sdpa_backend(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, mask: Tensor | None = None) -> str:
    """Return which backend torch's attention chooses.

    Args:
        q_BHTK: [B, H, T, K] queries.
        k_BHSK: [B, H, S, K] keys.
        v_BHSK: [B, H, S, K] values.
        mask: bool, broadcast to [B, H, T, S], or None.
    """
    try:
        from torch.nn.attention import SDPBackend

        chosen = SDPBackend(torch._fused_sdp_choice(q_BHTK, k_BHSK, v_BHSK, attn_mask=mask))
        return f"SDPA backend {chosen.name.lower()}"
    except (AttributeError, ImportError, RuntimeError, TypeError, ValueError) as error:
        return f"SDPA backend not told ({type(error).__name__})"
