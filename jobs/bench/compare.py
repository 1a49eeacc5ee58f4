"""One comparison: check every contender against fp64, then time those that are right."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from jobs.bench.cases import Case, Expected, expected
from jobs.bench.checking import TOLERANCE, errors_of, poisoned, verdict
from jobs.bench.contender import Built, Contender, Function, LeftOutError
from jobs.bench.roofline import MODES, Cost, Mode
from jobs.bench.rows import Row
from jobs.bench.timing import Clock
from jobs.console import first_line


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is compared: inputs, what must come out, and what it costs at least."""

    case: Case
    want: Expected
    row: Row
    """The row's fields that all contenders share."""
    cost: Callable[[Mode], Cost] | None
    """Least work of a mode; None where bytes are no measure (a whole layer)."""
    tolerance: float


def core_subject(case: Case, row: Row, cost: Callable[[Mode], Cost]) -> Subject:
    """Return the comparison of a core operation."""
    return Subject(case=case, want=expected(case), row=row, cost=cost, tolerance=TOLERANCE[case.dtype])


def compare(
    subject: Subject,
    contenders: Sequence[Contender],
    clock: Clock,
    copy_rate: float,
    red: Mapping[str, str],
    modes: Sequence[Mode] = MODES,
) -> list[Row]:
    """Return the rows of all contenders.

    Args:
        subject: what is compared.
        contenders: who takes part.
        clock: for the device that the inputs are on.
        copy_rate: bytes/s of a copy in this run.
        red: operations whose tests are red, with the reason: our kernels get no speed there.
        modes: what is timed.
    """
    rows = []
    for contender in contenders:
        base = replace(subject.row, contender=contender.name, ours=contender.ours)
        why = red.get(subject.row.op) if contender.ours else None
        if why is not None:
            rows += [
                replace(base, mode=mode, status="refused", reason=f"tests are red: {why}") for mode in modes
            ]
            continue
        with clock.running():
            rows += _one(subject, contender, base, clock, copy_rate, modes)
    return rows


def _one(
    subject: Subject, contender: Contender, base: Row, clock: Clock, copy_rate: float, modes: Sequence[Mode]
) -> list[Row]:
    """Return one contender's rows; what goes wrong becomes a reason."""
    try:
        built = contender.build(subject.case)
        errors = check(subject, built)
    except LeftOutError as reason:
        return [replace(base, mode=mode, reason=str(reason)) for mode in modes]
    except torch.cuda.OutOfMemoryError:
        return [replace(base, mode=mode, reason="out of memory") for mode in modes]
    except Exception as error:  # whatever a baseline's compiler raises: it is a result, not an end
        return [replace(base, mode=mode, reason=first_line(error, kind=True)) for mode in modes]
    wrong = verdict(errors, subject.tolerance)
    base = replace(base, worst_error=max(errors.values()), note=built.note)
    if wrong:
        return [replace(base, mode=mode, status="refused", reason=wrong) for mode in modes]
    rows = []
    for mode in modes:
        row = replace(base, mode=mode)
        if built.forward_only and mode != "fwd":
            rows.append(replace(row, reason=built.forward_only))
            continue
        try:
            rows.append(_timed(subject, built, row, mode, clock, copy_rate))
        except RuntimeError as error:  # out of memory is one
            rows.append(replace(row, reason=first_line(error, kind=True)))
    return rows


def check(subject: Subject, built: Built) -> dict[str, float]:
    """Return the contender's errors, on memory that was poisoned before each pass."""
    case = subject.case
    size = sum(x.numel() * x.element_size() for x in (*case.inputs, *case.upstream))
    with poisoned(case.device, size):
        outputs = _run(built.call, case, grad=not built.forward_only)
    got: tuple[Tensor | None, ...] = outputs
    if not built.forward_only:
        with poisoned(case.device, size):
            got = (*outputs, *_gradients(outputs, case))
    return errors_of(got, subject.want)


def _run(call: Function, case: Case, *, grad: bool) -> tuple[Tensor, ...]:
    with torch.set_grad_enabled(grad):
        return call(*(case.inputs if grad else [x.detach() for x in case.inputs]))


def _gradients(outputs: Sequence[Tensor], case: Case, *, keep: bool = False) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        outputs, case.inputs, case.upstream, retain_graph=keep, allow_unused=True, materialize_grads=True
    )


def _timed(subject: Subject, built: Built, row: Row, mode: Mode, clock: Clock, copy_rate: float) -> Row:
    case = subject.case
    grad = not built.forward_only
    if mode == "fwd":
        times = clock.measure(lambda: _run(built.call, case, grad=grad))
    elif mode == "bwd":
        outputs = _run(built.call, case, grad=True)
        times = clock.measure(lambda: _gradients(outputs, case, keep=True))
    else:
        times = clock.measure(lambda: _gradients(_run(built.call, case, grad=True), case))
        row = replace(row, peak_mb=_peak_mb(built, case), saved_mb=_saved_mb(built, case))
    if subject.cost is not None:
        cost = subject.cost(mode)
        rate = cost.bytes / (1e-3 * times.median)
        row = replace(
            row,
            gb_per_s=rate / 1e9,
            copy_share=rate / copy_rate,
            tflop_per_s=cost.flops / (1e-3 * times.median) / 1e12 if cost.flops else None,
        )
    return replace(
        row, status="timed", median_ms=times.median, q20_ms=times.low, q80_ms=times.high,
        repeats=times.repeats, clock=times.how,
    )  # fmt: skip


def _peak_mb(built: Built, case: Case) -> float | None:
    """Return the memory that forward and backward need above what is there already."""
    if case.device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _gradients(_run(built.call, case, grad=True), case)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def _saved_mb(built: Built, case: Case) -> float | None:
    """Return the size of what the forward keeps for the backward, the inputs left out."""
    held = {x.untyped_storage().data_ptr() for x in case.inputs}
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Any:
        storage = x.untyped_storage()
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            outputs = _run(built.call, case, grad=True)  # alive until counted: addresses are not used twice
    except RuntimeError:  # a compiled function may refuse hooks; that costs it this figure, not its time
        return None
    del outputs
    return sum(saved.values()) / 1e6
