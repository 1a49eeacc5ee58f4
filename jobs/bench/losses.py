"""`flamingo bench losses`: a short training run on a device, against the same run on the CPU's references.

In fp32 on the network of the recipe `smoke`, with its learning rate, two data sets, one clip and AdamW. Gates start
open (0.5), so that the kernels decide the losses from the first step on. It proves that the kernels train: their
gradients pass through an optimizer, and what they change comes back in the next step's loss. The same run again through
the training engine, in each of `LAYOUTS`, proves what only a GPU shows of that: where its tensors are.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from flamingo_dist.models.flamingo import FlamingoConfig
from flamingo_dist.parallel.topology import ParallelConfig, Topology, single_process
from flamingo_dist.training.batch import TrainBatch
from flamingo_dist.training.config import OptimizerConfig, TrainConfig
from flamingo_dist.training.optimizer import make_optimizer, set_lr
from jobs.bench.networks import (
    BatchConfig,
    build,
    make_batch,
    nll_sum,
    smoke_network,
    with_implementation,
)
from jobs.bench.rows import environment
from kernels.config import can_launch

LOSS_TOLERANCE = 5e-4
"""Largest relative difference of a loss. fp32 sums in another order differ by 1e-7 to 1e-6; AdamW divides by the
gradient's own size, so that where a gradient is rounding noise the update is too, and this grows from step to step."""
NORM_TOLERANCE = 5e-3
"""Largest relative difference of the gradient norm before the clip."""
WEIGHTS = {"documents": 1.0, "pairs": 0.2}
"""Weights of the data sets' losses."""
SEED = 1
"""Of the first weights."""
OPTIMIZER = OptimizerConfig(lr=3e-3, warmup_steps=5, gate_lr_scale=10.0)
"""As the recipe's."""

LAYOUTS = {
    "ZeRO 1": ParallelConfig(zero_stage=1),
    "ZeRO 1, rows in parts": ParallelConfig(zero_stage=1, micro_rows=2),
    "ZeRO 3": ParallelConfig(zero_stage=3),
    "ZeRO 3, frozen weights partitioned, blocks recomputed": ParallelConfig(
        zero_stage=3, frozen="partitioned", activation_checkpointing=True
    ),
}
"""How the training engine runs on one device."""


@dataclass(frozen=True, kw_only=True)
class LossesConfig:
    """A comparison of two short runs."""

    device: torch.device
    """Where the kernels run; the references always run on the CPU."""
    tiny: bool = False
    """A dozen tokens, for Triton's interpreter."""
    steps: int = 5
    """Optimizer steps."""


def run_losses(config: LossesConfig) -> dict[str, Any]:
    """Return both runs' losses and gradient norms, the differences, and whether they agree.

    Raises:
        ValueError: Triton kernels cannot run on the device, so that there is nothing to compare.
    """
    if not can_launch(torch.empty(1, device=config.device)):
        raise ValueError(
            f"flamingo bench losses: Triton kernels cannot run on {config.device}. Use a CUDA device, or set "
            "TRITON_INTERPRET=1 before the start and give --device cpu --tiny."
        )
    # The encoder's convolutions would be in TF32 by default, which alone is 1e-3.
    torch.backends.cudnn.allow_tf32 = False
    left_out = "" if importlib.util.find_spec("deepspeed") else "DeepSpeed is not installed"
    with single_process(config.device.type):
        wanted = _train(config, "reference", torch.device("cpu"))
        runs = {"kernels": _train(config, "triton", config.device)}
        if not left_out:
            runs |= {name: _train_engine(config, parallel) for name, parallel in LAYOUTS.items()}
    worst = {name: _worst(run, wanted) for name, run in runs.items()}
    return {
        "environment": environment(config.device),
        "steps": [
            {"step": number, "triton": asdict(a), "cpu reference": asdict(b)}
            for number, (a, b) in enumerate(zip(runs["kernels"], wanted, strict=True))
        ],
        "engine": {name: found for name, found in worst.items() if name != "kernels"},
        "engine_left_out": left_out,
        "worst_loss_difference": max(found["loss"] for found in worst.values()),
        "worst_norm_difference": max(found["norm"] for found in worst.values()),
        "loss_tolerance": LOSS_TOLERANCE,
        "norm_tolerance": NORM_TOLERANCE,
        "agree": all(
            found["loss"] <= LOSS_TOLERANCE and found["norm"] <= NORM_TOLERANCE for found in worst.values()
        ),
    }


