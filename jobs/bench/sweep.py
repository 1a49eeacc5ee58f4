"""Which comparisons are run, in which order, and the run itself."""

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from jobs.bench import layers, others, xattn
from jobs.bench.cases import make_case
from jobs.bench.compare import compare, core_subject
from jobs.bench.contender import Contender
from jobs.bench.roofline import MODES, cost
from jobs.bench.rows import Results, Row, environment
from jobs.bench.shapes import (
    FUSED,
    OPS,
    PERCEIVER,
    TINY,
    XATTN,
    PerceiverShape,
    Shape,
    XattnShape,
    resampler_sweep,
    sizes,
    sweep,
)
from jobs.bench.timing import Clock, copy_bandwidth
from jobs.console import first_line

Level = Literal["core", "layer"]
LEVELS: tuple[Level, ...] = ("core", "layer")

CORE: dict[str, Sequence[Contender]] = {
    "gated_xattn": xattn.CONTENDERS,
    "perceiver_attn": others.PERCEIVER,
    "add_layernorm": others.ADD_LAYERNORM,
    "gated_relu2": others.GATED_RELU2,
}
LAYER: dict[str, Sequence[Contender]] = {"gated_xattn": layers.XATTN, "perceiver_attn": layers.PERCEIVER}


@dataclass(frozen=True)
class Task:
    """One shape at one level."""

    level: Level
    shape: Shape
    compiled: bool = False
    """Whether the contenders that need torch.compile run, or the others."""


def tasks() -> Iterator[Task]:
    """Yield all tasks, the most important first: whatever the budget cuts off is what matters least."""
    seen: set[Task] = set()
    for task in _ordered():
        if task not in seen and not (task.level == "layer" and task.shape.op not in LAYER):
            seen.add(task)
            yield task


def _ordered() -> Iterator[Task]:
    main: list[Shape] = list(XATTN[:6])
    small: list[Shape] = [*PERCEIVER[:2], *FUSED[:2]]
    rest: list[Shape] = [*XATTN[6:], *PERCEIVER[2:], *FUSED[2:]]
    yield from (Task("core", shape) for shape in (*main, *small))
    yield from (Task("layer", shape) for shape in (*main[2:], *small, main[0]))
    yield from (Task("core", shape, compiled=True) for shape in FUSED[:2])
    yield from (Task("layer", shape, compiled=True) for shape in (main[0], main[2]))
    yield from (Task("core", shape, compiled=True) for shape in (main[0], PERCEIVER[0], *main[1:4]))
    yield from (Task("core", shape) for shape in rest)
    for number, swept in enumerate(sweep()):
        yield Task("core", swept)
        if number < 27:  # even spans: large batches, then tiny ones
            yield Task("layer", swept)
        if number == 26:
            yield from (Task("core", features) for features in resampler_sweep())
            yield from (Task("layer", shape, compiled=True) for shape in main[2:])
    every = [*main, *small, *rest]
    yield from (Task(level, shape, compiled=True) for level in LEVELS for shape in every)
    yield from (Task("core", swept, compiled=True) for swept in sweep())


def tiny_tasks() -> Iterator[Task]:
    """Yield the tasks of a machine without a GPU."""
    for shape in TINY:
        yield from (Task("core", shape, compiled) for compiled in (False, True))
    yield from (Task("layer", shape) for shape in (TINY[0], TINY[2]))


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A run of the kernels' benchmark."""

    device: torch.device
    """Where."""
    tiny: bool = False
    """Tiny shapes in fp32, for a machine without a GPU: proves the path, measures nothing."""
    budget_seconds: float | None = None
    """No task is begun after so many seconds; None for no limit."""
    ops: Sequence[str] = OPS
    """Operations that take part."""
    levels: Sequence[Level] = LEVELS
    """Levels that take part."""
    contenders: Sequence[str] = ()
    """Parts of names of contenders that take part; empty for all. Ours always do."""
    shapes: Sequence[str] = ()
    """Parts of names of shapes that take part; empty for all."""
    red: Mapping[str, str] = field(default_factory=dict)
    """Operations whose tests are red, with the reason."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of all tensors."""
        return torch.float32 if self.tiny else torch.bfloat16

    def wants(self, task: Task) -> bool:
        """Whether the task takes part."""
        shape = task.shape.name.lower()
        chosen = not self.shapes or any(part.lower() in shape for part in self.shapes)
        return task.level in self.levels and task.shape.op in self.ops and chosen

    def picks(self, contender: Contender) -> bool:
        """Whether the contender takes part."""
        name = contender.name.lower()
        return not self.contenders or contender.ours or any(part.lower() in name for part in self.contenders)


