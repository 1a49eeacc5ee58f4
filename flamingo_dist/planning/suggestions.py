"""What would help where no layout of a run works on given GPUs; each change is tried before it is named."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice

from flamingo_dist.models.recompute import Recompute
from flamingo_dist.planning.plan import make_plan, refusal, scale_batches, tensor_degrees
from flamingo_dist.planning.seconds import Machine
from flamingo_dist.planning.workload import Workload

TRIES = 8
"""Numbers of GPUs, or batches, that are tried on each side: the nearest may not fit in memory."""


def suggestions(work: Workload, machine: Machine) -> list[str]:
    """Return the single changes that make a layout run and fit, each tried; empty if none of them does.

    Args:
        work: the run.
        machine: GPUs on which none of its layouts fits.
    """
    if not make_plan(work, machine).too_large:
        # The run does not divide among them, which nothing but other numbers changes.
        below, above = _gpus_below(work, machine), _gpus_above(work, machine)
        gpus = _first_that_fits(work, machine, below) + _first_that_fits(work, machine, above)
        return gpus + _nearest_batches(work, machine)
    found = []
    recompute: tuple[Recompute, ...] = ("selective", True)
    # What is recomputed already cannot be recomputed less to any use.
    for value in recompute if not work.parallel.activation_checkpointing else ():
        parallel = replace(work.parallel, activation_checkpointing=value)
        if make_plan(replace(work, parallel=parallel), machine).layouts:
            found.append(f"parallel.activation_checkpointing={value}")
            break
    found += _rows_in_parts(work, machine)
    if work.parallel.zero_stage != 3:
        parallel = replace(work.parallel, zero_stage=3)
        best = make_plan(replace(work, parallel=parallel), machine).layouts
        if best:
            found.append(f"parallel.zero_stage=3 with parallel.frozen={best[0].residency!r}")
    if work.model.lm.weight_storage == "same":
        lm = replace(work.model.lm, weight_storage="int8")
        if make_plan(replace(work, model=replace(work.model, lm=lm)), machine).layouts:
            found.append("model.lm.weight_storage='int8' (--weight-storage int8)")
    doubled = (machine.gpus * 2**power for power in range(1, 11))
    found += _first_that_fits(work, machine, doubled)
    return found + _doubled_batches(work, machine)


def _rows_in_parts(work: Workload, machine: Machine) -> list[str]:
    """Return the largest power of two of rows at once that makes a layout fit, as a suggestion, or nothing."""
    most = work.parallel.micro_rows or max(data.rows for data in work.datasets)
    for power in range(math.ceil(math.log2(most)) - 1, -1, -1):
        parallel = replace(work.parallel, micro_rows=2**power)
        if make_plan(replace(work, parallel=parallel), machine).layouts:
            return [f"parallel.micro_rows={2**power}"]
    return []


def _first_that_fits(work: Workload, machine: Machine, counts: Iterable[int]) -> list[str]:
    """Return the first of these numbers of GPUs on which a layout fits, as a suggestion, or nothing."""
    for gpus in counts:
        if make_plan(work, replace(machine, gpus=gpus)).layouts:
            return [f"{gpus} GPUs"]
    return []


def _gpus_below(work: Workload, machine: Machine) -> Iterator[int]:
    return islice(_dividing(work, machine, range(machine.gpus - 1, 0, -1)), TRIES)


def _gpus_above(work: Workload, machine: Machine) -> Iterator[int]:
    # More data-parallel ranks than every batch divides among cannot run.
    most = _common_rows(work) * machine.gpus_per_node
    return islice(_dividing(work, machine, range(machine.gpus + 1, most + 1)), TRIES)


def _dividing(work: Workload, machine: Machine, counts: Iterable[int]) -> Iterator[int]:
    """Yield those numbers of GPUs, of a part of a node or of whole ones, that the run divides among."""
    for gpus in counts:
        other = replace(machine, gpus=gpus)
        whole = gpus <= machine.gpus_per_node or gpus % machine.gpus_per_node == 0
        if whole and any(not refusal(work, other, tp) for tp in tensor_degrees(other)):
            yield gpus


def _common_rows(work: Workload) -> int:
    return math.gcd(*(data.rows for data in work.datasets))


def _nearest_batches(work: Workload, machine: Machine) -> list[str]:
    """Return the nearest factors of all batches, below and above 1, with which a layout runs and fits."""
    rows = _common_rows(work)
    factors = set()
    without_batches = replace(work, datasets=())
    for tp in tensor_degrees(machine):
        if refusal(without_batches, machine, tp):
            continue
        dp = machine.gpus // tp
        # Batches stay whole and divide among dp ranks where the factor is a multiple of dp / rows.
        nearest = rows // dp
        factors |= {times * dp / rows for times in range(max(1, nearest - TRIES), nearest + TRIES + 1)}
    found = []
    for near in (sorted((f for f in factors if f < 1), reverse=True), sorted(f for f in factors if f > 1)):
        for factor in near[:TRIES]:
            scaled = scale_batches(work, factor)
            if scaled is not None and make_plan(scaled, machine).layouts:
                found.append(_batch_words(factor))
                break
    return found


def _doubled_batches(work: Workload, machine: Machine) -> list[str]:
    """Return the nearest smaller and the nearest larger batches, by powers of two, that make a layout fit."""
    found = []
    for base in (0.5, 2.0):
        for power in range(1, 11):
            scaled = scale_batches(work, base**power)
            if scaled is None:
                break
            if make_plan(scaled, machine).layouts:
                found.append(_batch_words(base**power))
                break
    return found


def _batch_words(factor: float) -> str:
    if factor > 1:
        words = f"{factor:.8g} times larger"
    elif (1 / factor).is_integer():
        words = f"{1 / factor:.8g} times smaller"
    else:
        words = f"{factor:.8g} times as large"
    return f"batches {words} (--batch-scale {factor:.8g})"
