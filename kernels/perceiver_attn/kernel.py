"""Triton kernels of the Perceiver Resampler's attention: two key/value sources, one softmax.

Letters as in `kernels.perceiver_attn.reference`: N media, R latents, J features, H heads, K head width. A program
owns one head of one medium, one tile of its queries and one share ("split") of its keys. Share 0 starts with the
latents, which no mask touches: from then on the running maximum is a real score.

A head is cut into two parts of power-of-two width, K0 + K1 (96 = 64 + 32): padding 96 to 128 would cost a quarter
of the shared memory and of the tensor-core work. K1 = 0 stands for a single part.
"""

import triton
import triton.language as tl

from kernels.tiles import dot, load_parts, load_tile, store_tile

LOWEST = tl.constexpr(-1.0e30)
"""Running maximum before the first key; finite, so that no difference of maxima is ever NaN."""


@triton.jit
def _own_latents(split: tl.tensor, R: tl.constexpr) -> tl.tensor:
    """Return how many latents this share attends to: all in share 0, none in the others.

    The bound of a loop rather than `if split == 0` around it: inside such a branch ptxas 12.8 takes the
    register that holds the share for a zero, and mixes it up with the address in a wgmma descriptor (wrong results and
    illegal addresses on an H200; `Record.odd_descriptors` finds it in the binary).
    """
    return tl.where(split == 0, R, 0)


@triton.jit
def _scores(
    q0: tl.tensor,
    q1: tl.tensor,
    k0: tl.tensor,
    k1: tl.tensor,
    scale_log2: tl.tensor,
    seen_J: tl.tensor,
    K1: tl.constexpr,
    PREC: tl.constexpr,
    UPCAST: tl.constexpr,
) -> tl.tensor:
    """Return fp32 [R, J] scores in base 2; -inf where `seen_J` is False."""
    s = dot(q0, tl.trans(k0), PREC, UPCAST)
    if K1 > 0:
        s += dot(q1, tl.trans(k1), PREC, UPCAST)
    return tl.where(seen_J[None, :], s * scale_log2, float("-inf"))


