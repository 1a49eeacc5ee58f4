"""One rank of a large world in one process: fake groups, fake tensors, and what has to stand in for values.

A fake tensor has a shape, a dtype and a storage of the right size, but no values, and a fake group returns at once. So
whatever reads a value needs a stand-in; all of them are here:

- A number that is read back is 1 (AdamW's count of steps, our counts of all ranks' batches) and a condition True; a
  byte is 0 (DeepSpeed's flag of an overflow).
- DeepSpeed's gradient norm is valid: its check also asks whether the norm is below 0, and would be told True.
- DeepSpeed compares lists of module numbers among ranks when it has recorded the order of modules; there is no other
  rank to differ from, and the comparison, once a run, is not among the collectives.
- `Module.to` and the like change buffers alone: torch would swap every fake parameter for another, which fails.
- The implementations of attention and fused functions are the ones of a GPU, although the tensors say "cpu" (DeepSpeed
  without a GPU wants that): Triton's operators by their fake implementations, and no detour through fp32.
- Communication overlaps with computation in DeepSpeed's settings, as on a GPU.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from flamingo_dist.parallel.topology import Topology, destroy_groups, init_groups
from flamingo_dist.parallel.zero import deepspeed_config
from kernels import sdpa

aten = torch.ops.aten
VIEWS = (
    aten.slice.Tensor,
    aten.view.default,
    aten.as_strided.default,
    aten.detach.default,
    aten.alias.default,
)

composite_rms_norm = F.rms_norm
READ_BACK = {torch.bool: True, torch.uint8: 0}


class Values(TorchDispatchMode):
    """Answers for values that fake tensors do not have."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False, as `Ledger` does."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func`, or stand in for it."""
        if func is aten._local_scalar_dense.default:
            return READ_BACK.get(args[0].dtype, 1)
        if func in VIEWS and isinstance(args[0], FakeTensor):
            return _view(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_rank(topology: Topology, *, like_gpu: bool) -> Iterator[None]:
    """Be one rank of `topology`, whose other ranks do not exist, with tensors that hold no values.

    Args:
        topology: the world and this rank's place.
        like_gpu: take the implementations of a GPU; otherwise those of CPU tensors, as a real run here would.

    Raises:
        RuntimeError: torch.distributed is initialised already.
    """
    if dist.is_initialized():
        raise RuntimeError("torch.distributed is initialised in this process; a dry run needs its own.")
    with ExitStack() as stack:
        place = {"RANK": str(topology.rank), "WORLD_SIZE": str(topology.world), "LOCAL_RANK": "0"}
        stack.enter_context(patch.dict(os.environ, place))
        dist.init_process_group("fake", store=FakeStore(), rank=topology.rank, world_size=topology.world)
        stack.callback(dist.destroy_process_group)
        init_groups(topology)
        stack.callback(destroy_groups)
        for target, stand_in in _stand_ins(like_gpu).items():
            stack.enter_context(patch(target, stand_in))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(Values())
        yield


def _view(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return a view of a fake tensor, without `FakeTensorMode`'s detour through Python.

    ZeRO-3 makes one a rank for each parameter that it gathers or scatters, each at another offset: they were most of a
    dry run's time.
    """
    whole: FakeTensor = args[0]
    with in_kernel_invocation_manager(whole.fake_mode):
        seen = func(*args, **kwargs)
    return FakeTensor(whole.fake_mode, seen, whole.fake_device)


def _stand_ins(like_gpu: bool) -> dict[str, Any]:
    """Return what replaces which name."""
    coordinator = "deepspeed.runtime.zero.partitioned_param_coordinator"
    checks = ("zero.stage3", "zero.stage_1_and_2", "bf16_optimizer", "utils")
    found: dict[str, Any] = {
        **{f"deepspeed.runtime.{name}.is_invalid_grad_norm": lambda norm: False for name in checks},
        f"{coordinator}.assert_ints_same_as_other_ranks": lambda ints: None,
        "torch.nn.Module._apply": _apply,
    }
    if like_gpu:
        found |= dict.fromkeys(("kernels.dispatch.launches", "kernels.dispatch_fused.launches"), _launches)
        found["flamingo_dist.training.build.deepspeed_config"] = _overlapping
        here = [name for name, m in list(sys.modules.items()) if vars(m).get("attention") is sdpa.attention]
        found |= dict.fromkeys((f"{name}.attention" for name in here), _attention)
        found["torch.nn.functional.rms_norm"] = _rms_norm
    return found


def _apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Stand in for `torch.nn.Module._apply`, which swaps fake parameters even where nothing changes."""
    for child in module.children() if recurse else ():
        child._apply(fn)
    for name, param in module._parameters.items():
        if param is not None and fn(param) is not param:
            raise NotImplementedError(f"a dry run cannot convert the parameter {name}.")
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = fn(buffer)
    return module


def _launches(implementation: str, what: str, tensor: Tensor, reason: str | None) -> bool:
    """Stand in for `kernels.dispatch.launches`, as on a GPU."""
    return implementation != "reference" and reason is None


def _overlapping(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """Stand in for `parallel.zero.deepspeed_config`, as on a GPU."""
    config = deepspeed_config(*args, **kwargs)
    config["zero_optimization"]["overlap_comm"] = True
    return config


def _attention(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Stand in for `kernels.sdpa.attention`, as on a GPU: shapes as there."""
    gqa = q_BHTK.shape[1] != k_BGSK.shape[1]
    if mask is not None and mask.requires_grad and not gqa:
        # On a GPU one kernel gives a bias its gradient (seen on an H200); on a CPU it is products in fp32, one by one.
        scores = (*q_BHTK.shape[:3], k_BGSK.shape[2])
        out_BHTK, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q_BHTK, k_BGSK, v_BGSK, mask.expand(scores), True
        )
        return out_BHTK
    return F.scaled_dot_product_attention(
        q_BHTK, k_BGSK, v_BGSK, attn_mask=mask, is_causal=is_causal, enable_gqa=gqa
    )


class _FusedRMSNorm(torch.autograd.Function):
    """The shapes of torch's RMSNorm on a GPU, one kernel; on a CPU it is made of many, which keep fp32 copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        """Return an empty result like x [..., D]."""
        factor = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        ctx.save_for_backward(x, weight, factor)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return empty gradients."""
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


def _rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """Stand in for `torch.nn.functional.rms_norm` of x [..., D], as on a GPU: fused where the dtypes agree."""
    if weight is not None and weight.dtype != x.dtype:
        return composite_rms_norm(x, shape, weight, eps)
    result: Tensor = _FusedRMSNorm.apply(x, weight)
    return result
