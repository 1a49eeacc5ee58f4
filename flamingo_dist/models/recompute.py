"""What activation checkpointing keeps of a block of the LM and of the gated block before it."""

from collections import deque
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

Recompute = bool | Literal["selective"]
"""Nothing is computed again; everything is (True); or what is cheap, and frozen blocks whole ("selective").

A frozen block keeps no input of its matrix products for want of weight gradients: all that it keeps are results that
must be computed again if they are not kept, at one product for each. A gated block keeps those inputs as well; from the
results alone, which are little more than half as much, they follow by norms and activations. So "selective" keeps the
results of a gated block's products and attention, and of a frozen block its input.
"""
SAVED = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "flamingo::gated_xattn",
        # In place on a product's result: what is kept of that is the sum then, and must not be summed again.
        "c10d::allreduce_",
    }
)
"""Operations whose results are kept."""


class Keeper:
    """Keeps the costly results of a part of a checkpointed function: the part is entered in both of its passes.

    Not torch's `create_selective_checkpoint_contexts`: from 2.12 on it wants every operation of the second pass to have
    been in the first, and ZeRO-3, which gathers weights within, has others.
    """

    def __init__(self) -> None:
        self._kept: deque[tuple[str, Any]] = deque()
        self._mode: TorchDispatchMode | None = None

    def __enter__(self) -> Self:
        self._mode = _Record(self._kept) if self._mode is None else _Replay(self._kept)
        self._mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        assert self._mode is not None, "it was entered"
        self._mode.__exit__(*error)


class _Mode(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: nothing inside is compiled, and torch's guard against it costs as much as the rest."""
        return False

    def __init__(self, kept: deque[tuple[str, Any]]) -> None:
        super().__init__()
        self._kept = kept


class _Record(_Mode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func` and keep its result if it was costly."""
        result = func(*args, **(kwargs or {}))
        if _is_costly(func):
            self._kept.append((func.name(), tree_map_only(Tensor, _Held, result)))
        return result


class _Replay(_Mode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Return what was kept, or run `func`."""
        if not _is_costly(func):
            return func(*args, **(kwargs or {}))
        if not self._kept:
            raise RuntimeError(
                "a second backward through a block that is recomputed selectively; run it once."
            )
        name, held = self._kept.popleft()
        assert name == func.name(), (
            f"the second pass of a block runs {func.name()} where the first ran {name}"
        )
        return tree_map_only(_Held, _Held.value, held)


@cache
def _is_costly(operation: Any) -> bool:
    return operation.name() in SAVED


class _Held:
    """A kept tensor of any shape, without its history; an in-place operation on it is found out."""

    def __init__(self, tensor: Tensor) -> None:
        # As torch's own: views made below autograd share the version that in-place operations count up.
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
            self._tensor = tensor.detach()
        self._version = self._tensor._version

    def value(self) -> Tensor:
        """Return the tensor."""
        assert self._tensor._version == self._version, (
            "a result that is kept for the backward was changed in place"
        )
        return self._tensor
