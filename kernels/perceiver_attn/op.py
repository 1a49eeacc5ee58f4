"""The Resampler's attention as torch operators (`flamingo::perceiver_attn` and its backward) on the Triton kernels."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.config import DTYPES, FILL_PROGRAMS, architecture, is_interpreted, power_of_two
from kernels.perceiver_attn import kernel
from kernels.perceiver_attn.tiles import MAX_HEAD, Tiles, backward_tiles, forward_tiles

SPLIT_FEATURES = 512
"""A share of the keys has at least this many features: below it, partial results cost more than they give."""


FAR = 2**31
"""Elements of a feature's rows that a place in 32 bits reaches."""


def unsupported(q_NRHK: Tensor, k_feat_NJHK: Tensor, v_feat_NJHK: Tensor) -> str | None:
    """Return why the kernels do not take queries [N, R, H, K] and features [N, J, H, K] like these, None if they do."""
    if q_NRHK.dtype not in DTYPES:
        return f"the kernel computes on fp32, fp16 and bf16, not on {q_NRHK.dtype}"
    if not 1 <= q_NRHK.shape[3] <= MAX_HEAD:
        return f"the kernel takes heads of 1 to {MAX_HEAD}, not of {q_NRHK.shape[3]}"
    elements = k_feat_NJHK.shape[1:].numel()
    if elements >= FAR:
        return f"keys of one medium must have fewer than 2**31 elements, not {elements}"
    return None


