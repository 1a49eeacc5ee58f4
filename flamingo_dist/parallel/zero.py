"""DeepSpeed in one place: its configuration, building under ZeRO, filling and residency of weights."""

import importlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from flamingo_dist.parallel.topology import MegatronMPU, ParallelConfig, Topology

# DeepSpeed picks its accelerator at import; without a GPU it would probe for others first.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.utils import safe_get_local_fp32_param as safe_get_local_fp32_param
from deepspeed.utils import safe_get_local_optimizer_state as safe_get_local_optimizer_state
from deepspeed.utils import set_z3_leaf_modules


def init_deepspeed() -> None:
    """Let DeepSpeed use the torch.distributed group that exists.

    Its shared-memory collective for CPUs is left out: it is compiled at first use with a C++ compiler that a
    machine may lack, and assumes that all ranks share one host.
    """
    # By name: the attribute `deepspeed.comm.torch` is torch itself, which that package imports.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    # `zero.Init` reads it without a default; one process a device is the rule here.
    os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed.init_distributed(
        dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False
    )


def deepspeed_config(
    parallel: ParallelConfig, topology: Topology, *, dtype: torch.dtype, clip_norm: float
) -> dict[str, Any]:
    """Return DeepSpeed's configuration of a run.

    The accumulation over data sets is ours (one backward each, boundary set by hand), so DeepSpeed sees one
    accumulation step and a batch of one.
    """
    plain = is_plain(parallel, dtype)
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": topology.data,
        "gradient_clipping": 0.0 if plain else clip_norm,
        "bf16": {
            "enabled": dtype == torch.bfloat16,
            "check_grad_overflow": dtype == torch.bfloat16,
            # Stage 1: a gradient goes into its fp32 sum at once, instead of all of them standing in bf16 besides.
            "immediate_grad_update": dtype == torch.bfloat16,
        },
        # Sums over data sets and ranks stay exact to fp32 whatever the activations are.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": parallel.zero_stage,
            "overlap_comm": torch.cuda.is_available(),
            "contiguous_gradients": True,
            "reduce_bucket_size": 50_000_000,
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 0,
            "memory_efficient_linear": False,
        },
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def is_plain(parallel: ParallelConfig, dtype: torch.dtype) -> bool:
    """Return whether DeepSpeed would run torch's optimizer bare, without a norm check of its own."""
    return parallel.zero_stage == 0 and dtype == torch.float32


@contextmanager
def building(parallel: ParallelConfig, config: dict[str, Any]) -> Iterator[None]:
    """Build a model inside: under `zero.Init` where frozen weights are to be partitioned from the start.

    `zero.Init` gets the data-parallel group by name: with the `mpu` alone, DeepSpeed 0.19 broadcasts over the
    whole world and overwrites every tensor-parallel shard with rank 0's. It takes the dtype from `config`: a
    dtype given by name it drops, for bf16, where the accelerator has no fp16 (as a CPU has not).
    """
    if parallel.frozen == "resident":
        with nullcontext():
            yield
        return
    with deepspeed.zero.Init(
        data_parallel_group=parallel_state.get_data_parallel_group(),
        mpu=MegatronMPU(),
        config_dict_or_path=config,
    ):
        yield


def fill_parameters(
    model: nn.Module,
    value_of: Callable[[str, nn.Parameter], Tensor],
    filled: Callable[[nn.Module], None] | None = None,
) -> None:
    """Fill every parameter, whole or partitioned, module by module.

    Args:
        model: the model, built empty.
        value_of: gives a parameter's values on this tensor-parallel rank from its full name and itself (whole
            at the time of the call). It must not depend on the data-parallel rank: under ZeRO-3 the first
            rank's values are broadcast.
        filled: called with each module when its own parameters are filled; it may put something in their place.
    """
    for prefix, module in list(model.named_modules()):
        named = {f"{prefix}.{n}" if prefix else n: p for n, p in module.named_parameters(recurse=False)}
        partitioned = [p for p in named.values() if hasattr(p, "ds_id")]
        is_source = not partitioned or parallel_state.get_data_parallel_rank() == 0
        with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0, enabled=bool(partitioned)):
            if is_source:
                for name, param in named.items():
                    with torch.no_grad():
                        param.copy_(value_of(name, param))
        named.clear()  # nothing else holds a parameter that `filled` takes away
        if filled is not None:
            filled(module)


def make_frozen_resident(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Turn every frozen parameter of `model` into a non-persistent buffer, of `dtype` if one is given.

    ZeRO-3 partitions all parameters it sees and releases even "persistent" ones at every optimizer step, to
    gather them again; a buffer it never touches. So a resident frozen weight moves no byte, holds no gradient
    by construction, and stays out of checkpoints. `zero.Init` gives partitioned weights the run's dtype, so the
    frozen LM wants it here too: megatron-core builds its norms in fp32 whatever it is told, and on bf16 inputs torch's
    fused norms refuse those.
    """
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            if not param.requires_grad:
                value = param.detach().to(param.dtype if dtype is None else dtype)
                for mark in ("flamingo_tag", "tensor_model_parallel", "partition_dim", "partition_stride"):
                    if hasattr(param, mark):
                        setattr(value, mark, getattr(param, mark))
                del module._parameters[name]
                module.register_buffer(name, value, persistent=False)


def make_engine(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: dict[str, Any],
    *,
    units: Sequence[type[nn.Module]] = (),
) -> deepspeed.DeepSpeedEngine:
    """Hand `model` and `optimizer` to DeepSpeed with Megatron's groups.

    Args:
        model: the network.
        optimizer: over its trainable parameters.
        config: from `deepspeed_config`.
        units: classes whose modules ZeRO-3 gathers and releases as one. Otherwise it gathers every linear layer
            by itself and hooks every module, which took 40% of a small model's forward.
    """
    if config["zero_optimization"]["stage"] == 3 and units:
        set_z3_leaf_modules(model, list(units))
    with redirect_stdout(io.StringIO()):  # stage 1's optimizer prints the memory at each step of its making
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, mpu=MegatronMPU(), dist_init_required=False
        )
    if config["zero_optimization"]["stage"] == 3:
        _unhook_without_parameters(model)
    return engine


def _unhook_without_parameters(model: nn.Module) -> None:
    """Take ZeRO-3's hooks off modules that hold no parameter.

    ZeRO-3 prefetches, and keeps what runs again soon, only while modules run in the order that it has recorded. The
    vision encoder runs once a sub-batch of frames, so that data sets with other numbers of frames broke the record in
    every step, and the weights of a step were gathered almost twice. It has buffers alone, as resident blocks have.
    """
    for module in model.modules():
        if next(module.parameters(), None) is None:
            module._forward_pre_hooks.clear()
            module._forward_hooks.clear()


@contextmanager
def gathered(params: list[nn.Parameter]) -> Iterator[None]:
    """Make `params` whole for reading inside, on every rank together."""
    partitioned = [p for p in params if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
        yield
