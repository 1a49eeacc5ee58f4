"""How inference and evaluation call a model: the types of the call, and evaluation mode.

Everything here takes a callable with the signature of `flamingo_dist.models.flamingo.Flamingo.forward`: the
plain module or the DeepSpeed engine around it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

Forward: TypeAlias = Callable[..., Any]
"""`Flamingo.forward`, a module or an engine. What it returns has `logits_BTV` [B, T, V] (None where targets
were given), `nll_BT` fp32 [B, T] in nats (None where none were given) and `latents_BMRE` [B, M, R, E]."""

AllDone: TypeAlias = Callable[[bool], bool]
"""Logical AND of a flag over the ranks that must stay in step; the identity where there is one rank."""

ReduceSum: TypeAlias = Callable[[Tensor], Tensor]
"""Sum of a tensor over the data-parallel ranks; the identity where there is one rank."""


def alone(value: T) -> T:
    """Return `value`: the reduction over a single rank."""
    return value


@contextmanager
def evaluating(model: Forward) -> Iterator[None]:
    """Run the body without gradients and in evaluation mode, then put every module's mode back.

    The modes are kept module by module: `model.train()` afterwards would also switch a frozen encoder, whose
    batch norms must stay in evaluation mode, to training.

    Args:
        model: A module, an engine or a plain callable (which has no mode).
    """
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    try:
        if isinstance(model, nn.Module):
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def next_token_targets(tokens_BT: Tensor) -> Tensor:
    """Shift tokens by one: what each position predicts.

    Args:
        tokens_BT: int64 [B, T].

    Returns:
        int64 [B, T]; the last position, which predicts nothing, holds 0 (a valid id that carries no loss).
    """
    targets_BT = torch.zeros_like(tokens_BT)
    targets_BT[:, :-1] = tokens_BT[:, 1:]
    return targets_BT
