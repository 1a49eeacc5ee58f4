"""Contenders for image-causal gated cross-attention: B0 to B6, and ours.

Inputs are q [B, T, H, K], k and v [B, M, R, H, K] and the gate, batch-first and contiguous: what suits the baselines
best. All multiply by the gate. A mask or an index that depends on the batch alone is made before the clock starts, as
if all layers shared it, unless the contender's name says "mask built"; ours computes its spans inside.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from jobs.bench.cases import Case
from jobs.bench.contender import Built, Contender, LeftOutError, check_launch, compile_, sdpa_backend
from kernels.dispatch import gated_xattn


def eager_openflamingo(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, index_BT: Tensor) -> tuple[Tensor]:
    """Run B0, the published eager code, pass by pass: scale, mask, amax, softmax, second mask, gate.

    Args:
        q: [B, T, H, K].
        k: [B, M, R, H, K].
        v: [B, M, R, H, K].
        gate: 0-dim.
        index_BT: [B, T], the image that each row sees, or 0.
    """
    latents = k.shape[2]
    q = q.transpose(1, 2) * q.shape[-1] ** -0.5
    k, v = (x.flatten(1, 2).transpose(1, 2) for x in (k, v))
    scores = torch.einsum("bhid,bhjd->bhij", q, k)
    image = torch.arange(k.shape[2], device=k.device) // latents + 1
    visible = index_BT[:, None, :, None] == image
    scores = scores.masked_fill(~visible, -torch.finfo(scores.dtype).max)
    scores = scores - scores.amax(dim=-1, keepdim=True).detach()
    weights = scores.softmax(dim=-1).masked_fill((index_BT == 0)[:, None, :, None], 0.0)
    out = torch.einsum("bhij,bhjd->bhid", weights, v).transpose(1, 2)
    return (out * gate,)


def _openflamingo(case: Case, *, compiled: bool) -> Built:
    function = compile_(eager_openflamingo, case.device) if compiled else eager_openflamingo
    return Built(
        call=lambda q, k, v, gate: function(q, k, v, gate, _index(case)),
        note=f"torch.compile, {_backend(case)}" if compiled else "",
    )


def _idefics(case: Case) -> Built:
    """B1: an additive mask over all latents, softmax in fp32, rows without an image cleared afterwards."""
    visible = _visible(case)
    additive = torch.zeros_like(visible, dtype=case.dtype).masked_fill(~visible, torch.finfo(case.dtype).min)
    blind = _index(case)[:, :, None, None] == 0

    def call(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> tuple[Tensor]:
        q, k, v = _heads_first(q, k, v)
        scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5 + additive
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
        out = torch.matmul(weights, v).transpose(1, 2).contiguous()
        return (out.masked_fill(blind, 0.0) * gate,)

    return Built(call=call)


def _sdpa(case: Case) -> Built:
    """B3: torch's fused attention under a dense bool mask; rows without an image see all and are cleared."""
    index_BT = _index(case)
    blind = index_BT[:, :, None, None] == 0
    mask = _visible(case) | (index_BT == 0)[:, None, :, None]

    def call(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> tuple[Tensor]:
        out = F.scaled_dot_product_attention(*_heads_first(q, k, v), attn_mask=mask).transpose(1, 2)
        return (out.masked_fill(blind, 0.0) * gate,)

    q, k, v, _ = case.inputs
    return Built(call=call, note=sdpa_backend(*_heads_first(q, k, v), mask))


def _flex(case: Case, *, block: int, build_mask: bool) -> Built:
    """B4: FlexAttention under a block mask; with `build_mask` the mask is made anew in every call."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    on_gpu = case.device.type == "cuda"
    index_BT, latents = _index(case), case.attention.latents
    keys = case.attention.images * latents

    def visible(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return index_BT[b, row] == key // latents + 1

    # Compiled, neither the mask of booleans nor the scores are ever whole in memory.
    create: Any = torch.compile(create_block_mask, dynamic=False) if on_gpu else create_block_mask
    # Untuned, sm_90's backward knows tiles of 128 keys alone, which do not fit into mask blocks of 64.
    attend: Any = compile_(flex_attention, case.device, tuned=True) if on_gpu else flex_attention
    make = partial(
        create, visible, case.attention.batch, None, case.attention.rows, keys,
        device=case.device.type, BLOCK_SIZE=block,
    )  # fmt: skip
    ready = make()

    def call(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> tuple[Tensor]:
        out = attend(*_heads_first(q, k, v), block_mask=make() if build_mask else ready)
        return (out.transpose(1, 2) * gate,)

    why = "" if on_gpu else "FlexAttention has no backward on a CPU"
    return Built(call=call, note="" if on_gpu else "not compiled", forward_only=why)


def varlen(case: Case, *, holes: bool) -> Built:
    """B5: FlashAttention-2 over segments; rows without an image are packed away, or segments without keys."""
    if case.device.type != "cuda":
        raise LeftOutError("varlen_attn is FlashAttention-2, which needs CUDA")
    if case.dtype not in (torch.float16, torch.bfloat16):
        raise LeftOutError(f"varlen_attn takes fp16 and bf16, not {case.dtype}")
    from torch.nn.attention.varlen import varlen_attn

    index = _index(case).flatten()
    lengths, keys = segments(case, holes=holes)
    full = holes or bool((index > 0).all())
    if holes and bool((index > 0).all()):
        raise LeftOutError("every row sees an image: the same as B5 with packing")
    if not holes and max(lengths, default=0) == 0:
        raise LeftOutError("no row sees an image: there is nothing to pack")
    rows = (index > 0).nonzero()[:, 0]
    cu_q, cu_k = (
        torch.tensor([0, *x], device=case.device).cumsum(0).to(torch.int32) for x in (lengths, keys)
    )
    longest, latents = max(lengths), case.attention.latents

    def call(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> tuple[Tensor]:
        flat = q.flatten(0, 1)
        packed = flat if full else flat.index_select(0, rows)
        out = varlen_attn(packed, k.flatten(0, 2), v.flatten(0, 2), cu_q, cu_k, longest, latents)
        assert isinstance(out, Tensor), "varlen_attn returned more than its output"
        if not full:
            out = torch.zeros_like(flat).index_copy(0, rows, out)
        return (out.view_as(q) * gate,)

    return Built(call=call, note="no packing needed" if full else "packed and unpacked in the call")


def segments(case: Case, *, holes: bool) -> tuple[list[int], list[int]]:
    """Return rows and keys of each segment of the flattened batch.

    Args:
        case: of cross-attention.
        holes: whether rows without an image make segments of their own, which have no keys.
    """
    shape, lengths, keys = case.attention, [], []
    at = 0
    for start, end in shape.spans():
        if holes and start > at:
            lengths.append(start - at)
            keys.append(0)
        lengths.append(end - start)
        keys.append(shape.latents)
        at = max(at, end)
    if holes and at < shape.rows:
        lengths.append(shape.rows - at)
        keys.append(0)
    return lengths * shape.batch, keys * shape.batch


def _padded(case: Case) -> Built:
    """B6: one batch row an image, padded to the longest span, under SDPA without a mask."""
    shape = case.attention
    lengths = [end - start for start, end in shape.spans()]
    longest, images = max(lengths), shape.batch * shape.images
    if longest == 0:
        raise LeftOutError("no row sees an image: there is nothing to pad")
    even = sum(lengths) == shape.rows and min(lengths) == longest
    slot_of_row, row_of_slot = [], []
    for sample in range(shape.batch):
        for image, (start, end) in enumerate(shape.spans()):
            first = (sample * shape.images + image) * longest
            slot_of_row += list(range(first, first + end - start))
            row_of_slot += list(range(sample * shape.rows + start, sample * shape.rows + end))
    slots, rows = (torch.tensor(x, device=case.device) for x in (slot_of_row, row_of_slot))

    def attend(slotted: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = slotted.transpose(1, 2), k.flatten(0, 1).transpose(1, 2), v.flatten(0, 1).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def call(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> tuple[Tensor]:
        if even:
            return (attend(q.reshape(images, longest, *q.shape[2:]), k, v).reshape(q.shape) * gate,)
        flat = q.flatten(0, 1)
        padded = flat.new_zeros(images * longest, *flat.shape[1:]).index_copy(
            0, slots, flat.index_select(0, rows)
        )
        out = attend(padded.view(images, longest, *flat.shape[1:]), k, v).flatten(0, 1)
        out = torch.zeros_like(flat).index_copy(0, rows, out.index_select(0, slots))
        return (out.view_as(q) * gate,)

    note = (
        "spans are equal: a view, no padding" if even else f"padded to {longest} rows, gathered in the call"
    )
    return Built(call=call, note=note)


def _triton(case: Case) -> Built:
    check_launch(case)
    index_BT = _index(case)

    def call(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> tuple[Tensor]:
        return (gated_xattn(q, k, v, index_BT, gate, implementation="triton"),)

    return Built(call=call)


def _index(case: Case) -> Tensor:
    """Return the case's [B, T] index."""
    assert case.index_BT is not None, "a case of cross-attention has an index"
    return case.index_BT


def _visible(case: Case) -> Tensor:
    """Return bool [B, 1, T, M * R]."""
    shape = case.attention
    image = torch.arange(shape.images * shape.latents, device=case.device) // shape.latents + 1
    return _index(case)[:, None, :, None] == image


def _heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [B, T, H, K] as [B, H, T, K], and k, v [B, M, R, H, K] as [B, H, M * R, K]."""
    return q.transpose(1, 2), k.flatten(1, 2).transpose(1, 2), v.flatten(1, 2).transpose(1, 2)


def _backend(case: Case) -> str:
    return "inductor" if case.device.type == "cuda" else "aot_eager"


CONTENDERS = (
    Contender(name="triton", build=_triton, ours=True),
    Contender(name="B0 eager", build=partial(_openflamingo, compiled=False)),
    Contender(name="B1 eager additive", build=_idefics),
    Contender(name="B2 compiled B0", build=partial(_openflamingo, compiled=True), compiled=True),
    Contender(name="B3 SDPA mask", build=_sdpa),
    Contender(name="B4 Flex 64", build=partial(_flex, block=64, build_mask=False), compiled=True),
    Contender(name="B4 Flex 128", build=partial(_flex, block=128, build_mask=False), compiled=True),
    Contender(
        name="B4 Flex 128, mask built", build=partial(_flex, block=128, build_mask=True), compiled=True
    ),
    Contender(name="B4 Flex 64, mask built", build=partial(_flex, block=64, build_mask=True), compiled=True),
    Contender(name="B5 varlen FA2", build=partial(varlen, holes=False)),
    Contender(name="B5 varlen FA2, empty segments", build=partial(varlen, holes=True)),
    Contender(name="B6 padded SDPA", build=_padded),
)
"""In the order in which they are run: ours first, so that a short budget never times baselines alone."""