@dataclass(frozen=True)
class _Step:
    loss: dict[str, float]
    grad_norm: float


def _network(implementation: str) -> FlamingoConfig:
    return with_implementation(smoke_network(), implementation, gate_init=0.5)


def _batches(config: LossesConfig) -> Iterator[dict[str, TrainBatch]]:
    """Yield each step's batches by data set, on the CPU."""
    sizes = {
        "documents": BatchConfig(rows=4, length=96, media=3),
        "pairs": BatchConfig(rows=8, length=32, media=1),
    }
    if config.tiny:
        sizes = {
            "documents": BatchConfig(rows=1, length=10, media=2),
            "pairs": BatchConfig(rows=1, length=6, media=1),
        }
    network = _network("reference")
    for number in range(config.steps):
        yield {
            name: make_batch(network, sizes[name], seed=10 * number + place)
            for place, name in enumerate(WEIGHTS)
        }


def _train(config: LossesConfig, implementation: str, device: torch.device) -> list[_Step]:
    """Train without an engine and return what each step measured."""
    model = build(_network(implementation), torch.float32, device, seed=SEED)
    optimizer = make_optimizer(model.named_parameters(), OPTIMIZER)
    trained = [p for p in model.parameters() if p.requires_grad]
    steps = []
    for number, batches in enumerate(_batches(config)):
        set_lr(optimizer.param_groups, OPTIMIZER, number)
        losses = {}
        for name, weight in WEIGHTS.items():
            batch = batches[name].to(device)
            loss = nll_sum(model, batch, batch.targets()) / batch.num_loss_tokens()
            (weight * loss).backward()
            losses[name] = float(loss.detach())
        norm = float(nn.utils.clip_grad_norm_(trained, OPTIMIZER.clip_norm))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps.append(_Step(losses, norm))
    return steps


def _train_engine(config: LossesConfig, parallel: ParallelConfig) -> list[_Step]:
    """Train as a run does, through DeepSpeed, and return what each step measured."""
    # Here: without DeepSpeed, which a machine that only measures may lack, neither can be imported.
    from flamingo_dist.training.build import build_engine
    from flamingo_dist.training.step import TrainStep

    topology = Topology(world=1, rank=0, tensor=1)
    train = TrainConfig(steps=config.steps, dtype="fp32", seed=SEED, optimizer=OPTIMIZER)
    engine = build_engine(_network("triton"), train, parallel, topology)
    step = TrainStep(engine, train, topology, WEIGHTS, parallel)
    steps = []
    for number, batches in enumerate(_batches(config)):
        found = step.run(number, {name: batch.to(config.device) for name, batch in batches.items()})
        steps.append(_Step(dict(found.loss), found.grad_norm))
    return steps


def _worst(run: Sequence[_Step], wanted: Sequence[_Step]) -> dict[str, float]:
    """Return the largest relative differences of the losses and of the gradient norms."""
    pairs = list(zip(run, wanted, strict=True))
    return {
        "loss": max(_relative(a.loss[name], b.loss[name]) for a, b in pairs for name in WEIGHTS),
        "norm": max(_relative(a.grad_norm, b.grad_norm) for a, b in pairs),
    }


def _relative(a: float, b: float) -> float:
    """Return |a - b| / |b|; what is not a number is infinitely far."""
    difference = abs(a - b) / max(abs(b), 1e-12)
    return difference if difference == difference else float("inf")
