"""torch's scaled dot-product attention, with a detour that CPUs need."""

import torch
from torch import Tensor
from torch.nn import functional as F


def attention(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Attend; G key/value heads each serve H / G query heads.

    On a CPU, half precision is computed in fp32: the backward of torch's bf16 kernel is 2.5 to 5 times slower
    than casting to fp32 and back (measured for 20 to 128 tokens on a core with AVX512-BF16, torch 2.13).

    Args:
        q_BHTK: queries, [B, H, T, K].
        k_BGSK: keys, [B, G, S, K].
        v_BGSK: values, [B, G, S, K].
        mask: broadcast to [B, H, T, S]; bool, True may attend, or floating, added to the scores.
        is_causal: row t sees keys up to t.

    Returns:
        [B, H, T, K] in the dtype of `q_BHTK`.
    """
    dtype = q_BHTK.dtype
    if q_BHTK.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
        q_BHTK, k_BGSK, v_BGSK = q_BHTK.float(), k_BGSK.float(), v_BGSK.float()
        mask = mask.float() if mask is not None and mask.is_floating_point() else mask
    out_BHTK = F.scaled_dot_product_attention(
        q_BHTK,
        k_BGSK,
        v_BGSK,
        attn_mask=mask,
        is_causal=is_causal,
        enable_gqa=bool(q_BHTK.shape[1] != k_BGSK.shape[1]),  # torch takes no symbolic truth
    )
    return out_BHTK.to(dtype)
