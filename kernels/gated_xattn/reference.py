"""Image-causal gated cross-attention in plain PyTorch (paper sections 2.2 and 2.3)."""

import torch
from torch import Tensor

from kernels.sdpa import attention

GROUPED_ROWS_LIMIT = 0.6
"""Group the rows by medium while the longest group has at most this share of the text rows.

Grouping skips the score tiles of other media but pads every group to the longest. Measured on one CPU core
at B4 T256 M5 R64 H9 K64, forward and backward: equal groups 14 ms against 37 ms with a dense mask, one group
with 200 of 256 rows 39 ms against 36 ms.
"""


def gated_xattn(
    q_BTHK: Tensor,
    k_BMRHK: Tensor,
    v_BMRHK: Tensor,
    media_index_BT: Tensor,
    gate: Tensor | None,
    *,
    attend_all: bool = False,
) -> Tensor:
    """Each text row attends to the latents of its own medium alone; the result is multiplied by `gate`.

    Scores are scaled by 1/sqrt(K). A row with media index 0 comes out as exactly zero and gives no gradient.
    Media that no row sees (padding slots) must hold finite values, and then have no influence.

    Args:
        q_BTHK: [B, T, H, K] queries of the text rows, floating.
        k_BMRHK: [B, M, R, H, K] keys of the latents, dtype of the queries.
        v_BMRHK: [B, M, R, H, K] values of the latents, dtype of the queries.
        media_index_BT: [B, T] integer; m in 1..M sees medium m - 1 of axis M, 0 sees nothing.
        gate: 0-dim tensor, already squashed (tanh), dtype of the queries; None multiplies by nothing.
        attend_all: a row sees every medium up to its own (an ablation of the paper) instead of its own alone.

    Returns:
        [B, T, H, K] in the queries' dtype.

    Raises:
        ValueError: shapes that do not fit, or a media index outside 0..M. Indices on an accelerator are not
            read back (that would stall it); a row whose index is out of range sees nothing there.
    """
    check_shapes(q_BTHK, k_BMRHK, v_BMRHK, media_index_BT, gate)
    values_known = values_are_known(media_index_BT)
    media = k_BMRHK.shape[1]
    if values_known:
        check_media_index(media_index_BT, media)
    if media == 0:
        # Zeros that stay in the graph: whatever a batch holds, the same backward collectives must run.
        out_BTHK = torch.where(
            torch.zeros_like(q_BTHK, dtype=torch.bool), q_BTHK, k_BMRHK.sum() + v_BMRHK.sum()
        )
        return out_BTHK if gate is None else out_BTHK * gate
    longest = _longest_group(media_index_BT, media) if values_known and media > 1 and not attend_all else 0
    if 0 < longest <= GROUPED_ROWS_LIMIT * q_BTHK.shape[1]:
        out_BTHK = _grouped(q_BTHK, k_BMRHK, v_BMRHK, media_index_BT, longest)
    else:
        out_BTHK = _dense(q_BTHK, k_BMRHK, v_BMRHK, media_index_BT, attend_all=attend_all)
    return out_BTHK if gate is None else out_BTHK * gate


def check_media_index(media_index_BT: Tensor, media: int) -> None:
    """Raise `ValueError` if an index of `media_index_BT` ([B, T], integer) is outside 0..`media`."""
    if media_index_BT.numel() == 0:
        return
    low, high = (int(bound) for bound in media_index_BT.aminmax())
    if low < 0 or high > media:
        raise ValueError(
            f"media_index_BT holds values from {low} to {high}, but this batch has {media} media slots, so 0 "
            f"(sees nothing) to {media} are allowed. Point surplus <image> tags at 0 when building the batch."
        )


def naive(
    q_BTHK: Tensor,
    k_BMRHK: Tensor,
    v_BMRHK: Tensor,
    media_index_BT: Tensor,
    gate: Tensor | None,
    *,
    attend_all: bool = False,
) -> Tensor:
    """`gated_xattn` as a loop over rows and heads, to be read beside the paper; for tests.

    Args and result: as `gated_xattn`, [B, T, H, K].
    """
    batch, rows, heads, width = q_BTHK.shape
    out_rows = []
    for b in range(batch):
        for t in range(rows):
            index = int(media_index_BT[b, t])
            first = 0 if attend_all else max(index - 1, 0)
            for h in range(heads):
                k_JK = k_BMRHK[b, first:index, :, h].reshape(-1, width)
                v_JK = v_BMRHK[b, first:index, :, h].reshape(-1, width)
                if index == 0:
                    out_rows.append(torch.zeros_like(q_BTHK[b, t, h]))
                else:
                    scores_J = k_JK @ q_BTHK[b, t, h] / width**0.5
                    out_rows.append(torch.softmax(scores_J, dim=0) @ v_JK)
    out_BTHK = torch.stack(out_rows).view(batch, rows, heads, width)
    return out_BTHK if gate is None else out_BTHK * gate


def values_are_known(tensor: Tensor) -> bool:
    """Whether reading `tensor` (any shape) is possible and free: a plain CPU tensor, not traced or fake."""
    return tensor.device.type == "cpu" and type(tensor) is Tensor and not torch.compiler.is_compiling()


