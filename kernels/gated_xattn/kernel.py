"""Image-causal gated cross-attention in Triton, forward and backward; README.md has the mathematics.

A text row sees one image, and an image's latents fit one tile. So a row's softmax is complete inside one tile (no
running maximum, no saved statistics), and a program that owns one image and one head owns every row of that image's
span: one pass writes dq, dk and dv, without atomics.

Letters: B samples of T rows (the spans count the rows of all samples, 0 .. B*T-1), I images (`IMAGES`) with R latents
each, H heads of width K <= K1 + K2: a tile's sides are powers of two, so 96 is 64 + 32, and K2 is 0 for a single part.
Where the parts are wider than the head, the columns beyond it are zeros. Tiles: BLOCK_M rows, BLOCK_R >= R latents.

Head and image are axes of the grid of their own (neighbouring heads, whose rows are neighbours in memory, run side by
side): such numbers lie in registers that all threads share, those that a division gives do not.
"""

import triton
import triton.language as tl

from kernels.config import is_interpreted
from kernels.tiles import load_parts, load_tile, store_tile

UPCAST = tl.constexpr(is_interpreted)
"""The interpreter computes with the bit patterns of bf16, so there every operand becomes fp32 first."""

SIZES = ("IMAGES", "B", "T", "H")
"""Arguments that change from batch to batch: no kernel of their own for 1, or for multiples of 16."""

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _operand(x: tl.tensor) -> tl.tensor:
    """Return x as the dot products want it: as loaded, or in fp32 under the interpreter."""
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, acc: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """Return acc + a @ b in fp32."""
    return tl.dot(_operand(a), _operand(b), acc, input_precision=PRECISION)


