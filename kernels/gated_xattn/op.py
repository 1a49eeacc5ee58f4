"""Image-causal gated cross-attention on Triton as an operator that autograd and torch.compile know.

`flamingo::gated_xattn` keeps its inputs alone for the backward pass: no output, no softmax statistics.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kernels.config import DTYPES, FILL_PROGRAMS, LAUNCH_NEEDS, architecture, can_launch, power_of_two
from kernels.gated_xattn import kernel, kernel_short, kernel_spans
from kernels.gated_xattn.reference import check_media_index, check_shapes, values_are_known
from kernels.gated_xattn.tiles import MAX_LATENTS, SMALL_SHARED_MEMORY, WIDTHS, Tile, short_tile, tiles

MAX_IMAGES = 65_535
"""Programs along the second axis of a CUDA grid."""
LONG_SPAN = 512
"""Rows of a mean span from which the forward pass shares a span among programs."""


def unsupported(q_BTHK: Tensor, images: int, latents: int) -> str | None:
    """Return why the kernel cannot take these shapes and dtypes, or None.

    Args:
        q_BTHK: [B, T, H, K] queries.
        images: I, B * M in a batch.
        latents: R.
    """
    batch, rows, heads, width = q_BTHK.shape
    if q_BTHK.dtype not in DTYPES:
        return f"dtype {q_BTHK.dtype} is none of {', '.join(map(str, DTYPES))}"
    if width not in WIDTHS:
        return f"head width {width} is none of {', '.join(map(str, WIDTHS))}"
    if not 1 <= latents <= MAX_LATENTS:
        return f"{latents} latents do not fit one tile of at most {MAX_LATENTS}"
    crowded = latents * width > 64 * 128 or (q_BTHK.dtype == torch.float32 and latents * width > 64 * 64)
    if q_BTHK.device.type == "cuda" and crowded and architecture(q_BTHK.device) in SMALL_SHARED_MEMORY:
        return f"{latents} latents of width {width} in {q_BTHK.dtype} exceed this GPU's shared memory"
    if batch * rows >= 2**31 or heads >= 2**31 or images > MAX_IMAGES:
        return f"rows and heads must be below 2**31, images at most {MAX_IMAGES}"
    return None


def gated_xattn_varlen(
    q_AHK: Tensor, k_IRHK: Tensor, v_IRHK: Tensor, spans_I2: Tensor, gate: Tensor | None
) -> Tensor:
    """Each image's span of rows attends to the image's latents; the result is multiplied by `gate`.

    Differentiable in everything but the spans, and deterministic. Tensors are read by their strides, so views of
    one projection's output need no copy.

    Args:
        q_AHK: [A, H, K] queries of all text rows, fp32, fp16 or bf16; K is 16, 32, 48, 64, 80, 96 or 128.
        k_IRHK: [I, R, H, K] keys of the latents, dtype of the queries; R is at most 128.
        v_IRHK: [I, R, H, K] values of the latents, dtype of the queries.
        spans_I2: int32 or int64 [I, 2], first row and end of each image's span. They must not run backwards:
            0 <= start_0 <= end_0 <= start_1 <= ... <= A. Rows between spans see nothing and come out as zero; an
            image whose start is its end is seen by no row. Not checked on an accelerator, where a violation gives
            wrong rows without an error.
        gate: 0-dim tensor, already squashed (tanh), dtype of the queries; None multiplies by nothing.

    Returns:
        [A, H, K] in the queries' dtype.

    Raises:
        ValueError: shapes, dtypes or (on a CPU) spans that do not fit.
    """
    if q_AHK.dim() != 3:
        raise ValueError(f"queries are {tuple(q_AHK.shape)}; they must be [A, H, K].")
    check(q_AHK[None], k_IRHK, v_IRHK, spans_I2, gate)
    out_AHK: Tensor = gated_xattn_op(q_AHK[None], k_IRHK, v_IRHK, spans_I2, gate)[0]
    return out_AHK


def gated_xattn_batched(
    q_BTHK: Tensor, k_BMRHK: Tensor, v_BMRHK: Tensor, media_index_BT: Tensor, gate: Tensor | None
) -> Tensor:
    """`kernels.gated_xattn.reference.gated_xattn` on the kernel; the rows of a medium must be contiguous.

    Args:
        q_BTHK: [B, T, H, K] queries, any strides with the last 1 (sequence-first memory is not copied).
        k_BMRHK: [B, M, R, H, K] keys of the latents, dtype of the queries.
        v_BMRHK: [B, M, R, H, K] values of the latents, dtype of the queries.
        media_index_BT: [B, T] integer; m in 1..M sees medium m - 1, others see nothing. In a sample the rows of
            each medium are contiguous and media come in ascending order.
        gate: 0-dim tensor or None.

    Returns:
        [B, T, H, K] in the queries' dtype and memory layout.

    Raises:
        ValueError: inputs that the kernel cannot take.
    """
    check_shapes(q_BTHK, k_BMRHK, v_BMRHK, media_index_BT, gate)
    if values_are_known(media_index_BT):
        check_media_index(media_index_BT, k_BMRHK.shape[1])
        _check_ascending(media_index_BT)
    k_IRHK, v_IRHK = k_BMRHK.flatten(0, 1), v_BMRHK.flatten(0, 1)
    spans_I2 = media_spans_op(media_index_BT, k_BMRHK.shape[1])
    check(q_BTHK, k_IRHK, v_IRHK, spans_I2, gate)
    out_BTHK: Tensor = gated_xattn_op(q_BTHK, k_IRHK, v_IRHK, spans_I2, gate)
    return out_BTHK


def check(q_BTHK: Tensor, k_IRHK: Tensor, v_IRHK: Tensor, spans_I2: Tensor, gate: Tensor | None) -> None:
    """Raise `ValueError` unless the kernel can take these; spans are looked at on a CPU alone.

    Args:
        q_BTHK: [B, T, H, K] queries.
        k_IRHK: [I, R, H, K] keys.
        v_IRHK: [I, R, H, K] values.
        spans_I2: [I, 2] int32 or int64, monotone, none across a sample's border.
        gate: 0-dim tensor or None.
    """
    if values_are_known(q_BTHK) and not can_launch(q_BTHK):
        raise ValueError(
            f"the Triton kernel of gated_xattn cannot run on {q_BTHK.device}; {LAUNCH_NEEDS}. Use the reference."
        )
    heads = q_BTHK.shape[2:]
    if k_IRHK.dim() != 4 or k_IRHK.shape != v_IRHK.shape or k_IRHK.shape[2:] != heads:
        raise ValueError(
            f"keys {tuple(k_IRHK.shape)} and values {tuple(v_IRHK.shape)} must both be [I, R, H, K] with the H, K "
            f"of the queries, {tuple(heads)}."
        )
    if spans_I2.shape != (k_IRHK.shape[0], 2) or spans_I2.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"spans_I2 is {spans_I2.dtype} {tuple(spans_I2.shape)}; it must be int32 or int64 [I, 2] = "
            f"{(k_IRHK.shape[0], 2)}."
        )
    if gate is not None and gate.dim() != 0:
        raise ValueError(f"gate is {tuple(gate.shape)}; it must be a 0-dim tensor or None.")
    floating = [q_BTHK, k_IRHK, v_IRHK, *([] if gate is None else [gate])]
    if len({x.dtype for x in floating}) > 1 or len({x.device for x in [*floating, spans_I2]}) > 1:
        found = ", ".join(f"{x.dtype} on {x.device}" for x in floating)
        raise ValueError(f"queries, keys, values and gate must share dtype and device; given {found}.")
    reason = unsupported(q_BTHK, *k_IRHK.shape[:2])
    if reason is not None:
        raise ValueError(f"the Triton kernel of gated_xattn cannot run: {reason}; use the reference.")
    if values_are_known(spans_I2):
        _check_spans(spans_I2, q_BTHK.shape[0], q_BTHK.shape[1])


def _check_ascending(media_index_BT: Tensor) -> None:
    """Raise `ValueError` unless media come in ascending order in each sample of [B, T], on a CPU."""
    for sample, index_T in enumerate(media_index_BT):
        # One entry for each run of equal indices: in order and none twice, so that no row lies inside another's span.
        runs = torch.unique_consecutive(index_T)
        seeing = runs[runs > 0]
        if bool((seeing[1:] <= seeing[:-1]).any()):
            raise ValueError(
                f"sample {sample} of media_index_BT leaves a medium and comes back: {index_T.tolist()}. The Triton "
                "kernel needs the rows of each medium together and media in order; use implementation='reference'."
            )


def _check_spans(spans_I2: Tensor, batch: int, rows: int) -> None:
    """Raise `ValueError` unless the spans ([I, 2], on a CPU) are monotone and inside their samples."""
    flat = spans_I2.flatten().tolist()
    if not flat:
        return
    if flat[0] < 0 or flat[-1] > batch * rows or any(a > b for a, b in pairwise(flat)):
        raise ValueError(
            f"spans must not run backwards nor leave 0..{batch * rows}; given {spans_I2.tolist()}."
        )
    for start, end in spans_I2.tolist():
        if start < end and start // rows != (end - 1) // rows:
            raise ValueError(f"span {start}..{end} crosses the border of a sample of {rows} rows.")


def forward(
    q_BTHK: Tensor,
    k_IRHK: Tensor,
    v_IRHK: Tensor,
    spans_I2: Tensor,
    gate: Tensor | None,
    *,
    chunks: int | None = None,
) -> Tensor:
    """Launch the forward kernel; arguments have been checked. Shapes as in `check`.

    Args:
        q_BTHK: [B, T, H, K].
        k_IRHK: [I, R, H, K].
        v_IRHK: [I, R, H, K].
        spans_I2: [I, 2] in rows of the flattened batch.
        gate: 0-dim or None.
        chunks: programs that share a span; None chooses.

    Returns:
        [B, T, H, K], laid out in memory as the queries are.
    """
    (batch, rows, heads, width), (images, latents) = q_BTHK.shape, k_IRHK.shape[:2]
    out_BTHK = _empty_like(q_BTHK)
    if images == 0:
        return out_BTHK.zero_()
    if out_BTHK.numel() == 0:
        return out_BTHK
    q_BTHK, k_IRHK, v_IRHK = (_last_stride_1(x) for x in (q_BTHK, k_IRHK, v_IRHK))
    tile = tiles(width, power_of_two(latents), q_BTHK.dtype, architecture(q_BTHK.device))[0]
    if chunks is None:
        chunks = max(batch * rows // images // LONG_SPAN, -(-FILL_PROGRAMS // (images * heads)))
        chunks = min(chunks, -(-rows // tile.rows))
    with torch.cuda.device_of(q_BTHK):
        kernel.xattn_forward[(heads, images, chunks)](
            q_BTHK, k_IRHK, v_IRHK, spans_I2.int().contiguous(), q_BTHK if gate is None else gate, out_BTHK,
            images, batch, rows, heads, width**-0.5 * kernel.LOG2E.value,
            *q_BTHK.stride()[:3], *_strides(k_IRHK), *_strides(v_IRHK), *out_BTHK.stride()[:3],
            **_meta(tile, q_BTHK, latents, gate),
        )  # fmt: skip
    return out_BTHK


def backward(
    do_BTHK: Tensor,
    q_BTHK: Tensor,
    k_IRHK: Tensor,
    v_IRHK: Tensor,
    spans_I2: Tensor,
    gate: Tensor | None,
    *,
    chunks: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward kernel, and the sum of the chunks where a span is shared. Shapes as in `check`.

    Args:
        do_BTHK: [B, T, H, K] gradient of the output.
        q_BTHK: [B, T, H, K].
        k_IRHK: [I, R, H, K].
        v_IRHK: [I, R, H, K].
        spans_I2: [I, 2] in rows of the flattened batch.
        gate: 0-dim or None.
        chunks: programs that share a span; None chooses.

    Returns:
        Gradients of q [B, T, H, K], k and v [I, R, H, K] and the gate (0-dim; 0 without one).
    """
    (batch, rows, heads, width), (images, latents) = q_BTHK.shape, k_IRHK.shape[:2]
    dq_BTHK, dk_IRHK, dv_IRHK = _empty_like(q_BTHK), _contiguous_like(k_IRHK), _contiguous_like(v_IRHK)
    if images == 0 or q_BTHK.numel() == 0:
        return dq_BTHK.zero_(), dk_IRHK.zero_(), dv_IRHK.zero_(), q_BTHK.new_zeros(())
    do_BTHK, q_BTHK, k_IRHK, v_IRHK = (_last_stride_1(x) for x in (do_BTHK, q_BTHK, k_IRHK, v_IRHK))
    at = (width, power_of_two(latents), q_BTHK.dtype, architecture(q_BTHK.device))
    tile, short = tiles(*at)[1], short_tile(*at)
    if chunks is None:
        chunks = min(-(-FILL_PROGRAMS // (images * heads)), -(-rows // tile.rows))
    if short is not None and (chunks > 1 or batch * rows > images * short.rows):
        short = None  # few images are short, as far as shapes tell: nobody has read the spans back
    parts = [dk_IRHK[None], dv_IRHK[None]]
    if chunks > 1:
        parts = [part.new_empty(chunks, *k_IRHK.shape, dtype=torch.float32) for part in parts]
    dgate = torch.empty(chunks, images * heads, dtype=torch.float32, device=q_BTHK.device)
    tensors = (
        q_BTHK, k_IRHK, v_IRHK, spans_I2.int().contiguous(), q_BTHK if gate is None else gate, do_BTHK,
        dq_BTHK, *parts, dgate,
    )  # fmt: skip
    sizes = (images, batch, rows, heads, width**-0.5)
    strides = (
        *q_BTHK.stride()[:3], *_strides(k_IRHK), *_strides(v_IRHK), *do_BTHK.stride()[:3], *dq_BTHK.stride()[:3]
    )  # fmt: skip
    with torch.cuda.device_of(q_BTHK):
        if short is not None:
            kernel_short.xattn_backward_short[(heads, images)](
                *tensors, *sizes, *strides, *_strides(dk_IRHK), *_strides(dv_IRHK),
                **_meta(short, q_BTHK, latents, gate),
            )  # fmt: skip
        kernel.xattn_backward[(heads, images, chunks)](
            *tensors, *sizes, *strides, *parts[0].stride()[:4], *parts[1].stride()[:4],
            DV_FIRST=tile.dv_first, SHORT=0 if short is None else short.rows,
            **_meta(tile, q_BTHK, latents, gate),
        )  # fmt: skip
        if chunks > 1:
            n = dk_IRHK.numel()
            for part, whole in zip(parts, (dk_IRHK, dv_IRHK), strict=True):
                kernel.sum_chunks[(-(-n // 1024),)](part, whole, n, CHUNKS=chunks, BLOCK=1024, num_warps=4)
    return dq_BTHK, dk_IRHK, dv_IRHK, q_BTHK.new_zeros(()) if gate is None else dgate.sum().to(gate.dtype)


def media_spans(media_index_BT: Tensor, media: int) -> Tensor:
    """Return int32 [B * M, 2], the span of each medium's rows in the flattened batch, without reading it back.

    Args:
        media_index_BT: integer [B, T]; the rows of each medium are contiguous and ascending.
        media: M.
    """
    batch, rows = media_index_BT.shape
    spans_I2 = torch.empty(batch * media, 2, dtype=torch.int32, device=media_index_BT.device)
    if batch * media == 0:
        return spans_I2
    block = min(1024, power_of_two(max(1, rows)))
    with torch.cuda.device_of(media_index_BT):
        kernel_spans.media_spans[(batch * media,)](
            media_index_BT, spans_I2, rows, media, *media_index_BT.stride(), BLOCK_T=block, num_warps=4
        )
    return spans_I2


def _meta(tile: Tile, q_BTHK: Tensor, latents: int, gate: Tensor | None) -> dict[str, object]:
    """Return the compile-time arguments for a tile, queries [B, T, H, K] and a 0-dim gate or None."""
    # As torch's own products: full fp32 unless the user has allowed less.
    exact = q_BTHK.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return {
        "R": latents,
        "HAS_GATE": gate is not None,
        "PRECISION": "ieee" if exact else "tf32",
        "K": q_BTHK.shape[-1],
        "K1": tile.parts[0],
        "K2": tile.parts[1],
        "BLOCK_R": power_of_two(latents),
        "BLOCK_M": tile.rows,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "maxnreg": tile.registers,
    }


def _empty_like(x: Tensor) -> Tensor:
    """Return an empty tensor like `x` (any shape), laid out in the same order, the last stride 1."""
    empty = torch.empty_like(x)
    return empty if empty.stride(-1) == 1 else _contiguous_like(x)


def _contiguous_like(x: Tensor) -> Tensor:
    """Return an empty contiguous tensor like `x` (any shape)."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _last_stride_1(x: Tensor) -> Tensor:
    """Return `x` (any shape), copied if its last axis is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x_IRHK: Tensor) -> tuple[int, int, int]:
    """Return the strides of [I, R, H, K] but the last."""
    i, r, h, _ = x_IRHK.stride()
    return i, r, h


@torch.library.custom_op("flamingo::gated_xattn", mutates_args=())
def gated_xattn_op(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, gate: Tensor | None) -> Tensor:
    """`forward` as an operator: q [B, T, H, K], k and v [I, R, H, K], spans [I, 2], gate 0-dim."""
    return forward(q, k, v, spans, gate)


@gated_xattn_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, gate: Tensor | None) -> Tensor:
    return _empty_like(q)


@torch.library.custom_op("flamingo::gated_xattn_backward", mutates_args=())
def gated_xattn_backward_op(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, spans: Tensor, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`backward` as an operator: do, q [B, T, H, K], k and v [I, R, H, K], spans [I, 2], gate 0-dim."""
    return backward(do, q, k, v, spans, gate)


@gated_xattn_backward_op.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, spans: Tensor, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_like(q), _contiguous_like(k), _contiguous_like(v), q.new_empty(())


@torch.library.custom_op("flamingo::media_spans", mutates_args=())
def media_spans_op(media_index: Tensor, media: int) -> Tensor:
    """`media_spans` as an operator: media_index [B, T]."""
    return media_spans(media_index, media)


@media_spans_op.register_fake
def _(media_index: Tensor, media: int) -> Tensor:
    return media_index.new_empty(media_index.shape[0] * media, 2, dtype=torch.int32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: activation checkpointing recomputes at the first reading
    dq, dk, dv, dgate = gated_xattn_backward_op(do, *saved)
    return dq, dk, dv, None, None if saved[4] is None else dgate


gated_xattn_op.register_autograd(_differentiate, setup_context=_save)
