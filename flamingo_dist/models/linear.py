"""Tensor-parallel linear layers: megatron-core's, tagged for initialisation; they also run in one process.

megatron-core's layers need a process group even at size 1 (their all-reduce asserts one). The subclasses here
take `torch.nn.functional.linear` when the tensor-parallel group has one rank or `torch.distributed` is not
initialised, so that the same network runs in a notebook, on the meta device and under tensor parallelism.
"""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce
from torch.nn import functional as F

from flamingo_dist.models.init import tag, tag_of
from flamingo_dist.models.lm_config import MatrixProducts, WeightStorage
from flamingo_dist.models.quantised import QuantisedWeight


def tp_size() -> int:
    """Return the size of the tensor-parallel group, 1 if Megatron's groups are not initialised."""
    if not torch.distributed.is_initialized() or not parallel_state.is_initialized():
        return 1
    return int(parallel_state.get_tensor_model_parallel_world_size())


def tp_share(total: int, what: str) -> int:
    """Return this rank's even share of `total` units over the tensor-parallel group.

    Args:
        total: number of units, e.g. attention heads.
        what: their name, for the error.

    Raises:
        ValueError: the group's size does not divide `total`.
    """
    size = tp_size()
    if total % size:
        raise ValueError(
            f"{what} = {total} cannot be split over tensor-parallel size {size}; "
            "choose a size that divides it."
        )
    return total // size


def parallel_config(dtype: torch.dtype) -> ModelParallelConfig:
    """Return megatron-core's configuration for layers of `dtype` that are built empty on the current device.

    `use_cpu_initialization` means "where torch's default device says" in megatron-core, so it also serves the
    meta device and, under `with torch.device("cuda")`, a GPU.
    """
    return ModelParallelConfig(
        tensor_model_parallel_size=tp_size(),
        params_dtype=dtype,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        sequence_parallel=False,
    )


class ColumnLinear(ColumnParallelLinear):
    """megatron-core's `ColumnParallelLinear` that needs no process group at tensor-parallel size 1.

    Same constructor and the same `(output, bias or None)` result, so it also fits a megatron-core layer spec.
    """

    # megatron-core's None entries would put a "..._extra_state" key beside every weight of a checkpoint.
    get_extra_state = nn.Module.get_extra_state
    quantised: QuantisedWeight | None
    """In place of `weight`, where the layer is frozen and stored so (`quantise_`)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_module("quantised", None)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Map input_ of shape [..., in] to shape [..., out / tp size]."""
        if self.quantised is not None:
            x = input_ if self.disable_grad_reduce else sum_grad_over_tp(input_)
            return _with_bias(self, self.quantised(x))
        if torch.compiler.is_compiling():
            x = input_ if self.disable_grad_reduce else sum_grad_over_tp(input_)
            bias = None if self.skip_bias_add else self.bias
            return F.linear(x, self.weight, bias), self.bias if self.skip_bias_add else None
        cut = self.output_size_per_partition != self.output_size
        if cut and not self.weight.requires_grad:
            return _with_bias(self, linear(input_, self.weight, sum_grad=not self.disable_grad_reduce))
        if cut or args or kwargs:
            output, skipped = super().forward(_three_axes(input_), *args, **kwargs)
            return output.view(*input_.shape[:-1], output.shape[-1]), skipped
        bias = None if self.skip_bias_add else self.bias
        return linear(input_, self.weight, bias), self.bias if self.skip_bias_add else None


class RowLinear(RowParallelLinear):
    """megatron-core's `RowParallelLinear` that needs no process group at tensor-parallel size 1.

    Same constructor and the same `(output, bias or None)` result, so it also fits a megatron-core layer spec.
    """

    get_extra_state = nn.Module.get_extra_state
    quantised: QuantisedWeight | None
    """In place of `weight`, where the layer is frozen and stored so (`quantise_`)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_module("quantised", None)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map input_ of shape [..., in / tp size] to shape [..., out], summed over the tensor-parallel group."""
        if self.quantised is not None:
            return _with_bias(self, sum_over_tp(self.quantised(input_)))
        cut = self.input_size_per_partition != self.input_size
        if torch.compiler.is_compiling() or (cut and not self.weight.requires_grad):
            return _with_bias(self, sum_over_tp(linear(input_, self.weight)))
        if cut:
            output, skipped = super().forward(_three_axes(input_))
            return output.view(*input_.shape[:-1], output.shape[-1]), skipped
        bias = None if self.skip_bias_add else self.bias
        return linear(input_, self.weight, bias), self.bias if self.skip_bias_add else None


