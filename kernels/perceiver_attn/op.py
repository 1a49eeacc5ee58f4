"""The Resampler's attention as torch operators (`flamingo::perceiver_attn` and its backward) on the Triton kernels."""

import math
from typing import Any

import torch
from torch import Tensor

from kernels.config import FILL_PROGRAMS, architecture, is_interpreted
from kernels.perceiver_attn import kernel
from kernels.perceiver_attn.tiles import MAX_HEAD, Tiles, backward_tiles, forward_tiles

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What the kernels compute on."""

SPLIT_FEATURES = 512
"""A share of the keys has at least this many features: below it, partial results cost more than they give."""


def unsupported(q_NRHK: Tensor) -> str | None:
    """Return why the kernels do not take queries [N, R, H, K] like these, None if they do."""
    if q_NRHK.dtype not in DTYPES:
        return f"the kernel computes on fp32, fp16 and bf16, not on {q_NRHK.dtype}"
    if q_NRHK.shape[3] > MAX_HEAD:
        return f"the kernel takes heads of up to {MAX_HEAD}, not of {q_NRHK.shape[3]}"
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
    features = k_feat_NJHK.shape[1]
    tiles = forward_tiles(r, k, q_NRHK.dtype, architecture(q_NRHK.device))
    query_tiles = -(-r // tiles.rows)
    splits = splits or choose_splits(n * h * query_tiles, features)
    inputs = _unit_stride(q_NRHK, k_feat_NJHK, v_feat_NJHK, k_lat_NRHK, v_lat_NRHK)
    out_NRHK = q_NRHK.new_empty(q_NRHK.shape)
    lse_NRH = q_NRHK.new_empty((n, r, h), dtype=torch.float32)
    target, target_lse = out_NRHK, lse_NRH
    if splits > 1:
        target = q_NRHK.new_empty((splits, n, r, h, k), dtype=torch.float32)
        target_lse = q_NRHK.new_empty((splits, n, r, h), dtype=torch.float32)
    kernel.forward_kernel[(n * h, query_tiles, splits)](
        *inputs,
        _mask_bytes(feature_mask_NJ, q_NRHK),
        target,
        target_lse,
        *(stride for x in inputs for stride in x.stride()[:3]),
        n * r * h,
        _scale(k) * math.log2(math.e),
        features,
        _blocks_a_split(features, tiles, splits),
        **_constants(q_NRHK, feature_mask_NJ, tiles),
    )
    if splits > 1:
        rows, block = n * r * h, 16
        kernel.combine_kernel[(-(-rows // block),)](
            target, target_lse, out_NRHK, lse_NRH, rows, splits,
            K=k, KPAD=_power_of_two(k), BLOCK=block, num_warps=4,
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
    features = k_feat_NJHK.shape[1]
    tiles = backward_tiles(r, k, q_NRHK.dtype, architecture(q_NRHK.device))
    query_tiles = -(-r // tiles.rows)
    splits = splits or choose_splits(n * h * query_tiles, features)
    inputs = _unit_stride(q_NRHK, k_feat_NJHK, v_feat_NJHK, k_lat_NRHK, v_lat_NRHK)
    dq = _partials(q_NRHK, q_NRHK.shape, splits)
    dkv = [_partials(q_NRHK, x.shape, query_tiles) for x in inputs[1:]]
    kernel.backward_kernel[(n * h, query_tiles, splits)](
        *inputs,
        _mask_bytes(feature_mask_NJ, q_NRHK),
        out_NRHK.contiguous(),
        dout_NRHK.contiguous(),
        lse_NRH,
        dq,
        *dkv,
        *(stride for x in inputs for stride in x.stride()[:3]),
        n * r * h,
        n * features * h,
        _scale(k) * math.log2(math.e),
        _scale(k),
        features,
        _blocks_a_split(features, tiles, splits),
        **_constants(q_NRHK, feature_mask_NJ, tiles),
    )
    dq_NRHK, dk_feat, dv_feat, dk_lat, dv_lat = (_sum_partials(x, q_NRHK.dtype) for x in (dq, *dkv))
    return dq_NRHK, dk_feat, dv_feat, dk_lat, dv_lat


def _constants(q_NRHK: Tensor, feature_mask_NJ: Tensor | None, tiles: Tiles) -> dict[str, Any]:
    """Return the compile-time arguments that both kernels take."""
    _, r, h, k = q_NRHK.shape
    k0, k1 = tiles.parts
    return {
        "H": h,
        "R": r,
        "K": k,
        "K0": k0,
        "K1": k1,
        "BLOCK_R": tiles.rows,
        "BLOCK_J": tiles.keys,
        "HAS_MASK": feature_mask_NJ is not None,
        # fp32 on tensor cores, three products for one: as exact as fp32 sums are, where "tf32" keeps 3 digits.
        "PREC": "tf32x3" if q_NRHK.dtype == torch.float32 else "ieee",
        "UPCAST": is_interpreted,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _unit_stride(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors ([.., K] each), copied where K is not contiguous."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _mask_bytes(feature_mask_NJ: Tensor | None, placeholder: Tensor) -> Tensor:
    """Return the mask as uint8 [N, J], or `placeholder` (any shape, never read) where there is none."""
    if feature_mask_NJ is None:
        return placeholder
    return feature_mask_NJ.contiguous().view(torch.uint8)


def _partials(like: Tensor, shape: torch.Size, parts: int) -> Tensor:
    """Return an empty [parts, *shape]: fp32 for several parts, the dtype of `like` (any shape) for one."""
    return like.new_empty((parts, *shape), dtype=torch.float32 if parts > 1 else like.dtype)


def _sum_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum of [parts, ...] over its first axis, [...], in `dtype`."""
    return partials[0] if partials.shape[0] == 1 else partials.sum(0).to(dtype)


def _blocks_a_split(features: int, tiles: Tiles, splits: int) -> int:
    """Return how many key blocks each share has."""
    return -(-features // (tiles.keys * splits))


def _scale(head_dim: int) -> float:
    """Return 1 / sqrt(head_dim)."""
    return float(head_dim**-0.5)


def _power_of_two(value: int) -> int:
    """Return the smallest power of two that is at least `value` and 16."""
    return max(16, 1 << (value - 1).bit_length())