def choose_splits(programs: int, features: int) -> int:
    """Return into how many shares the keys are split so that `programs` fill the machine.

    A function of shapes alone: which split a run takes decides the order of its sums.

    Args:
        programs: media * heads * query tiles.
        features: J.
    """
    return max(1, min(FILL_PROGRAMS // max(programs, 1), features // SPLIT_FEATURES))


@torch.library.custom_op("flamingo::perceiver_attn", mutates_args=())
def perceiver_attn_op(
    q_NRHK: Tensor,
    k_feat_NJHK: Tensor,
    v_feat_NJHK: Tensor,
    k_lat_NRHK: Tensor,
    v_lat_NRHK: Tensor,
    feature_mask_NJ: Tensor | None,
    splits: int,
) -> tuple[Tensor, Tensor]:
    """Latents attend to features and latents; any strides.

    Args:
        q_NRHK: [N, R, H, K] fp32, fp16 or bf16.
        k_feat_NJHK: [N, J, H, K], dtype of the queries.
        v_feat_NJHK: [N, J, H, K], dtype of the queries.
        k_lat_NRHK: [N, R, H, K], dtype of the queries.
        v_lat_NRHK: [N, R, H, K], dtype of the queries.
        feature_mask_NJ: bool [N, J], False for padding; None if all are real.
        splits: shares that the features are split into; 0 chooses by the shapes.

    Returns:
        The result [N, R, H, K] contiguous, and fp32 [N, R, H]: log2 of the sum of exponentials of every row.
    """
    return launch_forward(q_NRHK, k_feat_NJHK, v_feat_NJHK, k_lat_NRHK, v_lat_NRHK, feature_mask_NJ, splits)


@perceiver_attn_op.register_fake
def _(
    q_NRHK: Tensor,
    k_feat_NJHK: Tensor,
    v_feat_NJHK: Tensor,
    k_lat_NRHK: Tensor,
    v_lat_NRHK: Tensor,
    feature_mask_NJ: Tensor | None,
    splits: int,
) -> tuple[Tensor, Tensor]:
    return q_NRHK.new_empty(q_NRHK.shape), q_NRHK.new_empty(q_NRHK.shape[:3], dtype=torch.float32)


@torch.library.custom_op("flamingo::perceiver_attn_backward", mutates_args=())
def perceiver_attn_backward_op(
    dout_NRHK: Tensor,
    q_NRHK: Tensor,
    k_feat_NJHK: Tensor,
    v_feat_NJHK: Tensor,
    k_lat_NRHK: Tensor,
    v_lat_NRHK: Tensor,
    feature_mask_NJ: Tensor | None,
    out_NRHK: Tensor,
    lse_NRH: Tensor,
    splits: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `flamingo::perceiver_attn`.

    Args:
        dout_NRHK: [N, R, H, K] gradient of the result.
        q_NRHK: [N, R, H, K].
        k_feat_NJHK: [N, J, H, K].
        v_feat_NJHK: [N, J, H, K].
        k_lat_NRHK: [N, R, H, K].
        v_lat_NRHK: [N, R, H, K].
        feature_mask_NJ: bool [N, J] or None.
        out_NRHK: [N, R, H, K] the forward's first result.
        lse_NRH: fp32 [N, R, H] the forward's second result.
        splits: as in the forward.

    Returns:
        Gradients of the five tensors, contiguous, in their shapes and dtype.
    """
    inputs = (q_NRHK, k_feat_NJHK, v_feat_NJHK, k_lat_NRHK, v_lat_NRHK)
    return launch_backward(dout_NRHK, *inputs, feature_mask_NJ, out_NRHK, lse_NRH, splits)


@perceiver_attn_backward_op.register_fake
def _(
    dout_NRHK: Tensor,
    q_NRHK: Tensor,
    k_feat_NJHK: Tensor,
    v_feat_NJHK: Tensor,
    k_lat_NRHK: Tensor,
    v_lat_NRHK: Tensor,
    feature_mask_NJ: Tensor | None,
    out_NRHK: Tensor,
    lse_NRH: Tensor,
    splits: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    query, feature = q_NRHK.shape, k_feat_NJHK.shape
    new = q_NRHK.new_empty
    return new(query), new(feature), new(feature), new(query), new(query)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep what the backward reads: the inputs, the result and the rows' sums."""
    *tensors, ctx.splits = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dout_NRHK: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return a gradient for each input of `flamingo::perceiver_attn`."""
    grads = perceiver_attn_backward_op(dout_NRHK, *ctx.saved_tensors, ctx.splits)
    return *grads, None, None


perceiver_attn_op.register_autograd(_backward, setup_context=_setup_context)


def launch_forward(
    q_NRHK: Tensor,
    k_feat_NJHK: Tensor,
    v_feat_NJHK: Tensor,
    k_lat_NRHK: Tensor,
    v_lat_NRHK: Tensor,
    feature_mask_NJ: Tensor | None,
    splits: int,
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel, and the one that joins the shares if there are several.

    Args and results: as `perceiver_attn_op`, [N, R, H, K] and [N, R, H].
    """
    n, r, h, k = q_NRHK.shape
    tiles = forward_tiles(r, k, q_NRHK.dtype, architecture(q_NRHK.device))
    launch = _prepare(
        q_NRHK, k_feat_NJHK, v_feat_NJHK, k_lat_NRHK, v_lat_NRHK, feature_mask_NJ, tiles, splits
    )
    out_NRHK = q_NRHK.new_empty(q_NRHK.shape)
    lse_NRH = q_NRHK.new_empty((n, r, h), dtype=torch.float32)
    target, target_lse, splits = out_NRHK, lse_NRH, launch.grid[2]
    if splits > 1:
        target = q_NRHK.new_empty((splits, n, r, h, k), dtype=torch.float32)
        target_lse = q_NRHK.new_empty((splits, n, r, h), dtype=torch.float32)
    with torch.cuda.device_of(q_NRHK):
        kernel.forward_kernel[launch.grid](
            *launch.inputs, launch.mask, target, target_lse,
            *launch.strides, n * r * h, launch.scale_log2, *launch.keys, **launch.constants,
        )  # fmt: skip
        if splits > 1:
            rows, block = n * r * h, 16
            kernel.combine_kernel[(-(-rows // block),)](
                target, target_lse, out_NRHK, lse_NRH, rows, splits,
                K=k, KPAD=power_of_two(k), BLOCK=block, num_warps=4,
            )  # fmt: skip
    return out_NRHK, lse_NRH


def launch_backward(
    dout_NRHK: Tensor,
    q_NRHK: Tensor,
    k_feat_NJHK: Tensor,
    v_feat_NJHK: Tensor,
    k_lat_NRHK: Tensor,
    v_lat_NRHK: Tensor,
    feature_mask_NJ: Tensor | None,
    out_NRHK: Tensor,
    lse_NRH: Tensor,
    splits: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward kernel and add up partial results, if there are any, in a fixed order.

    Args and results: as `perceiver_attn_backward_op`: [N, R, H, K], twice [N, J, H, K], twice [N, R, H, K].
    """
    n, r, h, k = q_NRHK.shape
    tiles = backward_tiles(r, k, q_NRHK.dtype, architecture(q_NRHK.device))
    launch = _prepare(
        q_NRHK, k_feat_NJHK, v_feat_NJHK, k_lat_NRHK, v_lat_NRHK, feature_mask_NJ, tiles, splits
    )
    _, query_tiles, splits = launch.grid
    dq = _partials(q_NRHK, q_NRHK.shape, splits)
    dkv = [_partials(q_NRHK, x.shape, query_tiles) for x in launch.inputs[1:]]
    with torch.cuda.device_of(q_NRHK):
        kernel.backward_kernel[launch.grid](
            *launch.inputs, launch.mask, out_NRHK.contiguous(), dout_NRHK.contiguous(), lse_NRH, dq, *dkv,
            *launch.strides, n * r * h, n * k_feat_NJHK.shape[1] * h, launch.scale_log2, k**-0.5, *launch.keys,
            **launch.constants,
        )  # fmt: skip
    dq_NRHK, dk_feat, dv_feat, dk_lat, dv_lat = (_sum_partials(x, q_NRHK.dtype) for x in (dq, *dkv))
    return dq_NRHK, dk_feat, dv_feat, dk_lat, dv_lat


@dataclass(frozen=True, kw_only=True)
class _Launch:
    """What forward and backward launch alike."""

    grid: tuple[int, int, int]
    """Media times heads, tiles of queries, shares of the keys."""
    inputs: list[Tensor]
    """Queries [N, R, H, K], features' keys and values [N, J, H, K], latents' ones [N, R, H, K]; K is contiguous."""
    mask: Tensor
    """uint8 [N, J], or any tensor, never read."""
    strides: list[int]
    """Of each input, but K's."""
    scale_log2: float
    """log2(e) / sqrt(K)."""
    keys: tuple[int, int]
    """J, and key blocks of a share."""
    constants: dict[str, Any]
    """Compile-time arguments."""


def _prepare(
    q_NRHK: Tensor,
    k_feat_NJHK: Tensor,
    v_feat_NJHK: Tensor,
    k_lat_NRHK: Tensor,
    v_lat_NRHK: Tensor,
    feature_mask_NJ: Tensor | None,
    tiles: Tiles,
    splits: int,
) -> _Launch:
    """Return the arguments that both kernels take; shapes as `perceiver_attn_op`, 0 splits chooses."""
    (n, r, h, k), features = q_NRHK.shape, k_feat_NJHK.shape[1]
    query_tiles = -(-r // tiles.rows)
    splits = splits or choose_splits(n * h * query_tiles, features)
    inputs = [
        x if x.stride(-1) == 1 and x.shape[1] * x.stride(1) < FAR else x.contiguous()
        for x in (q_NRHK, k_feat_NJHK, v_feat_NJHK, k_lat_NRHK, v_lat_NRHK)
    ]
    return _Launch(
        grid=(n * h, query_tiles, splits),
        inputs=inputs,
        mask=q_NRHK if feature_mask_NJ is None else feature_mask_NJ.contiguous().view(torch.uint8),
        strides=[stride for x in inputs for stride in x.stride()[:3]],
        scale_log2=k**-0.5 * math.log2(math.e),
        keys=(features, -(-features // (tiles.keys * splits))),
        constants={
            "H": h,
            "R": r,
            "K": k,
            "K0": tiles.parts[0],
            "K1": tiles.parts[1],
            "BLOCK_R": tiles.rows,
            "BLOCK_J": tiles.keys,
            "HAS_MASK": feature_mask_NJ is not None,
            # fp32 on tensor cores, three products for one: as exact as fp32 sums are, where "tf32" keeps 3 digits.
            "PREC": "tf32x3" if q_NRHK.dtype == torch.float32 else "ieee",
            "UPCAST": is_interpreted,
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
        },
    )


def _partials(like: Tensor, shape: torch.Size, parts: int) -> Tensor:
    """Return an empty [parts, *shape]: fp32 for several parts, the dtype of `like` (any shape) for one."""
    return like.new_empty((parts, *shape), dtype=torch.float32 if parts > 1 else like.dtype)


def _sum_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum of [parts, ...] over its first axis, [...], in `dtype`."""
    return partials[0] if partials.shape[0] == 1 else partials.sum(0).to(dtype)