def _with_bias(layer: ColumnLinear | RowLinear, output: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return output [..., out] and the bias, added or, where the layer says so, beside it."""
    if layer.skip_bias_add or layer.bias is None:
        return output, layer.bias if layer.skip_bias_add else None
    return output + layer.bias, None


def quantise_(
    layer: nn.Module, storage: WeightStorage, device: torch.device, *, products: MatrixProducts = "same"
) -> None:
    """Put a `QuantisedWeight` on `device` in the place of a frozen layer's weight; leave any other module as it is.

    A collective of the tensor-parallel group, which goes through its modules in one order.

    Raises:
        ValueError: the weight has values that are not finite, or fp8 products cannot be had.
    """
    if not isinstance(layer, ColumnLinear | RowLinear) or layer.weight.requires_grad:
        return
    inputs_cut = tag_of(layer.weight).partition_dim == 1
    weight = layer.weight.detach().to(device)
    del layer.weight
    layer.quantised = QuantisedWeight(weight, storage, inputs_cut=inputs_cut, products=products)


def _three_axes(x: Tensor) -> Tensor:
    """Return [..., in] as [N, 1, in]: megatron-core's weight gradient takes two or three axes alone."""
    return x.reshape(-1, 1, x.shape[-1]) if x.dim() > 3 else x


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, sum_grad: bool = False) -> Tensor:
    """Map x [..., in] by weight [out, in] and bias [out] to shape [..., out]; autograd keeps no view of the weight.

    `F.linear` keeps a view of the weight, which holds the memory that ZeRO-3 gathered into after ZeRO-3 has let it go:
    without recomputation all weights of the network stood there at the end of the forward. This keeps the parameter,
    whose values are back when its backward runs.

    Args:
        x: [..., in].
        weight: [out, in], a parameter or a buffer.
        bias: [out] or None.
        sum_grad: sum the gradient of x over the tensor-parallel group, in its place.
    """
    kept = isinstance(weight, nn.Parameter) or sum_grad
    if not kept or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    product: Tensor = _Linear.apply(x, weight, bias, sum_grad)
    return product


def column_linear(
    in_features: int,
    out_features: int,
    *,
    std: float = 0.02,
    bias: bool = False,
    sum_input_grad: bool = True,
    dtype: torch.dtype = torch.float32,
) -> ColumnLinear:
    """Build a linear layer whose output is split over the tensor-parallel group.

    Args:
        in_features: width of the input, whole on every rank.
        out_features: width of the output over all ranks.
        std: standard deviation of the weight's initial values.
        bias: add a bias, split as the output is and initially zero.
        sum_input_grad: sum the input's gradient over the group. False where the caller has passed the input
            through `sum_grad_over_tp`, which pays for one sum when several layers share an input.
        dtype: dtype of the parameters.

    Returns:
        a layer that returns `(output, None)`.

    Raises:
        ValueError: the tensor-parallel size does not divide `out_features`.
    """
    tp_share(out_features, "out_features")
    layer = ColumnLinear(
        in_features,
        out_features,
        config=parallel_config(dtype),
        init_method=_no_init,
        bias=bias,
        gather_output=False,
        disable_grad_reduce=not sum_input_grad,
    )
    tag(layer.weight, std=std, partition_dim=0)
    if bias:
        tag(layer.bias, partition_dim=0)
    return layer


def row_linear(
    in_features: int,
    out_features: int,
    *,
    std: float = 0.02,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
) -> RowLinear:
    """Build a linear layer whose input is split over the tensor-parallel group and whose output is whole.

    Args:
        in_features: width of the input over all ranks.
        out_features: width of the output, whole on every rank.
        std: standard deviation of the weight's initial values.
        bias: add a bias, whole on every rank and initially zero.
        dtype: dtype of the parameters.

    Returns:
        a layer that returns `(output, None)`.

    Raises:
        ValueError: the tensor-parallel size does not divide `in_features`.
    """
    tp_share(in_features, "in_features")
    layer = RowLinear(
        in_features,
        out_features,
        config=parallel_config(dtype),
        init_method=_no_init,
        bias=bias,
        input_is_parallel=True,
        skip_bias_add=False,
    )
    tag(layer.weight, std=std, partition_dim=1)
    if bias:
        tag(layer.bias)
    return layer


