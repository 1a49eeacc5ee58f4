"""AdamW's parameter groups and the schedule."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from flamingo_dist.training.config import OptimizerConfig


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig
) -> list[dict[str, Any]]:
    """Split the trainable parameters by weight decay and learning rate.

    Weight decay is 0 on the Resampler (paper) and on the gates, which it would pull shut.

    Args:
        named: parameters by their full names in `Flamingo`; frozen ones are left out.
        config: the optimizer's settings.

    Returns:
        Groups with `params`, `weight_decay` and `lr_scale`, in a fixed order, empty ones left out.
    """
    decayed, plain, gates = [], [], []
    for name, param in named:
        if not param.requires_grad:
            continue
        if is_gate(name):
            gates.append(param)
        elif name.startswith("resampler."):
            plain.append(param)
        else:
            decayed.append(param)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay, "lr_scale": 1.0},
        {"params": plain, "weight_decay": 0.0, "lr_scale": 1.0},
        {"params": gates, "weight_decay": 0.0, "lr_scale": config.gate_lr_scale},
    ]
    return [group for group in groups if group["params"]]


def is_gate(name: str) -> bool:
    """Return whether the parameter `name` of `Flamingo` is a tanh gate."""
    return name.startswith("gated.") and name.rsplit(".", 1)[-1] in ("gate_attn", "gate_ffw")


def make_optimizer(
    named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig
) -> torch.optim.Optimizer:
    """Return AdamW over the trainable parameters."""
    groups = parameter_groups(named, config)
    # Fused: one pass over weights, gradients and moments, and no temporaries of their size.
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def set_lr(param_groups: list[dict[str, Any]], config: OptimizerConfig, step: int) -> float:
    """Set the learning rate of step number `step` in every group and return it (unscaled).

    The schedule is a function of the step alone, so a resumed run cannot be on another one.
    """
    lr = config.lr_at(step)
    for group in param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr
