"""`flamingo bench losses`: a short training run on a device, against the same run on the CPU's references.

In fp32 on the network of the recipe `smoke`, with its learning rate, two data sets, one clip and AdamW. Gates start
open (0.5), so that the kernels decide the losses from the first step on. It proves that the kernels train: their
gradients pass through an optimizer, and what they change comes back in the next step's loss.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from jobs.bench.networks import (
    BatchConfig,
    build,
    make_batch,
    nll_sum,
    one_process,
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
    with one_process(config.device):
        ours = _train(config, "triton", config.device)
        theirs = _train(config, "reference", torch.device("cpu"))
    pairs = list(zip(ours, theirs, strict=True))
    loss = max(_relative(a.loss[name], b.loss[name]) for a, b in pairs for name in WEIGHTS)
    norm = max(_relative(a.grad_norm, b.grad_norm) for a, b in pairs)
    return {
        "environment": environment(config.device),
        "steps": [
            {"step": number, "triton": asdict(a), "cpu reference": asdict(b)}
            for number, (a, b) in enumerate(pairs)
        ],
        "worst_loss_difference": loss,
        "worst_norm_difference": norm,
        "loss_tolerance": LOSS_TOLERANCE,
        "norm_tolerance": NORM_TOLERANCE,
        "agree": loss <= LOSS_TOLERANCE and norm <= NORM_TOLERANCE,
    }


@dataclass(frozen=True)
class _Step:
    loss: dict[str, float]
    grad_norm: float


def _train(config: LossesConfig, implementation: str, device: torch.device) -> list[_Step]:
    """Train and return what each step measured."""
    from flamingo_dist.training.config import OptimizerConfig
    from flamingo_dist.training.optimizer import make_optimizer, set_lr

    network = with_implementation(smoke_network(), implementation, gate_init=0.5)
    model = build(network, torch.float32, device, seed=1)
    settings = OptimizerConfig(lr=3e-3, warmup_steps=5, gate_lr_scale=10.0)
    optimizer = make_optimizer(model.named_parameters(), settings)
    trained = [p for p in model.parameters() if p.requires_grad]
    sizes = {
        "documents": BatchConfig(rows=4, length=96, media=3),
        "pairs": BatchConfig(rows=8, length=32, media=1),
    }
    if config.tiny:
        sizes = {
            "documents": BatchConfig(rows=1, length=10, media=2),
            "pairs": BatchConfig(rows=1, length=6, media=1),
        }
    steps = []
    for number in range(config.steps):
        set_lr(optimizer.param_groups, settings, number)
        losses = {}
        for place, (name, weight) in enumerate(WEIGHTS.items()):
            batch = make_batch(network, sizes[name], seed=10 * number + place).to(device)
            loss = nll_sum(model, batch, batch.targets()) / batch.num_loss_tokens()
            (weight * loss).backward()
            losses[name] = float(loss.detach())
        norm = float(nn.utils.clip_grad_norm_(trained, settings.clip_norm))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps.append(_Step(losses, norm))
    return steps


def _relative(a: float, b: float) -> float:
    """Return |a - b| / |b|; what is not a number is infinitely far."""
    difference = abs(a - b) / max(abs(b), 1e-12)
    return difference if difference == difference else float("inf")
