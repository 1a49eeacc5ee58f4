"""How inference and evaluation call a model: the types of the call, and evaluation mode.

Everything here takes a callable with the signature of `flamingo_dist.models.flamingo.Flamingo.forward`: the
plain module or the DeepSpeed engine around it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from flamingo_dist.models.vocabulary import IGNORE

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


def latents_of(model: Forward, media: Tensor, media_mask_BM: Tensor) -> Tensor:
    """Return the latents [B, M, R, E] of media; they do not depend on any text.

    Args:
        model: A module, an engine or a plain callable, in the mode that is wanted.
        media: [B, M, F, ...], as in a batch, on the model's device.
        media_mask_BM: bool [B, M].
    """
    # One token is the cheapest text that goes through `forward`; a target spares the head the logits.
    tokens_B1 = torch.zeros(len(media), 1, dtype=torch.int64, device=media.device)
    output = model(tokens_B1, tokens_B1.int(), media, media_mask_BM, targets_BT=tokens_B1)
    latents_BMRE: Tensor = output.latents_BMRE
    return latents_BMRE


def next_token_targets(tokens_BT: Tensor, loss_mask_BT: Tensor) -> Tensor:
    """Make the targets of a forward: at each position the next token, where that token carries loss.

    The mask belongs to the predicted token, as in a batch, so it shifts together with the tokens. The model
    leaves positions without loss out of its widest product, the head.

    Args:
        tokens_BT: int64 [B, T].
        loss_mask_BT: bool [B, T], True where the token is to be predicted; position 0 cannot be.

    Returns:
        int64 [B, T]: token l + 1 at position l, or `IGNORE`.
    """
    targets_BT = torch.full_like(tokens_BT, IGNORE)
    targets_BT[:, :-1] = torch.where(loss_mask_BT[:, 1:], tokens_BT[:, 1:], IGNORE)
    return targets_BT
