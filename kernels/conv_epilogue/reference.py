"""What follows a frozen convolution in plain PyTorch (NFNet: arXiv 2102.06171)."""

import torch
from torch import Tensor
from torch.nn import functional as F


def bias_gelu_(x_NCHW: Tensor, bias_C: Tensor) -> Tensor:
    """Return gelu(x + bias), in its tanh form, in the memory of `x_NCHW`.

    Args:
        x_NCHW: floating [N, C, H, W], overwritten.
        bias_C: [C].

    Returns:
        `x_NCHW`, [N, C, H, W].

    Raises:
        ValueError: shapes that do not fit.
    """
    check_shapes(x_NCHW, bias_C)
    return torch.ops.aten.gelu_(x_NCHW.add_(bias_C[:, None, None]), approximate="tanh")


def gated_residual_(
    residual_NCHW: Tensor,
    residual_bias_C: Tensor | None,
    y_NCHW: Tensor,
    bias_C: Tensor,
    gate_NC: Tensor,
    *,
    activate: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return out = (residual + residual_bias) + (y + bias) * gate, and gelu(out) in its tanh form.

    `y_NCHW` is given up, and `residual_NCHW` too where it has a bias: results may lie in their memory.

    Args:
        residual_NCHW: floating [N, C, H, W].
        residual_bias_C: [C], or None where nothing is to be added to the residual.
        y_NCHW: result of the branch's last convolution without its bias, [N, C, H, W].
        bias_C: that bias, [C].
        gate_NC: what multiplies each image's channels, [N, C].
        activate: whether gelu(out) is wanted.

    Returns:
        out [N, C, H, W] and gelu(out), of the same shape, or None.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_shapes(y_NCHW, bias_C, residual_NCHW, residual_bias_C, gate_NC)
    if residual_bias_C is not None:
        residual_NCHW = residual_NCHW.add_(residual_bias_C[:, None, None])
    y_NCHW = y_NCHW.add_(bias_C[:, None, None])
    # Neither autograd nor torch.compile takes `out`; a compiler finds by itself what memory is free.
    in_place = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    out_NCHW = torch.addcmul(
        residual_NCHW, y_NCHW, gate_NC[:, :, None, None], out=y_NCHW if in_place else None
    )
    return out_NCHW, F.gelu(out_NCHW, approximate="tanh") if activate else None


def naive_bias_gelu(x_NCHW: Tensor, bias_C: Tensor) -> Tensor:
    """`bias_gelu_` from its definition, [N, C, H, W] from the same and [C], nothing overwritten; for tests."""
    return _gelu(x_NCHW + bias_C.view(1, -1, 1, 1))


def naive_gated_residual(
    residual_NCHW: Tensor, residual_bias_C: Tensor | None, y_NCHW: Tensor, bias_C: Tensor, gate_NC: Tensor
) -> tuple[Tensor, Tensor]:
    """`gated_residual_` from its definition, nothing overwritten; for tests.

    Args and result: as `gated_residual_`, [N, C, H, W], [C] and [N, C].
    """
    branch = (y_NCHW + bias_C.view(1, -1, 1, 1)) * gate_NC[:, :, None, None]
    kept = residual_NCHW if residual_bias_C is None else residual_NCHW + residual_bias_C.view(1, -1, 1, 1)
    return kept + branch, _gelu(kept + branch)


def _gelu(x: Tensor) -> Tensor:
    """Return GELU's tanh form, any shape."""
    return 0.5 * x * (1.0 + torch.tanh((2.0 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def check_shapes(
    y_NCHW: Tensor,
    bias_C: Tensor,
    residual_NCHW: Tensor | None = None,
    residual_bias_C: Tensor | None = None,
    gate_NC: Tensor | None = None,
) -> None:
    """Raise `ValueError` unless the shapes are [N, C, H, W], [C], [N, C, H, W], [C] and [N, C]."""
    if y_NCHW.dim() != 4:
        raise ValueError(f"a grid of shape {tuple(y_NCHW.shape)}; pass [N, C, H, W].")
    images, channels = y_NCHW.shape[:2]
    for name, tensor, shape in (
        ("bias", bias_C, (channels,)),
        ("residual", residual_NCHW, y_NCHW.shape),
        ("residual_bias", residual_bias_C, (channels,)),
        ("gate", gate_NC, (images, channels)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}; it must be {tuple(shape)}.")
