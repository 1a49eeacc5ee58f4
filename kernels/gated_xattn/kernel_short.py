"""The backward of images whose rows fit one tile: the same mathematics as `kernel.xattn_backward` without its loop.

Where images have few rows, a sum over tiles is a sum of one term, and nothing has to stay in registers from tile to
tile: for heads of 128 on sm_90 108 a thread instead of 254, and no buffers of the next rows, so that three programs
share a processor and not two. As a branch of the kernel with the loop these lines get the loop's registers.
"""

import triton
import triton.language as tl

from kernels.gated_xattn.kernel import (
    LOG2E,
    SIZES,
    dot,
    gate_of,
    rows_by_latents,
    scores,
    zero_holes,
)
from kernels.tiles import load_parts, store_tile


@triton.jit(do_not_specialize=SIZES)
def xattn_backward_short(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    spans: tl.tensor,
    gate: tl.tensor,
    do: tl.tensor,
    dq: tl.tensor,
    dk: tl.tensor,
    dv: tl.tensor,
    dgate: tl.tensor,
    IMAGES: tl.tensor,
    B: tl.tensor,
    T: tl.tensor,
    H: tl.tensor,
    scale: tl.tensor,
    q_b: tl.tensor,
    q_t: tl.tensor,
    q_h: tl.tensor,
    k_i: tl.tensor,
    k_r: tl.tensor,
    k_h: tl.tensor,
    v_i: tl.tensor,
    v_r: tl.tensor,
    v_h: tl.tensor,
    do_b: tl.tensor,
    do_t: tl.tensor,
    do_h: tl.tensor,
    dq_b: tl.tensor,
    dq_t: tl.tensor,
    dq_h: tl.tensor,
    dk_i: tl.tensor,
    dk_r: tl.tensor,
    dk_h: tl.tensor,
    dv_i: tl.tensor,
    dv_r: tl.tensor,
    dv_h: tl.tensor,
    R: tl.constexpr,
    HAS_GATE: tl.constexpr,
    PRECISION: tl.constexpr,
    K: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> None:
    """One image of 1 to BLOCK_M rows, one head: dq, dk, dv and the gate's gradient. Others are left alone.

    Pointers: q, do, dq [B, T, H, K]; k, v, dk, dv [I, R, H, K]; spans int [I, 2] contiguous; gate 0-dim or unused;
    dgate fp32 [I * H] or unused. Strides are in elements, the last is 1 everywhere. Grid: (H, I, 1).
    """
    head, image = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(spans + image * 2), tl.load(spans + image * 2 + 1)
    sample = start // T

    lat = tl.arange(0, BLOCK_R)
    seen = lat < R  # for a long span too: these loads need not wait for the span's
    k += tl.cast(image, tl.int64) * k_i + tl.cast(head, tl.int64) * k_h
    v += tl.cast(image, tl.int64) * v_i + tl.cast(head, tl.int64) * v_h
    k1, v1, k2, v2 = load_parts(k, v, lat, seen, k_r, v_r, K, K1, K2)
    g = gate_of(gate, HAS_GATE)
    g_scale = g * scale

    row = tl.arange(0, BLOCK_M)
    t = tl.cast(start - sample * T, tl.int64)
    q += tl.cast(head, tl.int64) * q_h + tl.cast(sample, tl.int64) * q_b + t * q_t
    do += tl.cast(head, tl.int64) * do_h + tl.cast(sample, tl.int64) * do_b + t * do_t
    dq += tl.cast(head, tl.int64) * dq_h
    dq_rows = dq + tl.cast(sample, tl.int64) * dq_b + t * dq_t
    dk += tl.cast(image, tl.int64) * dk_i + tl.cast(head, tl.int64) * dk_h
    dv += tl.cast(image, tl.int64) * dv_i + tl.cast(head, tl.int64) * dv_h
    if (start < end) & (end - start <= BLOCK_M):
        inside = row < end - start
        q1, do1, q2, do2 = load_parts(q, do, row, inside, q_t, do_t, K, K1, K2)
        p, total = scores(q1, q2, k1, k2, scale * LOG2E, R, BLOCK_R, K2, PRECISION)
        p = p / total[:, None]
        dp = rows_by_latents(do1, do2, v1, v2, K2, PRECISION)
        # Rows outside of the span have q = do = 0, so they add nothing to any sum below.
        delta = tl.sum(p * dp, 1)
        ds = (p * (dp - delta[:, None])).to(k.dtype.element_ty)
        p_T, ds_T = tl.trans(p.to(k.dtype.element_ty)), tl.trans(ds)
        _store_product(dv, p_T, do1, g, lat, seen, dv_r, 0, PRECISION, K, K1)
        if K2 > 0:
            _store_product(dv, p_T, do2, g, lat, seen, dv_r, K1, PRECISION, K, K2)
        _store_product(dk, ds_T, q1, g_scale, lat, seen, dk_r, 0, PRECISION, K, K1)
        if K2 > 0:
            _store_product(dk, ds_T, q2, g_scale, lat, seen, dk_r, K1, PRECISION, K, K2)
        _store_product(dq_rows, ds, k1, g_scale, row, inside, dq_t, 0, PRECISION, K, K1)
        if K2 > 0:
            _store_product(dq_rows, ds, k2, g_scale, row, inside, dq_t, K1, PRECISION, K, K2)
        if HAS_GATE:
            tl.store(dgate + image * H + head, tl.sum(delta))
        zero_holes(dq, spans, image, IMAGES, B, T, dq_b, dq_t, BLOCK_M, K, K1, K2)


@triton.jit
def _store_product(
    at: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    factor: tl.tensor,
    row: tl.tensor,
    inside: tl.tensor,
    stride: tl.tensor,
    START: tl.constexpr,
    PRECISION: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Write a @ b * factor to the rows of `at`, columns START .. START + WIDTH - 1 of a head of width K."""
    product = dot(a, b, tl.zeros((a.shape[0], WIDTH), tl.float32), PRECISION)
    store_tile(at, row, inside, stride, START, product * factor, K, WIDTH)
