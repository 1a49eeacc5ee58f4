"""Frozen matrices of one byte a value: int8 or fp8 codes with one scale an output channel.

Weight-only, unless products are asked for in fp8 (`fp8_product.py`): activations and gradients keep their dtype. The
codes become it where they are used, in the forward and again in the backward, so that no copy of a weight lives
between the two. Codes of both kinds are exact in bf16, and the scale multiplies the product, not the matrix: what is
computed is the product with `codes * scale`, which nobody makes.
"""

from collections.abc import Callable
from typing import Self

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn
from torch.nn import functional as F

from flamingo_dist.models.fp8_product import check_fp8_shape, fp8_product
from flamingo_dist.models.frozen_product import frozen_product
from flamingo_dist.models.lm_config import MatrixProducts, WeightStorage

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Largest code: what the largest value of a channel becomes."""
CODES: dict[WeightStorage, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""Dtype of the codes by the name of the storage."""
CHUNK = 1 << 18
"""Values quantised at a time, for small temporaries."""


class QuantisedWeight(nn.Module):
    """The matrix of a frozen linear layer on this rank, quantised; buffers outside of the state dict."""

    codes_OI: Tensor
    """int8 or float8_e4m3fn [O, I], this rank's part of the matrix."""
    scale_O: Tensor
    """fp32 [O], of each output channel: largest magnitude over all inputs of all ranks, over the largest code."""
    codes_IO: Tensor | None
    """The codes transposed, for fp8 products in the backward; None where products are in the run's dtype."""

    def __init__(
        self,
        weight_OI: Tensor,
        storage: WeightStorage,
        *,
        inputs_cut: bool,
        products: MatrixProducts = "same",
    ) -> None:
        """Quantise a matrix. A collective of the tensor-parallel group where the inputs are cut.

        Args:
            weight_OI: this rank's part of the matrix, floating [O, I].
            storage: "int8" or "fp8".
            inputs_cut: whether the group's ranks hold parts of the inputs. A channel's scale is that of the whole
                row, so that codes do not depend on the tensor-parallel degree.
            products: "same" for products in the activations' dtype, "fp8" for products of codes (storage "fp8").

        Raises:
            ValueError: a value is not finite, or fp8 matrix units do not take the matrix.
        """
        super().__init__()
        if products == "fp8":
            check_fp8_shape(*weight_OI.shape)
        dtype = CODES[storage]
        rows = max(1, CHUNK // weight_OI.shape[1])
        parts = weight_OI.detach().split(rows)
        peak_O = torch.cat([part.abs().amax(1).float() for part in parts])
        if inputs_cut and dist.is_initialized():
            group = parallel_state.get_tensor_model_parallel_group()
            dist.all_reduce(peak_O, op=dist.ReduceOp.MAX, group=group)
        if not bool(peak_O.isfinite().all()):
            raise ValueError(f"a weight has values that are not finite; {storage} cannot hold them.")
        scale_O = peak_O / LARGEST[dtype]
        scale_O = torch.where(scale_O >= torch.finfo(torch.float32).tiny, scale_O, 1.0)  # an empty channel
        codes_OI = torch.empty(weight_OI.shape, dtype=dtype, device=weight_OI.device)
        for part, scale, codes in zip(parts, scale_O.split(rows), codes_OI.split(rows), strict=True):
            scaled = part / scale[:, None]  # fp32
            if dtype == torch.int8:
                scaled.round_()
            codes.copy_(scaled.clamp_(-LARGEST[dtype], LARGEST[dtype]))
        self.register_buffer("codes_OI", codes_OI, persistent=False)
        self.register_buffer("scale_O", scale_O, persistent=False)
        codes_IO = codes_OI.t().contiguous() if products == "fp8" else None
        self.register_buffer("codes_IO", codes_IO, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the network to its device, but keep the dtypes: `module.bfloat16()` would undo the quantisation."""
        super()._apply(lambda tensor: tensor.to(fn(tensor[:0]).device), recurse)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Map x, floating of shape [..., I], to its product with the matrix: [..., O], dtype of x."""
        if self.codes_IO is not None:
            return fp8_product(x, self.codes_OI, self.codes_IO, self.scale_O)
        return _run_product(x, self.codes_OI, self.scale_O)

    def dequantised(self) -> Tensor:
        """Return the matrix that the products are with, fp32 [O, I]."""
        return self.codes_OI.float() * self.scale_O[:, None]


def _product(x: Tensor, codes_OI: Tensor, scale_O: Tensor) -> Tensor:
    return F.linear(x, codes_OI.to(x.dtype)).mul_(scale_O)


def _input_grad(grad: Tensor, codes_OI: Tensor, scale_O: Tensor) -> Tensor:
    # The fp32 scale is not rounded to the gradient's dtype, nor is there an fp32 copy of the gradient.
    scaled = torch.mul(grad, scale_O, out=torch.empty_like(grad))
    return torch.matmul(scaled, codes_OI.to(grad.dtype))


_run_product = frozen_product("quantised", _product, _input_grad)
