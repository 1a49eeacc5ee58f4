"""Attention of the Perceiver Resampler in plain PyTorch (paper section 2.1 and appendix A.1.1)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.sdpa import attention


def perceiver_attn(
    q_NRHK: Tensor,
    k_feat_NJHK: Tensor,
    v_feat_NJHK: Tensor,
    k_lat_NRHK: Tensor,
    v_lat_NRHK: Tensor,
    feature_mask_NJ: Tensor | None = None,
) -> Tensor:
    """Latents attend to the visual features and to themselves under one softmax, scaled by 1/sqrt(K).

    Args:
        q_NRHK: [N, R, H, K] queries of the latents, floating.
        k_feat_NJHK: [N, J, H, K] keys of the features (J = frames * spatial features), dtype of the queries.
        v_feat_NJHK: [N, J, H, K] values of the features, dtype of the queries.
        k_lat_NRHK: [N, R, H, K] keys of the latents, dtype of the queries.
        v_lat_NRHK: [N, R, H, K] values of the latents, dtype of the queries.
        feature_mask_NJ: bool [N, J], False where a feature is padding; None if all are real. Latents are
            always seen, so no row is ever empty.

    Returns:
        [N, R, H, K] in the queries' dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_shapes(q_NRHK, k_feat_NJHK, v_feat_NJHK, k_lat_NRHK, v_lat_NRHK, feature_mask_NJ)
    mask = None
    if feature_mask_NJ is not None:
        mask = F.pad(feature_mask_NJ, (0, k_lat_NRHK.shape[1]), value=True)[:, None, None, :]
    out_NHRK = attention(
        q_NRHK.transpose(1, 2),
        torch.cat((k_feat_NJHK, k_lat_NRHK), dim=1).transpose(1, 2),
        torch.cat((v_feat_NJHK, v_lat_NRHK), dim=1).transpose(1, 2),
        mask=mask,
    )
    return out_NHRK.transpose(1, 2)


def naive(
    q_NRHK: Tensor,
    k_feat_NJHK: Tensor,
    v_feat_NJHK: Tensor,
    k_lat_NRHK: Tensor,
    v_lat_NRHK: Tensor,
    feature_mask_NJ: Tensor | None = None,
) -> Tensor:
    """`perceiver_attn` as a loop over media, latents and heads; for tests.

    Args and result: as `perceiver_attn`, [N, R, H, K].
    """
    media, latents, heads, width = q_NRHK.shape
    out_rows = []
    for n in range(media):
        kept = slice(None) if feature_mask_NJ is None else feature_mask_NJ[n].nonzero().flatten()
        for r in range(latents):
            for h in range(heads):
                k_JK = torch.cat((k_feat_NJHK[n, kept, h], k_lat_NRHK[n, :, h]))
                v_JK = torch.cat((v_feat_NJHK[n, kept, h], v_lat_NRHK[n, :, h]))
                out_rows.append(torch.softmax(k_JK @ q_NRHK[n, r, h] / width**0.5, dim=0) @ v_JK)
    return torch.stack(out_rows).view(media, latents, heads, width)


def check_shapes(
    q_NRHK: Tensor,
    k_feat_NJHK: Tensor,
    v_feat_NJHK: Tensor,
    k_lat_NRHK: Tensor,
    v_lat_NRHK: Tensor,
    feature_mask_NJ: Tensor | None,
) -> None:
    """Raise `ValueError` unless the shapes fit together."""
    if q_NRHK.dim() != 4 or k_feat_NJHK.dim() != 4:
        raise ValueError(
            f"queries {tuple(q_NRHK.shape)} must be [N, R, H, K] and features {tuple(k_feat_NJHK.shape)} [N, J, H, K]."
        )
    n, _, h, k = q_NRHK.shape
    if not q_NRHK.shape == k_lat_NRHK.shape == v_lat_NRHK.shape:
        raise ValueError(
            f"queries {tuple(q_NRHK.shape)}, latent keys {tuple(k_lat_NRHK.shape)} and latent values "
            f"{tuple(v_lat_NRHK.shape)} must have one shape [N, R, H, K]."
        )
    j = k_feat_NJHK.shape[1]
    if not k_feat_NJHK.shape == v_feat_NJHK.shape == (n, j, h, k):
        raise ValueError(
            f"feature keys {tuple(k_feat_NJHK.shape)} and values {tuple(v_feat_NJHK.shape)} must both be "
            f"[N, J, H, K] with the N, H, K of the queries {tuple(q_NRHK.shape)}."
        )
    if feature_mask_NJ is not None and (
        feature_mask_NJ.shape != (n, j) or feature_mask_NJ.dtype != torch.bool
    ):
        raise ValueError(
            f"feature_mask_NJ is {feature_mask_NJ.dtype} {tuple(feature_mask_NJ.shape)}; "
            f"it must be bool [N, J] = {(n, j)}."
        )
