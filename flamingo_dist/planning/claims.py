"""Whose storage is whose: the weights, gradients and optimizer state of a built engine, for a ledger."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from flamingo_dist.planning.ledger import Ledger

# Attributes of DeepSpeed's optimizers (stage 3; 1 and 2; bf16 without ZeRO; fp16's base) that hold state.
STATE = {
    "lp_param_buffer": "trainable",
    "fp16_partitioned_groups_flat": "trainable",
    "bit16_groups_flat": "trainable",
    "bf16_groups_flat": "trainable",
    "fp32_partitioned_groups_flat": "optimizer",
    "single_partition_of_fp32_groups": "optimizer",
    "fp32_groups_flat_partition": "optimizer",
    "fp32_groups_flat": "optimizer",
    "grad_partitions_flat_buffer": "gradients",
    "averaged_gradients": "gradients",
    "all_grad_tensors": "gradients",
    "fp32_groups_gradients_flat": "gradients",
}


def claim(ledger: Ledger, engine: Any) -> None:
    """Tell `ledger` what the storages that `engine` owns are for."""
    module: nn.Module = engine.module
    optimizer = engine.optimizer
    for name, kind in STATE.items():
        for tensor in _tensors(getattr(optimizer, name, None)):
            ledger.mark(tensor, kind)
    inner = getattr(optimizer, "optimizer", optimizer)
    for state in inner.state.values():
        for tensor in _tensors(state):
            ledger.mark(tensor, "optimizer")
    for name, buffer in module.named_buffers():
        ledger.mark(buffer, "vision" if name.startswith("vision.") else "frozen")
    for name, param in module.named_parameters():
        kind = "trainable" if param.requires_grad else "vision" if name.startswith("vision.") else "frozen"
        held = getattr(param, "ds_tensor", None)
        ledger.mark(param if held is None else held, kind)
        if param.grad is not None:
            ledger.mark(param.grad, "gradients")


def follow_gradients(ledger: Ledger, engine: Any) -> None:
    """Let `ledger` know each parameter's gradient as soon as there is one."""

    def mark(param: Tensor) -> None:
        if param.grad is not None:
            # Not where DeepSpeed has already moved it into a bucket.
            ledger.mark(param.grad, "gradients", only="backward")

    for param in engine.module.parameters():
        if param.requires_grad:
            param.register_post_accumulate_grad_hook(mark)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
