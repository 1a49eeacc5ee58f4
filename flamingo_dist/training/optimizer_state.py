"""What DeepSpeed holds of the trainable parameters on this rank: fp32 weights and AdamW's moments, in every ZeRO stage.

DeepSpeed keeps flat buffers over many parameters; here each parameter's part of them is found by its name. Reading and
writing go to the buffers themselves.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flamingo_dist.models.init import tag_of
from flamingo_dist.parallel.topology import Topology
from flamingo_dist.parallel.zero import safe_get_local_fp32_param, safe_get_local_optimizer_state
from flamingo_dist.training.fragments import Fragment, Slice

WEIGHT = "weight"
"""First part of the stored name of a parameter's fp32 value."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's moments, and the first parts of their stored names."""


def stored_name(kind: str, name: str) -> str:
    """Return the name under which a checkpoint stores a parameter's weight or moment."""
    return f"{kind}/{name}"


def place_of(param: nn.Parameter, *, tp_rank: int, tp_size: int) -> Slice:
    """Return how this tensor-parallel rank's slice of `param` lies in the whole, under ZeRO-3 too."""
    shape = tuple(getattr(param, "ds_shape", param.shape))
    return Slice(shape=shape, tag=tag_of(param), tp_rank=tp_rank, tp_size=tp_size)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name."""
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def local_fragments(engine: Any, topology: Topology) -> dict[str, Fragment]:
    """Return this rank's fp32 weights and moments as views into DeepSpeed's buffers.

    Args:
        engine: the DeepSpeed engine; before its first step the moments are made, zero.
        topology: the run's degrees.

    Returns:
        Fragments by stored name. In stage 0 without bf16 each data-parallel rank has everything.
    """
    make_moments(engine)
    found = {}
    for name, param in trainable(engine.module).items():
        place = place_of(param, tp_rank=topology.tensor_rank, tp_size=topology.tensor)
        for kind in (WEIGHT, *MOMENTS):
            flat_N, start = _local(engine, param, kind)
            found[stored_name(kind, name)] = Fragment(flat_N, start, place)
    return found


def share(fragments: dict[str, Fragment], engine: Any, topology: Topology) -> dict[str, Fragment]:
    """Return the part of `fragments` that this rank is to save, so that all ranks together save each element once."""
    chosen = {}
    for name, fragment in fragments.items():
        if topology.tensor_rank != 0 and fragment.place.tag.partition_dim is None:
            continue
        if is_replicated(engine):
            size = -(-fragment.flat_N.numel() // topology.data)
            begin = min(topology.data_rank * size, fragment.flat_N.numel())
            fragment = Fragment(fragment.flat_N[begin : begin + size], begin, fragment.place)
        if fragment.flat_N.numel():
            chosen[name] = fragment
    return chosen


def is_replicated(engine: Any) -> bool:
    """Return whether every data-parallel rank holds the whole state: torch's bare optimizer."""
    return isinstance(engine.optimizer, torch.optim.Optimizer)


def _local(engine: Any, param: nn.Parameter, kind: str) -> tuple[Tensor, int]:
    """Return a parameter's part [N] of a buffer and where it begins in the flattened parameter."""
    if is_replicated(engine):
        value = param.detach() if kind == WEIGHT else engine.optimizer.state[param][kind]
        return value.view(-1), 0
    if hasattr(param, "ds_id"):
        held = (
            safe_get_local_fp32_param(param)
            if kind == WEIGHT
            else safe_get_local_optimizer_state(param, kind)
        )
        group, total = param.ds_process_group, param.ds_numel  # type: ignore[attr-defined]
        start = min(torch.distributed.get_rank(group) * held.numel(), total)
        return held[: total - start], start  # the last ranks' parts are padded
    mapping = param._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:  # nothing of it lies on this rank
        return param.new_empty(0, dtype=torch.float32), 0
    # By address: DeepSpeed 0.19.8 links the moments to the parameters of the first group alone (stages 1 and 2).
    master = _masters(engine)[mapping.param_group_index]
    flat_N = master if kind == WEIGHT else _inner(engine).state[master][kind]
    address = mapping.hp_fragment_address
    return flat_N.detach().narrow(0, address.start, address.numel), mapping.lp_fragment_address.start


def _masters(engine: Any) -> list[Tensor]:
    """Return the flat fp32 tensors (or, in stage 0, the parameters) that the inner optimizer updates."""
    if engine.zero_optimization_stage() == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [param for group in _inner(engine).param_groups for param in group["params"]]


def _inner(engine: Any) -> torch.optim.Optimizer:
    return engine.optimizer if is_replicated(engine) else engine.optimizer.optimizer


def make_moments(engine: Any) -> None:
    """Make AdamW's state where a first step has not made it yet, as that step would."""
    state = _inner(engine).state
    missing = [master for master in _masters(engine) if not state[master]]
    for master in missing:
        state[master].update(
            step=torch.tensor(0.0),
            exp_avg=torch.zeros_like(master, memory_format=torch.preserve_format),
            exp_avg_sq=torch.zeros_like(master, memory_format=torch.preserve_format),
        )


def _steps(engine: Any) -> Iterator[Tensor]:
    state = _inner(engine).state
    return (state[master]["step"] for master in _masters(engine))


def updates_done(engine: Any) -> int:
    """Return how many updates AdamW has made, which its bias correction needs; equal for all parameters."""
    counts = {int(step) for step in _steps(engine)}
    assert len(counts) == 1, f"parameters have seen {counts} updates: one was left out of a step"
    return counts.pop()


def publish(engine: Any, updates: int) -> None:
    """Make DeepSpeed compute with what was written into the fragments, on all ranks together.

    Args:
        engine: the DeepSpeed engine.
        updates: AdamW's updates so far.
    """
    for step in _steps(engine):
        step.fill_(updates)
    optimizer = engine.optimizer
    if is_replicated(engine):
        return  # the weights are the parameters themselves
    if engine.zero_optimization_stage() == 3:
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
    else:
        optimizer.update_lp_params()