def check_shapes(
    q_BTHK: Tensor, k_BMRHK: Tensor, v_BMRHK: Tensor, media_index_BT: Tensor, gate: Tensor | None
) -> None:
    """Raise `ValueError` unless the shapes fit together: those of `gated_xattn`."""
    if q_BTHK.dim() != 4:
        raise ValueError(f"queries are {tuple(q_BTHK.shape)}; they must be [B, T, H, K].")
    b, t, h, k = q_BTHK.shape
    if k_BMRHK.dim() != 5 or k_BMRHK.shape != v_BMRHK.shape or k_BMRHK.shape[::3] != (b, h):
        raise ValueError(
            f"keys {tuple(k_BMRHK.shape)} and values {tuple(v_BMRHK.shape)} must both be [B, M, R, H, K] "
            f"with the B, H, K of the queries [B, T, H, K] = {tuple(q_BTHK.shape)}."
        )
    if k_BMRHK.shape[4] != k:
        raise ValueError(
            f"keys have heads of width {k_BMRHK.shape[4]}, queries of width {k}; they must agree."
        )
    if media_index_BT.shape != (b, t):
        raise ValueError(
            f"media_index_BT is {tuple(media_index_BT.shape)}; it must be [B, T] = {(b, t)}, one index a row."
        )
    if media_index_BT.dtype.is_floating_point:
        raise ValueError(f"media_index_BT is {media_index_BT.dtype}; it must be an integer dtype.")
    if gate is not None and gate.dim() != 0:
        raise ValueError(
            f"gate is {tuple(gate.shape)}; pass a 0-dim tensor, or None and apply a vector gate yourself."
        )


def _longest_group(media_index_BT: Tensor, media: int) -> int:
    """Return the number of rows of the medium that the most rows see, over the whole batch."""
    counts = torch.bincount(
        _group(media_index_BT, media).flatten(), minlength=media_index_BT.shape[0] * media + 1
    )
    return int(counts[:-1].max())


def _group(media_index_BT: Tensor, media: int) -> Tensor:
    """Return int64 [B, T]: b * M + m for a row of sample b that sees medium m, B * M for no medium."""
    batch = media_index_BT.shape[0]
    offset_B1 = torch.arange(batch, device=media_index_BT.device).unsqueeze(1) * media
    return (media_index_BT + offset_B1 - 1).masked_fill(media_index_BT == 0, batch * media)


def _grouped(
    q_BTHK: Tensor, k_BMRHK: Tensor, v_BMRHK: Tensor, media_index_BT: Tensor, longest: int
) -> Tensor:
    """Attention of each medium with its own rows, gathered and padded to `longest`: [B, T, H, K]."""
    batch, rows, heads, width = q_BTHK.shape
    media = k_BMRHK.shape[1]
    out_AHK = q_BTHK.new_zeros(batch * rows, heads, width)
    sorted_group_A, row_A = _group(media_index_BT, media).flatten().sort(stable=True)
    counts = torch.bincount(sorted_group_A, minlength=batch * media + 1)
    seeing = int(counts[:-1].sum())
    group_A, row_A = sorted_group_A[:seeing], row_A[:seeing]
    slot_A = group_A * longest + torch.arange(seeing) - (counts.cumsum(0) - counts)[group_A]
    q_flat = q_BTHK.reshape(batch * rows, heads, width)[row_A]
    q_slots = q_BTHK.new_zeros(batch * media * longest, heads, width).index_copy(0, slot_A, q_flat)
    out_slots = attention(
        q_slots.view(batch * media, longest, heads, width).transpose(1, 2),
        k_BMRHK.flatten(0, 1).transpose(1, 2),
        v_BMRHK.flatten(0, 1).transpose(1, 2),
    )
    out_slots = out_slots.transpose(1, 2).reshape(batch * media * longest, heads, width)
    return out_AHK.index_copy(0, row_A, out_slots[slot_A]).view_as(q_BTHK)


def _dense(
    q_BTHK: Tensor, k_BMRHK: Tensor, v_BMRHK: Tensor, media_index_BT: Tensor, *, attend_all: bool
) -> Tensor:
    """Attention over all latents of the sample under a boolean mask: [B, T, H, K]. No value is read back."""
    media, latents = k_BMRHK.shape[1:3]
    index_BT1 = media_index_BT.unsqueeze(-1)
    medium_M = torch.arange(1, media + 1, device=media_index_BT.device)
    seen_BT1 = (index_BT1 > 0) & (index_BT1 <= media)
    mask = None
    if media > 1:
        visible_BTM = (medium_M <= index_BT1) if attend_all else (medium_M == index_BT1)
        # What a fully masked row gives, forward and backward, differs between backends (zeros, the mean of
        # all values, NaN). So there is none: a row that sees nothing attends to everything and is replaced.
        mask = (visible_BTM | ~seen_BT1).repeat_interleave(latents, dim=-1).unsqueeze(1)
    out_BHTK = attention(
        q_BTHK.transpose(1, 2),
        k_BMRHK.flatten(1, 2).transpose(1, 2),
        v_BMRHK.flatten(1, 2).transpose(1, 2),
        mask=mask,
    )
    return torch.where(seen_BT1.unsqueeze(-1), out_BHTK.transpose(1, 2), 0.0)
