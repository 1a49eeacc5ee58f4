"""Chooses the implementation of each attention function."""

from typing import Literal, get_args

from torch import Tensor

from kernels.choice import dtype_obstacle, use_triton
from kernels.config import have_triton
from kernels.gated_xattn import reference as gated_xattn_reference
from kernels.perceiver_attn import reference as perceiver_attn_reference
from kernels.perceiver_attn.tiles import MAX_HEAD

if have_triton:
    from kernels.perceiver_attn.op import perceiver_attn_op

Implementation = Literal["auto", "reference", "triton"]
"""`reference` is plain PyTorch on any device; `triton` the kernel, on CUDA or under Triton's interpreter; `auto` the
kernel on CUDA where it takes the arguments, the reference elsewhere."""


def check_implementation(implementation: str) -> None:
    """Raise `ValueError` unless `implementation` names one."""
    if implementation not in get_args(Implementation):
        known = ", ".join(get_args(Implementation))
        raise ValueError(f"implementation={implementation!r} is not known; choose one of {known}.")


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

    Returns:
        [B, T, H, K] in the queries' dtype.
    """
    check_implementation(implementation)
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
    check_implementation(implementation)
    inputs = (q_NRHK, k_feat_NJHK, v_feat_NJHK, k_lat_NRHK, v_lat_NRHK, feature_mask_NJ)
    perceiver_attn_reference.check_shapes(*inputs)
    obstacle = dtype_obstacle(q_NRHK)
    if q_NRHK.shape[3] > MAX_HEAD:
        obstacle = f"the kernel takes heads of up to {MAX_HEAD}, not of {q_NRHK.shape[3]}"
    if use_triton(implementation, q_NRHK, obstacle):
        out_NRHK, _ = perceiver_attn_op(*inputs, 0)
        return out_NRHK
    return perceiver_attn_reference.perceiver_attn(*inputs)
