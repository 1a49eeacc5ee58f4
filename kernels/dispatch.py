"""Chooses the implementation of each attention function."""

from typing import Literal, get_args

from torch import Tensor

from kernels.config import LAUNCH_NEEDS, can_launch, have_triton, in_forward_mode
from kernels.gated_xattn import reference as gated_xattn_reference
from kernels.perceiver_attn import reference as perceiver_attn_reference

if have_triton:
    from kernels.gated_xattn import op as gated_xattn_op
    from kernels.perceiver_attn import op as perceiver_attn_op

Implementation = Literal["auto", "reference", "triton"]
"""`reference` is plain PyTorch on any device; `triton` the kernels, or an error where they cannot run; `auto` is
`triton` on CUDA tensors of shapes and dtypes that the kernel takes, and `reference` elsewhere."""


def check_implementation(implementation: str) -> None:
    """Raise `ValueError` unless `implementation` names one."""
    if implementation not in get_args(Implementation):
        known = ", ".join(get_args(Implementation))
        raise ValueError(f"implementation={implementation!r} is not known; choose one of {known}.")


def launches(implementation: Implementation, what: str, tensor: Tensor, reason: str | None) -> bool:
    """Whether to run the Triton kernel.

    Args:
        implementation: what the caller asked for.
        what: name of the function, for the error.
        tensor: any input of it, of any shape, for the device.
        reason: why the kernel cannot take the inputs, None if it can.

    Raises:
        ValueError: an unknown implementation, or `triton` where it cannot run.
    """
    check_implementation(implementation)
    if implementation == "reference":
        return False
    if in_forward_mode():
        reason = "it has no forward-mode derivative"
    if implementation == "auto":
        return tensor.device.type == "cuda" and can_launch(tensor) and reason is None
    if not can_launch(tensor) and tensor.device.type != "meta":
        reason = f"the tensors are on {tensor.device}; {LAUNCH_NEEDS}"
    if not have_triton:
        reason = "triton is not installed"
    if reason is not None:
        raise ValueError(f"{what}: implementation='triton' cannot run: {reason}. Choose 'auto'.")
    return True


def mixed(*tensors: Tensor) -> str | None:
    """Return that tensors of any shapes differ in dtype or device, None if they do not."""
    found = {f"{x.dtype} on {x.device}" for x in tensors}
    return None if len(found) == 1 else f"its tensors must share dtype and device, given {sorted(found)}"


def gated_xattn(
    q_BTHK: Tensor,
    k_BMRHK: Tensor,
    v_BMRHK: Tensor,
    media_index_BT: Tensor,
    gate: Tensor | None,
    *,
    attend_all: bool = False,
    implementation: Implementation = "auto",
) -> Tensor:
    """Image-causal cross-attention times a gate; `kernels.gated_xattn.reference` has the contract.

    The Triton kernel asks for more: in each sample the rows of a medium are contiguous, and media come in ascending
    order (rows with index 0 may lie between two media, not inside one's rows). That is checked on a CPU alone.
    `attend_all` always runs on the reference.

    Returns:
        [B, T, H, K] in the queries' dtype.

    Raises:
        ValueError: inputs that do not fit, or an implementation that cannot run.
    """
    if attend_all:
        check_implementation(implementation)
        implementation = "reference"
    reason = None
    if implementation != "reference" and have_triton and q_BTHK.dim() == 4 and k_BMRHK.dim() == 5:
        images, latents = k_BMRHK.shape[0] * k_BMRHK.shape[1], k_BMRHK.shape[2]
        reason = mixed(q_BTHK, k_BMRHK, v_BMRHK) or gated_xattn_op.unsupported(q_BTHK, images, latents)
    if launches(implementation, "gated_xattn", q_BTHK, reason):
        gate = (
            gate if gate is None else gate.to(q_BTHK.dtype)
        )  # under autocast a parameter's dtype, not the queries'
        return gated_xattn_op.gated_xattn_batched(q_BTHK, k_BMRHK, v_BMRHK, media_index_BT, gate)
    return gated_xattn_reference.gated_xattn(
        q_BTHK, k_BMRHK, v_BMRHK, media_index_BT, gate, attend_all=attend_all
    )


def perceiver_attn(
    q_NRHK: Tensor,
    k_feat_NJHK: Tensor,
    v_feat_NJHK: Tensor,
    k_lat_NRHK: Tensor,
    v_lat_NRHK: Tensor,
    feature_mask_NJ: Tensor | None = None,
    *,
    implementation: Implementation = "auto",
) -> Tensor:
    """Attention over features and latents; `kernels.perceiver_attn.reference` has the contract.

    Returns:
        [N, R, H, K] in the queries' dtype.
    """
    inputs = (q_NRHK, k_feat_NJHK, v_feat_NJHK, k_lat_NRHK, v_lat_NRHK, feature_mask_NJ)
    perceiver_attn_reference.check_shapes(*inputs)
    reason = mixed(*inputs[:5]) or perceiver_attn_op.unsupported(*inputs[:3]) if have_triton else None
    if launches(implementation, "perceiver_attn", q_NRHK, reason):
        return perceiver_attn_op.perceiver_attn_op(*inputs, 0)[0]
    return perceiver_attn_reference.perceiver_attn(*inputs)