def run(config: SweepConfig, after_task: Callable[[Results, str], None]) -> Results:
    """Run the tasks within the budget.

    Args:
        config: the run.
        after_task: is told the results so far and one line about the task.
    """
    started = time.monotonic()
    clock = (
        Clock(config.device, budget_ms=5.0, min_repeats=2, max_repeats=3)
        if config.tiny
        else Clock(config.device)
    )
    copy_rate = copy_bandwidth(clock)
    rows: list[Row] = []
    chosen = [task for task in (tiny_tasks() if config.tiny else tasks()) if config.wants(task)]
    about = environment(
        config.device, copy_gb_per_s=copy_rate / 1e9, dtype=str(config.dtype).removeprefix("torch.")
    )
    about |= {"not_reached": 0, "red": dict(config.red)}
    for number, task in enumerate(chosen):
        if config.budget_seconds is not None and time.monotonic() - started > config.budget_seconds:
            about["not_reached"] = len(chosen) - number
            break
        try:
            new = run_task(task, config, clock, copy_rate)
        except KeyboardInterrupt:  # a time limit from outside: what there is still makes a page
            about["not_reached"] = len(chosen) - number
            break
        rows += new
        if new:
            after_task(Results(environment=about, rows=rows), _line(task, new, time.monotonic() - started))
        if config.device.type == "cuda" and _is_lost(rows):
            about["not_reached"] = len(chosen) - number - 1
            break
    about["seconds"] = round(time.monotonic() - started, 1)
    return Results(environment=about, rows=rows)


def run_task(task: Task, config: SweepConfig, clock: Clock, copy_rate: float) -> list[Row]:
    """Return one task's rows."""
    table = CORE if task.level == "core" else LAYER
    contenders = [c for c in table[task.shape.op] if c.compiled == task.compiled and config.picks(c)]
    if not contenders:
        return []
    blank = _blank(task, config)
    if task.compiled:
        torch._dynamo.reset()
    try:
        if task.level == "core":
            case = make_case(task.shape, device=config.device, dtype=config.dtype)
            itemsize = case.inputs[0].element_size()
            subject = core_subject(case, blank, lambda mode: cost(task.shape, mode, itemsize=itemsize))
        else:
            why = layers.missing()
            if why:
                return [_left_out(blank, contender, why) for contender in contenders]
            assert isinstance(task.shape, XattnShape | PerceiverShape)
            subject = layers.layer_subject(task.shape, config.device, config.dtype, blank)
    except Exception as error:  # out of memory, or a layer that cannot be built: never the end of the sweep
        why = f"no fp64 reference, and what is not checked is not timed: {first_line(error, kind=True)}"
        return [_left_out(blank, contender, why) for contender in contenders]
    finally:
        gc.collect()
    return compare(subject, contenders, clock, copy_rate, config.red, MODES)


def _blank(task: Task, config: SweepConfig) -> Row:
    numbers = " ".join(f"{key}={value}" for key, value in sizes(task.shape).items())
    return Row(
        level=task.level, op=task.shape.op, shape=task.shape.name, sizes=numbers, contender="", ours=False,
        mode="", dtype=str(config.dtype).removeprefix("torch."), status="left out",
    )  # fmt: skip


def _left_out(blank: Row, contender: Contender, why: str) -> Row:
    return replace(blank, contender=contender.name, ours=contender.ours, mode="fwd+bwd", reason=why)


def _is_lost(rows: Sequence[Row]) -> bool:
    """Whether the GPU no longer answers: after an illegal access nothing in this process runs any more."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return bool(rows) and "illegal memory access" in rows[-1].reason


def _line(task: Task, rows: Sequence[Row], seconds: float) -> str:
    """Return what the terminal says about a task."""
    both = {row.contender: row for row in rows if row.mode == "fwd+bwd"}
    timed = {name: row.median_ms for name, row in both.items() if row.median_ms is not None}
    shown = ", ".join(
        f"{name} {ms:.3f} ms" for name, ms in sorted(timed.items(), key=lambda item: item[1])[:4]
    )
    refused = [name for name, row in both.items() if row.status == "refused"]
    tail = f"; refused: {', '.join(refused)}" if refused else ""
    return (
        f"[{seconds:5.0f} s] {task.level} {task.shape.op} {task.shape.name}: {shown or 'nothing timed'}{tail}"
    )
