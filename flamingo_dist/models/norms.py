"""Norms of the new modules (arXiv v1 of the paper: LayerNorm on every attention and FFW input)."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flamingo_dist.models.init import tag
from flamingo_dist.models.linear import sum_grad_over_tp
from kernels.dispatch import Implementation
from kernels.dispatch_fused import add_layernorm

NormKind = Literal["layer", "rms", "layer_no_bias"]
"""LayerNorm, RMSNorm, or LayerNorm with a scale alone."""


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis, with tagged parameters.

    The result has the parameters' dtype: a branch that starts with a norm thereby runs in the dtype of its
    own parameters, whatever that of the frozen network around it.
    """

    def __init__(
        self, width: int, *, kind: NormKind, eps: float, per_head: bool, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        if kind not in get_args(NormKind):
            raise ValueError(f"norm={kind!r} is not known; choose one of {get_args(NormKind)}.")
        self.width = width
        self.kind = kind
        self.eps = eps
        self.per_head = per_head
        """Shared by all heads: under tensor parallelism a rank has its own heads' part of the gradient."""
        self.weight = tag(nn.Parameter(torch.empty(width, dtype=dtype)), value=1.0)
        bias = tag(nn.Parameter(torch.empty(width, dtype=dtype))) if kind == "layer" else None
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x of shape [..., width], any floating dtype; the result has the parameters' dtype."""
        x = x.to(self.weight.dtype)
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if self.per_head:
            weight = sum_grad_over_tp(weight)
            bias = None if bias is None else sum_grad_over_tp(bias)
        if self.kind == "rms":
            return F.rms_norm(x, (self.width,), weight, self.eps)
        return F.layer_norm(x, (self.width,), weight, bias, self.eps)

    def without_affine(self, x: Tensor) -> Tensor:
        """Normalise x of shape [..., width] without scale and shift; reads no parameter's values."""
        x = x.to(self.weight.dtype)
        if self.kind == "rms":
            return F.rms_norm(x, (self.width,), None, self.eps)
        return F.layer_norm(x, (self.width,), None, None, self.eps)

    def extra_repr(self) -> str:
        """Return what `print` shows."""
        return f"{self.width}, kind={self.kind}, eps={self.eps}, per_head={self.per_head}"


class AddNorm(Norm):
    """The residual addition that comes before a norm, and the norm, fused where there is a kernel for both."""

    def __init__(
        self,
        width: int,
        *,
        kind: NormKind,
        eps: float,
        implementation: Implementation = "auto",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(width, kind=kind, eps=eps, per_head=False, dtype=dtype)
        self.implementation = implementation

    def forward(  # type: ignore[override]
        self, x: Tensor, update: Tensor, gate: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Add a branch to the stream and normalise the sum.

        Args:
            x: stream of shape [..., width], floating.
            update: [..., width] result of a branch, dtype of the parameters.
            gate: [width] factor of each channel of the update, dtype of the parameters, or None.

        Returns:
            x + gate * update [..., width] in the dtype of `x`, and its norm [..., width] in the parameters'.
        """
        if self.bias is not None:
            return add_layernorm(
                x, update, self.weight, self.bias, gate, eps=self.eps, implementation=self.implementation
            )
        x = x + (update if gate is None else update * gate).to(x.dtype)
        return x, super().forward(x)


def build_norm(width: int, *, kind: NormKind, eps: float = 1e-5, dtype: torch.dtype = torch.float32) -> Norm:
    """Build a norm over the whole width of a stream."""
    return Norm(width, kind=kind, eps=eps, per_head=False, dtype=dtype)


def build_head_norm(
    head_dim: int, *, kind: NormKind, eps: float = 1e-5, dtype: torch.dtype = torch.float32
) -> Norm:
    """Build a norm over each head's width, one set of parameters for all heads (IDEFICS' qk norms)."""
    return Norm(head_dim, kind=kind, eps=eps, per_head=True, dtype=dtype)