def replicated_linear(
    in_features: int,
    out_features: int,
    *,
    std: float = 0.02,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
) -> nn.Linear:
    """Build a layer [..., in] to [..., out] that every tensor-parallel rank holds and computes whole."""
    layer = _EmptyLinear(in_features, out_features, bias=bias, dtype=dtype)
    tag(layer.weight, std=std)
    if isinstance(layer.bias, nn.Parameter):
        tag(layer.bias)
    return layer


def fan_in_std(fan_in: int) -> float:
    """Return 1 / sqrt(3 * fan_in), the standard deviation of `nn.Linear`'s own initial weights."""
    return float((3.0 * fan_in) ** -0.5)


def sum_grad_over_tp(x: Tensor) -> Tensor:
    """Return `x` (any shape); its gradient is summed over the tensor-parallel group.

    For what every rank holds whole but uses for its own share of the heads alone: each rank's gradient is
    then only a part. megatron-core's function of this kind is not used because it drops the sum of a
    gradient that is not contiguous and writes into one that may be shared.
    """
    if tp_size() == 1:
        return x
    traced = torch.compiler.is_compiling()
    summed: Tensor = _TracedSumGrad.apply(x) if traced else _SumGradOverTP.apply(x)
    return summed


def sum_over_tp(x: Tensor) -> Tensor:
    """Return the sum of `x` (any shape) over the tensor-parallel group; its gradient passes as it is.

    In compiled code the sum is a functional collective: of the in-place ones that megatron-core's layers run,
    torch.compile makes a graph break each. Inductor writes it in place where nobody reads the summands.
    """
    if tp_size() == 1:
        return x
    traced = torch.compiler.is_compiling()
    summed: Tensor = _TracedSum.apply(x) if traced else reduce_from_tensor_model_parallel_region(x)
    return summed


class _EmptyLinear(nn.Linear):
    """`nn.Linear` left empty, as the parallel layers are.

    Not `nn.utils.skip_init`: that moves the weight to the CPU whatever the default device is.
    """

    weight: nn.Parameter

    def reset_parameters(self) -> None:
        """Do nothing: filling is the run's, by name and seed."""

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        return linear(input, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    """`linear` where autograd keeps the weight.

    Frozen weights under tensor parallelism come here instead of to megatron-core's function of this kind, which makes
    its weight a saved tensor: each block's recomputation then ran its last product for it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sum_grad: bool) -> Tensor:
        """Return [..., out]."""
        ctx.sum_grad = sum_grad
        rows = x.reshape(-1, x.shape[-1])
        # A frozen weight is no saved tensor: recomputation, which runs until it has the last of those, need not run the
        # last product of a block for it.
        ctx.shape, ctx.frozen = x.shape, None if weight.requires_grad else weight
        ctx.save_for_backward(*((rows, weight) if weight.requires_grad else ()))
        product = rows.mm(weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
        return product.view(*x.shape[:-1], weight.shape[0])  # there may be no row

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """Return the gradients of x [..., in], of the weight [out, in] and of the bias [out], where they are wanted."""
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        saved = ctx.saved_tensors  # read once: recomputation gives them once
        weight = saved[1] if of_weight else ctx.frozen
        grad = grads[0].reshape(-1, weight.shape[0])
        dx = grad.mm(weight).view(ctx.shape) if of_x else None
        if dx is not None and ctx.sum_grad:
            torch.distributed.all_reduce(dx, group=parallel_state.get_tensor_model_parallel_group())
        return (
            dx,
            grad.t().mm(saved[0]) if of_weight else None,
            grad.sum(0) if of_bias else None,
            None,
        )


class _SumGradOverTP(torch.autograd.Function):
    """Identity forward, all-reduce over the tensor-parallel group backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return a view of `x`."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Return the sum of the ranks' gradients."""
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(grad, group=parallel_state.get_tensor_model_parallel_group())
        return grad


class _TracedSum(torch.autograd.Function):
    """All-reduce over the tensor-parallel group forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return the sum of the ranks' `x`."""
        return _traced_all_reduce(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Return the gradient."""
        return grads[0]


class _TracedSumGrad(torch.autograd.Function):
    """`_SumGradOverTP` for torch.compile."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return a view of `x`."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Return the sum of the ranks' gradients."""
        return _traced_all_reduce(grads[0])


def _traced_all_reduce(x: Tensor) -> Tensor:
    group = parallel_state.get_tensor_model_parallel_group()
    summed: Tensor = all_reduce(x.contiguous(), "sum", group)
    return summed


def _no_init(weight: Tensor) -> None:
    """Stand in for megatron-core's initialisation, which is off."""
    raise AssertionError("perform_initialization is off: parameters are filled by flamingo_dist.models.init")
