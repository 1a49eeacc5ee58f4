"""Every layout of a run on given GPUs, ranked."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from flamingo_dist.parallel.topology import Topology
from flamingo_dist.planning.flops import step_flops
from flamingo_dist.planning.hardware import GIB, Assumptions
from flamingo_dist.planning.memory import Residency, activation_memory, gathered_bytes, state_memory
from flamingo_dist.planning.parameters import check_fp8_shapes
from flamingo_dist.planning.seconds import Machine, link_bytes, step_seconds
from flamingo_dist.planning.traffic import step_traffic
from flamingo_dist.planning.workload import Workload

ROUNDING = 1e-5
"""How far a scaled batch may be from a whole number, relatively: a factor such as 4/3 is given in a few digits."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One layout with its predictions for one GPU and one step."""

    tp: int
    """Tensor-parallel degree."""
    dp: int
    """Data-parallel degree."""
    residency: Residency
    """Where frozen weights live."""
    fits: bool
    """Whether it fits in memory."""
    memory_gib: float
    """Peak of one GPU."""
    step_seconds: float
    """Seconds of a step."""
    tokens_per_second: float
    """Text tokens of all GPUs, padding included."""
    useful_mfu: float
    """Useful operations over the bf16 peak of all GPUs: no recomputation, no repeated encoder."""
    hfu: float
    """All operations that the GPUs run, over the same peak."""
    memory: dict[str, float]
    """GiB by kind; adds up to `memory_gib`."""
    transient: dict[str, float]
    """GiB of what follows one another; one of them is `memory`'s `transient`: that of the phase with the peak."""
    seconds: dict[str, float]
    """Seconds by part; adds up to `step_seconds`."""
    traffic: dict[str, dict[str, float]]
    """GB that a GPU sends in a step, by kind and link."""
    days: float | None = None
    """Days for the token budget."""
    gpu_hours: float | None = None
    """GPU-hours for the token budget."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All layouts, best first."""

    layouts: list[Layout]
    """Those that fit, fastest first."""
    too_large: list[Layout]
    """Those that do not fit, smallest first."""
    refused: list[str]
    """Degrees that cannot run, and why."""
    flops: dict[str, dict[str, float]]
    """Operations of a step over all GPUs, by part."""

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data."""
        return asdict(self)


def make_plan(work: Workload, machine: Machine, *, budget_tokens: float | None = None) -> Plan:
    """Predict every layout of `work` on `machine`.

    Args:
        work: the run.
        machine: the GPUs.
        budget_tokens: text tokens of the whole training, for days and GPU-hours.

    Raises:
        ValueError: fewer than one GPU.
    """
    if machine.gpus < 1 or machine.gpus_per_node < 1:
        raise ValueError(f"gpus={machine.gpus} and gpus_per_node={machine.gpus_per_node} must be at least 1.")
    layouts, refused = [], []
    whole_only = work.parallel.zero_stage != 3 or work.model.lm.weight_storage != "same"
    residencies: tuple[Residency, ...] = ("resident",) if whole_only else ("resident", "partitioned")
    for tp in tensor_degrees(machine):
        reason = refusal(work, machine, tp)
        if reason:
            refused.append(reason)
            continue
        # On one data-parallel rank there is nothing to partition over.
        chosen = residencies if machine.gpus > tp else ("resident",)
        layouts += [_layout(work, machine, tp, residency, budget_tokens) for residency in chosen]
    fitting = sorted((x for x in layouts if x.fits), key=lambda x: (x.step_seconds, x.memory_gib))
    large = sorted((x for x in layouts if not x.fits), key=lambda x: x.memory_gib)
    return Plan(layouts=fitting, too_large=large, refused=refused, flops=step_flops(work))


def tensor_degrees(machine: Machine) -> list[int]:
    """Return the tensor-parallel degrees to try: divisors of a node's GPUs, so that every group lies in one node.

    Across nodes its sums would be on the network, and they are priced as NVLink's.
    """
    node = min(machine.gpus, machine.gpus_per_node)
    return [tp for tp in range(1, node + 1) if node % tp == 0]


def refusal(work: Workload, machine: Machine, tp: int) -> str:
    """Return why the degree cannot run, or "".

    Args:
        work: the run; without data sets its batches are left out.
        machine: the GPUs.
        tp: one of `tensor_degrees`.
    """
    if machine.gpus % tp:
        return f"tp {tp}: does not divide {machine.gpus} GPUs."
    sizes = work.model.tensor_sizes()
    if work.model.lm.weights is None:
        sizes["lm.vocab_size (random weights)"] = work.model.lm.vocab_size
    try:
        Topology(world=machine.gpus, rank=0, tensor=tp).check_divisible(sizes)
        check_fp8_shapes(work.model.lm, tp)
    except ValueError as error:
        return f"tp {tp}: {error}"
    if work.model.lm.matrix_products == "fp8" and not machine.gpu.fp8_tflops:
        return f"tp {tp}: model.lm.matrix_products='fp8' needs a GPU with fp8 matrix units (h100 and later)."
    dp = machine.gpus // tp
    bad = [f"{d.name} has {d.rows}" for d in work.datasets if d.rows % dp]
    return f"tp {tp}: rows of a batch must divide among {dp} ranks; {', '.join(bad)}." if bad else ""


def _layout(
    work: Workload, machine: Machine, tp: int, residency: Residency, budget_tokens: float | None
) -> Layout:
    dp = machine.gpus // tp
    memory, transient = rank_memory(work, machine.assumptions, tp=tp, dp=dp, residency=residency)
    seconds = step_seconds(work, machine, tp=tp, dp=dp, residency=residency)
    step, tokens = sum(seconds.values()), work.tokens_per_step()
    parts = step_flops(work)
    useful = sum(p["forward"] + p["backward"] for p in parts.values())
    repeats = 0 if work.parallel.split_vision else tp - 1
    hardware = useful + sum(p["recompute"] for p in parts.values()) + repeats * parts["vision"]["forward"]
    peak = machine.gpus * machine.gpu.bf16_tflops * 1e12
    days = None if budget_tokens is None else budget_tokens / tokens * step / 86_400
    kinds = step_traffic(work, tp=tp, dp=dp, residency=residency)
    total = sum(memory.values())
    return Layout(
        tp=tp,
        dp=dp,
        residency=residency,
        fits=total <= machine.gpu.memory_gib,
        memory_gib=total,
        step_seconds=step,
        tokens_per_second=tokens / step,
        useful_mfu=useful / step / peak,
        hfu=hardware / step / peak,
        memory=memory,
        transient=transient,
        seconds=seconds,
        traffic={
            kind: {link: size / 1e9 for link, size in link_bytes(traffic, machine, tp=tp).items()}
            for kind, traffic in kinds.items()
        },
        days=days,
        gpu_hours=None if days is None else days * 24 * machine.gpus,
    )


def rank_memory(
    work: Workload, assumptions: Assumptions, *, tp: int, dp: int, residency: Residency
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the peak GiB of one rank by kind, and the transients of its phases, of which one counts.

    Args:
        work: the run.
        assumptions: for the reserve.
        tp: tensor-parallel degree.
        dp: data-parallel degree.
        residency: where frozen weights live.
    """
    memory = state_memory(work, tp=tp, dp=dp, residency=residency)
    gathered = gathered_bytes(work, tp=tp, dp=dp, residency=residency)
    # Data sets follow one another, and in each the phases; the peak is that of the largest.
    sets = [activation_memory(work, data, tp=tp, dp=dp) for data in work.datasets]
    moments = [(phase, s["kept"] * (phase != "vision"), s) for s in sets for phase in gathered]
    phase, kept, largest = max(moments, key=lambda m: m[1] + m[2][m[0]] + gathered[m[0]])
    transient = {name: largest[name] / GIB for name in gathered}
    memory |= {"gather_buffers": gathered[phase], "activations": kept, "transient": largest[phase]}
    in_gib = {name: value / GIB for name, value in memory.items()}
    in_gib["reserve"] = assumptions.reserve_gib + assumptions.fragmentation * sum(in_gib.values())
    return in_gib, transient


def scale_batches(work: Workload, factor: float) -> Workload | None:
    """Return the run with batches scaled; None where a batch would not be whole."""
    rows = [d.rows * factor for d in work.datasets]
    if any(r < 1 - ROUNDING or not math.isclose(r, round(r), rel_tol=ROUNDING) for r in rows):
        return None
    datasets = tuple(replace(d, rows=round(r)) for d, r in zip(work.datasets, rows, strict=True))
    return replace(work, datasets=datasets)