@triton.jit
def _attend(
    q0: tl.tensor,
    q1: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    rows_J: tl.tensor,
    seen_J: tl.tensor,
    stride_k: tl.tensor,
    stride_v: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    acc0: tl.tensor,
    acc1: tl.tensor,
    scale_log2: tl.tensor,
    K: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    PREC: tl.constexpr,
    UPCAST: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Add one block of keys to the running softmax; returns its new (peak, total, acc0, acc1)."""
    k0 = load_tile(k_ptr, rows_J, seen_J, stride_k, 0, K, K0)
    v0 = load_tile(v_ptr, rows_J, seen_J, stride_v, 0, K, K0)
    k1 = k0
    if K1 > 0:
        k1 = load_tile(k_ptr, rows_J, seen_J, stride_k, K0, K, K1)
    s = _scores(q0, q1, k0, k1, scale_log2, seen_J, K1, PREC, UPCAST)
    new_peak = tl.maximum(peak, tl.max(s, 1))
    p = tl.exp2(s - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(p, 1)
    acc0 = acc0 * shrink[:, None] + dot(p.to(v0.dtype), v0, PREC, UPCAST)
    if K1 > 0:
        v1 = load_tile(v_ptr, rows_J, seen_J, stride_v, K0, K, K1)
        acc1 = acc1 * shrink[:, None] + dot(p.to(v1.dtype), v1, PREC, UPCAST)
    return new_peak, total, acc0, acc1


@triton.jit
def forward_kernel(
    q_ptr: tl.tensor,
    kf_ptr: tl.tensor,
    vf_ptr: tl.tensor,
    kl_ptr: tl.tensor,
    vl_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    sq_n: tl.tensor,
    sq_r: tl.tensor,
    sq_h: tl.tensor,
    skf_n: tl.tensor,
    skf_j: tl.tensor,
    skf_h: tl.tensor,
    svf_n: tl.tensor,
    svf_j: tl.tensor,
    svf_h: tl.tensor,
    skl_n: tl.tensor,
    skl_r: tl.tensor,
    skl_h: tl.tensor,
    svl_n: tl.tensor,
    svl_r: tl.tensor,
    svl_h: tl.tensor,
    split_rows: tl.tensor,
    scale_log2: tl.tensor,
    J: tl.tensor,
    blocks_a_split: tl.tensor,
    H: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_J: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PREC: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """One query tile over one share of the keys. Grid (N * H, query tiles, splits).

    Pointers (strides s*_n, s*_r or s*_j, s*_h in elements; K contiguous):
        q_ptr: [N, R, H, K].
        kf_ptr, vf_ptr: [N, J, H, K] features' keys and values.
        kl_ptr, vl_ptr: [N, R, H, K] latents' keys and values.
        mask_ptr: uint8 [N, J], contiguous, 0 where a feature is padding; unused without HAS_MASK.
        out_ptr: [splits, N, R, H, K] contiguous: the share's own softmax; fp32 where there are several shares.
        lse_ptr: fp32 [splits, N, R, H] contiguous: log2 of the share's sum of exponentials.
    Scalars: split_rows = N * R * H; scale_log2 = log2(e) / sqrt(K).
    """
    nh = tl.program_id(0)
    split = tl.program_id(2)
    n = (nh // H).to(tl.int64)
    h = nh % H
    kf_ptr += n * skf_n + h * skf_h
    vf_ptr += n * svf_n + h * svf_h
    kl_ptr += n * skl_n + h * skl_h
    vl_ptr += n * svl_n + h * svl_h
    rows_R = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    real_R = rows_R < R
    q_ptr += n * sq_n + h * sq_h
    q0 = load_tile(q_ptr, rows_R, real_R, sq_r, 0, K, K0)
    q1 = q0
    if K1 > 0:
        q1 = load_tile(q_ptr, rows_R, real_R, sq_r, K0, K, K1)

    peak = tl.full([BLOCK_R], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc0 = tl.zeros([BLOCK_R, K0], tl.float32)
    acc1 = tl.zeros([BLOCK_R, K1 if K1 > 0 else 16], tl.float32)
    for start in range(0, _own_latents(split, R), BLOCK_J):
        rows_L = start + tl.arange(0, BLOCK_J)
        peak, total, acc0, acc1 = _attend(
            q0, q1, kl_ptr, vl_ptr, rows_L, rows_L < R, skl_r, svl_r,
            peak, total, acc0, acc1, scale_log2, K, K0, K1, PREC, UPCAST,
        )  # fmt: skip
    first = split * blocks_a_split * BLOCK_J
    for start in range(first, tl.minimum(J, first + blocks_a_split * BLOCK_J), BLOCK_J):
        rows_J = start + tl.arange(0, BLOCK_J)
        seen_J = rows_J < J
        if HAS_MASK:
            seen_J = seen_J & (tl.load(mask_ptr + n * J + rows_J, mask=seen_J, other=0) != 0)
        peak, total, acc0, acc1 = _attend(
            q0, q1, kf_ptr, vf_ptr, rows_J, seen_J, skf_j, svf_j,
            peak, total, acc0, acc1, scale_log2, K, K0, K1, PREC, UPCAST,
        )  # fmt: skip

    # A share whose keys are all masked has total 0: it stores zeros and a log that weighs nothing.
    total = tl.maximum(total, 1.0e-37)
    row = split.to(tl.int64) * split_rows + (n * R + rows_R) * H + h
    tl.store(lse_ptr + row, peak + tl.log2(total), mask=real_R)
    store_tile(out_ptr, row, real_R, K, 0, acc0 / total[:, None], K, K0)
    if K1 > 0:
        store_tile(out_ptr, row, real_R, K, K0, acc1 / total[:, None], K, K1)


@triton.jit
def combine_kernel(
    part_ptr: tl.tensor,
    part_lse_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    rows: tl.tensor,
    splits: tl.tensor,
    K: tl.constexpr,
    KPAD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Join the shares' softmaxes in the order of the shares. Grid (cdiv(rows, BLOCK),), rows = N * R * H.

    Pointers, all contiguous:
        part_ptr: fp32 [splits, N, R, H, K].
        part_lse_ptr: fp32 [splits, N, R, H].
        out_ptr: [N, R, H, K].
        lse_ptr: fp32 [N, R, H].
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = row < rows
    peak = tl.full([BLOCK], LOWEST, tl.float32)
    for split in range(0, splits):
        peak = tl.maximum(
            peak, tl.load(part_lse_ptr + tl.cast(rows, tl.int64) * split + row, mask=real, other=0.0)
        )
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, KPAD], tl.float32)
    for split in range(0, splits):
        share = tl.cast(rows, tl.int64) * split + row
        weight = tl.exp2(tl.load(part_lse_ptr + share, mask=real, other=0.0) - peak)
        total += weight
        acc += weight[:, None] * load_tile(part_ptr, share, real, K, 0, K, KPAD)
    tl.store(lse_ptr + row, peak + tl.log2(total), mask=real)
    store_tile(out_ptr, row, real, K, 0, acc / total[:, None], K, KPAD)


@triton.jit
def _backprop(
    q0: tl.tensor,
    q1: tl.tensor,
    do0: tl.tensor,
    do1: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    inside_J: tl.tensor,
    seen_J: tl.tensor,
    stride_k: tl.tensor,
    stride_v: tl.tensor,
    dk_ptr: tl.tensor,
    dv_ptr: tl.tensor,
    dq0: tl.tensor,
    dq1: tl.tensor,
    scale_log2: tl.tensor,
    scale: tl.tensor,
    K: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_J: tl.constexpr,
    PREC: tl.constexpr,
    UPCAST: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Write one key block's dK and dV, return (dq0, dq1) with its part added.

    The pointers are at the block's first row, and the gradients' rows are STRIDE apart, as heads lie side by side: so
    the rows' places are small numbers that every block has alike. dV is written before dP is there, for registers.
    """
    rows_J = tl.arange(0, BLOCK_J)
    k0, v0, k1, v1 = load_parts(k_ptr, v_ptr, rows_J, seen_J, stride_k, stride_v, K, K0, K1)
    p = tl.exp2(_scores(q0, q1, k0, k1, scale_log2, seen_J, K1, PREC, UPCAST) - lse[:, None])
    p_T = tl.trans(p.to(do0.dtype))
    store_tile(dv_ptr, rows_J, inside_J, STRIDE, 0, dot(p_T, do0, PREC, UPCAST), K, K0)
    if K1 > 0:
        store_tile(dv_ptr, rows_J, inside_J, STRIDE, K0, dot(p_T, do1, PREC, UPCAST), K, K1)
    dp = dot(do0, tl.trans(v0), PREC, UPCAST)
    if K1 > 0:
        dp += dot(do1, tl.trans(v1), PREC, UPCAST)
    ds = (p * (dp - delta[:, None]) * scale).to(q0.dtype)
    ds_T = tl.trans(ds)
    store_tile(dk_ptr, rows_J, inside_J, STRIDE, 0, dot(ds_T, q0, PREC, UPCAST), K, K0)
    if K1 > 0:
        store_tile(dk_ptr, rows_J, inside_J, STRIDE, K0, dot(ds_T, q1, PREC, UPCAST), K, K1)
    dq0 += dot(ds, k0, PREC, UPCAST)
    if K1 > 0:
        dq1 += dot(ds, k1, PREC, UPCAST)
    return dq0, dq1


@triton.jit
def backward_kernel(
    q_ptr: tl.tensor,
    kf_ptr: tl.tensor,
    vf_ptr: tl.tensor,
    kl_ptr: tl.tensor,
    vl_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    out_ptr: tl.tensor,
    dout_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    dq_ptr: tl.tensor,
    dkf_ptr: tl.tensor,
    dvf_ptr: tl.tensor,
    dkl_ptr: tl.tensor,
    dvl_ptr: tl.tensor,
    sq_n: tl.tensor,
    sq_r: tl.tensor,
    sq_h: tl.tensor,
    skf_n: tl.tensor,
    skf_j: tl.tensor,
    skf_h: tl.tensor,
    svf_n: tl.tensor,
    svf_j: tl.tensor,
    svf_h: tl.tensor,
    skl_n: tl.tensor,
    skl_r: tl.tensor,
    skl_h: tl.tensor,
    svl_n: tl.tensor,
    svl_r: tl.tensor,
    svl_h: tl.tensor,
    query_rows: tl.tensor,
    feature_rows: tl.tensor,
    scale_log2: tl.tensor,
    scale: tl.tensor,
    J: tl.tensor,
    blocks_a_split: tl.tensor,
    H: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_J: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PREC: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """All gradients in one pass over the keys. Grid (N * H, query tiles, splits).

    Each key block is read once, its dK and dV are written once and dQ stays in registers: nothing is added to
    memory by two programs, so the result does not depend on their order.

    Pointers (inputs' strides as in `forward_kernel`; the rest is contiguous):
        q_ptr, kf_ptr, vf_ptr, kl_ptr, vl_ptr, mask_ptr: as in `forward_kernel`.
        out_ptr, dout_ptr: [N, R, H, K] the forward's result and its gradient.
        lse_ptr: fp32 [N, R, H].
        dq_ptr: [splits, N, R, H, K]; fp32 where there are several splits.
        dkf_ptr, dvf_ptr: [tiles, N, J, H, K]; fp32 where there are several query tiles.
        dkl_ptr, dvl_ptr: [tiles, N, R, H, K]; fp32 where there are several query tiles.
    Scalars: query_rows = N * R * H, feature_rows = N * J * H, scale = 1 / sqrt(K), scale_log2 = scale * log2(e).
    """
    nh = tl.program_id(0)
    tile = tl.program_id(1)
    split = tl.program_id(2)
    n = (nh // H).to(tl.int64)
    h = nh % H
    kf_ptr += n * skf_n + h * skf_h
    vf_ptr += n * svf_n + h * svf_h
    kl_ptr += n * skl_n + h * skl_h
    vl_ptr += n * svl_n + h * svl_h
    rows_R = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    real_R = rows_R < R
    q_ptr += n * sq_n + h * sq_h
    row = (n * R + rows_R) * H + h
    lse = tl.load(lse_ptr + row, mask=real_R, other=0.0)
    q0 = load_tile(q_ptr, rows_R, real_R, sq_r, 0, K, K0)
    do0 = load_tile(dout_ptr, row, real_R, K, 0, K, K0)
    out0 = load_tile(out_ptr, row, real_R, K, 0, K, K0)
    delta = tl.sum(do0.to(tl.float32) * out0.to(tl.float32), 1)
    q1 = q0
    do1 = do0
    if K1 > 0:
        q1 = load_tile(q_ptr, rows_R, real_R, sq_r, K0, K, K1)
        do1 = load_tile(dout_ptr, row, real_R, K, K0, K, K1)
        out1 = load_tile(out_ptr, row, real_R, K, K0, K, K1)
        delta += tl.sum(do1.to(tl.float32) * out1.to(tl.float32), 1)

    dq0 = tl.zeros([BLOCK_R, K0], tl.float32)
    dq1 = tl.zeros([BLOCK_R, K1 if K1 > 0 else 16], tl.float32)
    # Nothing is moved out of the loops: what was kept all the while were the registers that spilled.
    for start in tl.range(0, _own_latents(split, R), BLOCK_J, disable_licm=True):
        inside_L = tl.arange(0, BLOCK_J) < R - start
        first_row = tl.cast(start, tl.int64)
        at = (tile.to(tl.int64) * query_rows + (n * R + start) * H + h) * K
        dq0, dq1 = _backprop(
            q0, q1, do0, do1, lse, delta, kl_ptr + first_row * skl_r, vl_ptr + first_row * svl_r,
            inside_L, inside_L, skl_r, svl_r, dkl_ptr + at, dvl_ptr + at,
            dq0, dq1, scale_log2, scale, K, K0, K1, H * K, BLOCK_J, PREC, UPCAST,
        )  # fmt: skip
    first = split * blocks_a_split * BLOCK_J
    for start in tl.range(first, tl.minimum(J, first + blocks_a_split * BLOCK_J), BLOCK_J, disable_licm=True):
        inside_J = tl.arange(0, BLOCK_J) < J - start
        seen_J = inside_J
        if HAS_MASK:
            flags = tl.load(mask_ptr + n * J + start + tl.arange(0, BLOCK_J), mask=inside_J, other=0)
            seen_J = inside_J & (flags != 0)
        first_row = tl.cast(start, tl.int64)
        at = (tile.to(tl.int64) * feature_rows + (n * J + start) * H + h) * K
        dq0, dq1 = _backprop(
            q0, q1, do0, do1, lse, delta, kf_ptr + first_row * skf_j, vf_ptr + first_row * svf_j,
            inside_J, seen_J, skf_j, svf_j, dkf_ptr + at, dvf_ptr + at,
            dq0, dq1, scale_log2, scale, K, K0, K1, H * K, BLOCK_J, PREC, UPCAST,
        )  # fmt: skip
    row += split.to(tl.int64) * query_rows
    store_tile(dq_ptr, row, real_R, K, 0, dq0, K, K0)
    if K1 > 0:
        store_tile(dq_ptr, row, real_R, K, K0, dq1, K, K1)
