"""Aids for numerics tests: poisoned memory, the order of programs, mutants of a kernel's source."""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.config import is_interpreted

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""Bound of ||got - want|| / ||want|| against fp64. The interpreter truncates to bf16, which doubles its error."""


def relative(got: Tensor, want: Tensor, scale: float = 0.0) -> float:
    """||got - want|| / ||want||, absolute where the wanted norm is rounding; NaN counts as infinite.

    A sum whose terms cancel is no better than its terms: `scale`, their norm, replaces a smaller wanted norm.
    """
    scale = max(scale, want.double().norm().item())
    error = (got.double().cpu() - want.double().cpu()).norm().item() / (scale if scale > 1e-12 else 1.0)
    return float("inf") if error != error else error


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, torch fills what it allocates without a value with NaN: what a kernel left unwritten shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)  # fill_uninitialized_memory is on by default
    try:
        assert torch.empty(1).isnan().all(), "torch no longer fills empty tensors"
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextlib.contextmanager
def programs_backwards() -> Iterator[None]:
    """Inside, the interpreter runs a grid's last program first. Who overwrites a neighbour's result is found out
    in one of the two orders; on a GPU it would be a race."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    forwards = builder.set_grid_idx

    def backwards(x: int, y: int, z: int) -> None:
        size = builder.grid_dim
        forwards(size[0] - 1 - x, size[1] - 1 - y, size[2] - 1 - z)

    builder.set_grid_idx = backwards
    try:
        yield
    finally:
        del builder.set_grid_idx


@contextlib.contextmanager
def rounding_to_fp8() -> Iterator[None]:
    """Inside, the interpreter rounds fp32 to e4m3 as GPUs and torch do.

    Its own conversion (Triton 3.6.0 and 3.7.1) loses the carry of a mantissa that rounds up to the next power of two,
    126.8 becoming 64, rounds ties away from even, and has no NaN. On a GPU nothing changes.
    """
    if not is_interpreted:
        yield
        return
    from triton.runtime import interpreter

    own = interpreter._convert_float

    def convert(x: Any, source: Any, target: Any, mode: Any) -> Any:
        if not (target.is_fp8e4nv() and source.is_fp32()):
            return own(x, source, target, mode)
        return torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    interpreter._convert_float = convert
    try:
        yield
    finally:
        interpreter._convert_float = own


def in_both_orders(run: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Return what `run` returns; it must be the same, bit for bit, whichever program runs first."""
    with poisoned():
        first = run()
        if first[0].device.type == "cpu":
            with programs_backwards():
                second = run()
        else:
            second = run()
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(a, b), f"result {number} depends on the order of programs: a race"
    return first


@dataclass(frozen=True)
class Mutant:
    """A fault planted in a kernel's source."""

    name: str
    old: str
    """Text that must occur exactly once."""
    new: str


def load_mutant(module: ModuleType, mutant: Mutant, folder: Path) -> ModuleType:
    """Return a module made of `module`'s source with the fault in it; a fault that no longer fits is an error."""
    source = Path(str(module.__file__)).read_text()
    assert source.count(mutant.old) == 1, (
        f"mutant {mutant.name!r}: its text occurs {source.count(mutant.old)} times in {module.__name__}; "
        "bring it up to date with the kernel."
    )
    path = folder / f"{module.__name__.replace('.', '_')}_mutant.py"
    path.write_text(source.replace(mutant.old, mutant.new))  # Triton reads a kernel's source from its file
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def assert_mutant_is_caught(
    mutant: Mutant,
    user: ModuleType,
    name: str,
    check: Callable[[], Any],
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
) -> None:
    """Replace `user.name`, a kernel module, by its mutant: `check`, which passes without it, must now fail.

    It must fail by an assertion of its own: a mutant that does not even run proves nothing.
    """
    monkeypatch.setattr(user, name, load_mutant(getattr(user, name), mutant, folder))
    with pytest.raises(AssertionError):
        check()