@triton.jit
def _add_product(
    rows: tl.tensor,
    x1: tl.tensor,
    x2: tl.tensor,
    acc1: tl.tensor,
    acc2: tl.tensor,
    K2: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return both parts of acc + rows^T x, for rows [M, R], x [M, K1 + K2] and acc [R, K1 + K2]."""
    rows_T = tl.trans(rows)
    acc1 = dot(rows_T, x1, acc1, PRECISION)
    if K2 > 0:
        acc2 = dot(rows_T, x2, acc2, PRECISION)
    return acc1, acc2


@triton.jit
def rows_by_latents(
    x1: tl.tensor,
    x2: tl.tensor,
    k1: tl.tensor,
    k2: tl.tensor,
    K2: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Return fp32 [M, R]: x k^T of x [M, K1 + K2] and k [R, K1 + K2]."""
    product = tl.zeros((x1.shape[0], k1.shape[0]), tl.float32)
    product = dot(x1, tl.trans(k1), product, PRECISION)
    if K2 > 0:
        product = dot(x2, tl.trans(k2), product, PRECISION)
    return product


@triton.jit
def gate_of(gate: tl.tensor, HAS_GATE: tl.constexpr) -> tl.tensor:
    """Return the gate in fp32, or 1 without one."""
    g = 1.0
    if HAS_GATE:
        g = tl.load(gate).to(tl.float32)
    return g


@triton.jit
def _chunk(start: tl.tensor, end: tl.tensor, BLOCK_M: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Return this program's part of rows start .. end-1, which axis 2 of the grid shares in whole tiles."""
    tiles = tl.cdiv(end - start, BLOCK_M)
    rows = tl.cdiv(tiles, tl.num_programs(2)) * BLOCK_M
    lo = start + tl.program_id(2) * rows
    return lo, tl.minimum(lo + rows, end)


@triton.jit
def _is_left(start: tl.tensor, end: tl.tensor, SHORT: tl.constexpr) -> tl.tensor:
    """Return whether another kernel computes the image of rows start .. end-1: one of 1 to SHORT rows."""
    left = False
    if SHORT > 0:
        left = (start < end) & (end - start <= SHORT)
    return left


@triton.jit
def _zero_rows(
    x: tl.tensor,
    lo: tl.tensor,
    hi: tl.tensor,
    T: tl.tensor,
    x_b: tl.tensor,
    x_t: tl.tensor,
    BLOCK_M: tl.constexpr,
    K: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
) -> None:
    """Write zeros to rows lo .. hi-1 of one head; they may belong to several samples."""
    lo, hi = _chunk(lo, hi, BLOCK_M)
    for first in range(lo, hi, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        sample = row // T
        at = sample.to(tl.int64) * x_b + (row - sample * T).to(tl.int64) * x_t
        store_tile(x, at, row < hi, 1, 0, tl.zeros((BLOCK_M, K1), tl.float32), K, K1)
        if K2 > 0:
            store_tile(x, at, row < hi, 1, K1, tl.zeros((BLOCK_M, K2), tl.float32), K, K2)


@triton.jit
def zero_holes(
    x: tl.tensor,
    spans: tl.tensor,
    image: tl.tensor,
    IMAGES: tl.tensor,
    B: tl.tensor,
    T: tl.tensor,
    x_b: tl.tensor,
    x_t: tl.tensor,
    BLOCK_M: tl.constexpr,
    K: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
) -> None:
    """Write zeros to the rows between the image before and this one, and after the last image."""
    before = tl.load(spans + image * 2 - 1, mask=image > 0, other=0)
    _zero_rows(x, before, tl.load(spans + image * 2), T, x_b, x_t, BLOCK_M, K, K1, K2)
    if image == IMAGES - 1:
        _zero_rows(x, tl.load(spans + image * 2 + 1), B * T, T, x_b, x_t, BLOCK_M, K, K1, K2)


@triton.jit
def scores(
    q1: tl.tensor,
    q2: tl.tensor,
    k1: tl.tensor,
    k2: tl.tensor,
    qk_scale: tl.tensor,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    K2: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return exp2(s - max s) and its row sums, for s = q k^T * qk_scale over the R real latents."""
    s = rows_by_latents(q1, q2, k1, k2, K2, PRECISION)
    s *= qk_scale
    if R < BLOCK_R:
        s = tl.where(tl.arange(0, BLOCK_R)[None, :] < R, s, float("-inf"))
    p = tl.exp2(s - tl.max(s, 1)[:, None])
    return p, tl.sum(p, 1)


@triton.jit(do_not_specialize=SIZES)
def xattn_forward(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    spans: tl.tensor,
    gate: tl.tensor,
    out: tl.tensor,
    IMAGES: tl.tensor,
    B: tl.tensor,
    T: tl.tensor,
    H: tl.tensor,
    qk_scale: tl.tensor,
    q_b: tl.tensor,
    q_t: tl.tensor,
    q_h: tl.tensor,
    k_i: tl.tensor,
    k_r: tl.tensor,
    k_h: tl.tensor,
    v_i: tl.tensor,
    v_r: tl.tensor,
    v_h: tl.tensor,
    o_b: tl.tensor,
    o_t: tl.tensor,
    o_h: tl.tensor,
    R: tl.constexpr,
    HAS_GATE: tl.constexpr,
    PRECISION: tl.constexpr,
    K: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> None:
    """One image, one head, one chunk of its span: K and V loaded once, then a loop over tiles of rows.

    Pointers: q, out [B, T, H, K]; k, v [I, R, H, K]; spans int [I, 2] contiguous; gate 0-dim or unused. Strides are
    in elements, the last is 1 everywhere. Grid: (H, I, chunks).
    """
    head, image = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(spans + image * 2), tl.load(spans + image * 2 + 1)
    lo, hi = _chunk(start, end, BLOCK_M)
    sample = start // T

    lat = tl.arange(0, BLOCK_R)
    seen = lat < tl.where(lo < hi, R, 0)  # nothing is read for an empty span
    k += tl.cast(image, tl.int64) * k_i + tl.cast(head, tl.int64) * k_h
    v += tl.cast(image, tl.int64) * v_i + tl.cast(head, tl.int64) * v_h
    k1, v1, k2, v2 = load_parts(k, v, lat, seen, k_r, v_r, K, K1, K2)
    g = gate_of(gate, HAS_GATE)

    row = tl.arange(0, BLOCK_M)
    out += tl.cast(head, tl.int64) * o_h
    q += tl.cast(head, tl.int64) * q_h + tl.cast(sample, tl.int64) * q_b
    out_rows = out + tl.cast(sample, tl.int64) * o_b
    for first in tl.range(lo, hi, BLOCK_M, disable_licm=True):
        inside = row < hi - first
        t = tl.cast(first - sample * T, tl.int64)
        q1 = load_tile(q + t * q_t, row, inside, q_t, 0, K, K1)
        q2 = q1
        if K2 > 0:
            q2 = load_tile(q + t * q_t, row, inside, q_t, K1, K, K2)
        p, total = scores(q1, q2, k1, k2, qk_scale, R, BLOCK_R, K2, PRECISION)
        factor = (g / total)[:, None]
        p = p.to(v.dtype.element_ty)
        o1 = dot(p, v1, tl.zeros((BLOCK_M, K1), tl.float32), PRECISION) * factor
        store_tile(out_rows + t * o_t, row, inside, o_t, 0, o1, K, K1)
        if K2 > 0:
            o2 = dot(p, v2, tl.zeros((BLOCK_M, K2), tl.float32), PRECISION) * factor
            store_tile(out_rows + t * o_t, row, inside, o_t, K1, o2, K, K2)
    zero_holes(out, spans, image, IMAGES, B, T, o_b, o_t, BLOCK_M, K, K1, K2)


@triton.jit(do_not_specialize=SIZES)
def xattn_backward(
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
    dk_c: tl.tensor,
    dk_i: tl.tensor,
    dk_r: tl.tensor,
    dk_h: tl.tensor,
    dv_c: tl.tensor,
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
    DV_FIRST: tl.constexpr,
    SHORT: tl.constexpr,
) -> None:
    """One image, one head, one chunk of its span: dq of its rows and, over them, dk, dv and the gate's gradient.

    Pointers: q, do, dq [B, T, H, K]; k, v [I, R, H, K]; dk, dv [chunks, I, R, H, K] (in fp32 if there are several
    chunks, to be summed); spans int [I, 2] contiguous; gate 0-dim or unused; dgate fp32 [chunks, I * H] or unused.
    Strides are in elements, the last is 1 everywhere. Grid: (H, I, chunks). DV_FIRST changes nothing but how many tiles
    are alive at once: whether dv is added up before dp is there. Images of 1 to SHORT rows are left to another kernel.
    """
    head, image, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end = tl.load(spans + image * 2), tl.load(spans + image * 2 + 1)
    if _is_left(start, end, SHORT):
        return
    lo, hi = _chunk(start, end, BLOCK_M)
    sample = start // T

    lat = tl.arange(0, BLOCK_R)
    seen = lat < R  # for an empty span too: these loads need not wait for the span's
    k += tl.cast(image, tl.int64) * k_i + tl.cast(head, tl.int64) * k_h
    v += tl.cast(image, tl.int64) * v_i + tl.cast(head, tl.int64) * v_h
    k1, v1, k2, v2 = load_parts(k, v, lat, seen, k_r, v_r, K, K1, K2)
    g_scale = scale * gate_of(gate, HAS_GATE)

    row = tl.arange(0, BLOCK_M)
    q += tl.cast(head, tl.int64) * q_h + tl.cast(sample, tl.int64) * q_b
    do += tl.cast(head, tl.int64) * do_h + tl.cast(sample, tl.int64) * do_b
    dq += tl.cast(head, tl.int64) * dq_h
    dq_rows = dq + tl.cast(sample, tl.int64) * dq_b
    dk1 = tl.zeros((BLOCK_R, K1), tl.float32)
    dv1 = tl.zeros((BLOCK_R, K1), tl.float32)
    dk2 = tl.zeros((BLOCK_R, K2 if K2 > 0 else 16), tl.float32)
    dv2 = tl.zeros((BLOCK_R, K2 if K2 > 0 else 16), tl.float32)
    g_rows = tl.zeros((BLOCK_M,), tl.float32)
    # Nothing is moved out of the loop: the strides times the rows, kept all the while, were the registers that spilled.
    for first in tl.range(lo, hi, BLOCK_M, disable_licm=True):
        inside = row < hi - first
        t = tl.cast(first - sample * T, tl.int64)
        q1 = load_tile(q + t * q_t, row, inside, q_t, 0, K, K1)
        do1 = load_tile(do + t * do_t, row, inside, do_t, 0, K, K1)
        q2, do2 = q1, do1
        if K2 > 0:
            q2 = load_tile(q + t * q_t, row, inside, q_t, K1, K, K2)
            do2 = load_tile(do + t * do_t, row, inside, do_t, K1, K, K2)
        p, total = scores(q1, q2, k1, k2, scale * LOG2E, R, BLOCK_R, K2, PRECISION)
        p = p / total[:, None]
        if DV_FIRST:
            dv1, dv2 = _add_product(p.to(k.dtype.element_ty), do1, do2, dv1, dv2, K2, PRECISION)
        dp = rows_by_latents(do1, do2, v1, v2, K2, PRECISION)
        # Rows outside of the span have q = do = 0, so they add nothing to any sum below.
        delta = tl.sum(p * dp, 1)
        g_rows += delta
        ds = (p * (dp - delta[:, None])).to(k.dtype.element_ty)
        if not DV_FIRST:
            dv1, dv2 = _add_product(p.to(k.dtype.element_ty), do1, do2, dv1, dv2, K2, PRECISION)
            dk1, dk2 = _add_product(ds, q1, q2, dk1, dk2, K2, PRECISION)
        dq1 = dot(ds, k1, tl.zeros((BLOCK_M, K1), tl.float32), PRECISION) * g_scale
        store_tile(dq_rows + t * dq_t, row, inside, dq_t, 0, dq1, K, K1)
        if K2 > 0:
            dq2 = dot(ds, k2, tl.zeros((BLOCK_M, K2), tl.float32), PRECISION) * g_scale
            store_tile(dq_rows + t * dq_t, row, inside, dq_t, K1, dq2, K, K2)
        if DV_FIRST:
            dk1, dk2 = _add_product(ds, q1, q2, dk1, dk2, K2, PRECISION)

    # The gate and the scale are the same for every row: dk and dv get them once, after the sum. The gate is read
    # again rather than kept in a register all the while; so are the spans.
    g = gate_of(gate, HAS_GATE)
    wide = tl.cast(chunk, tl.int64)
    dk += wide * dk_c + tl.cast(image, tl.int64) * dk_i + tl.cast(head, tl.int64) * dk_h
    dv += wide * dv_c + tl.cast(image, tl.int64) * dv_i + tl.cast(head, tl.int64) * dv_h
    store_tile(dk, lat, lat < R, dk_r, 0, dk1 * g_scale, K, K1)
    store_tile(dv, lat, lat < R, dv_r, 0, dv1 * g, K, K1)
    if K2 > 0:
        store_tile(dk, lat, lat < R, dk_r, K1, dk2 * g_scale, K, K2)
        store_tile(dv, lat, lat < R, dv_r, K1, dv2 * g, K, K2)
    if HAS_GATE:
        tl.store(dgate + (chunk * IMAGES + image) * H + head, tl.sum(g_rows))
    zero_holes(dq, spans, image, IMAGES, B, T, dq_b, dq_t, BLOCK_M, K, K1, K2)


@triton.jit
def sum_chunks(
    parts: tl.tensor, out: tl.tensor, n: tl.tensor, CHUNKS: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Sum the chunks' parts, always in the same order. parts: fp32 [CHUNKS, n]; out: [n]. Grid: (cdiv(n, BLOCK),)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for chunk in range(CHUNKS):
        total += tl.load(parts + tl.cast(chunk, tl.int64) * n + at, mask=at < n, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < n)
