"""Where the time of a step goes: torch's profiler over a few warm steps, by part of the network and by operator.

Parts are the ranges that the training code itself opens (`flamingo_dist.models.ranges`). A backward operation belongs
to the part whose forward made its node: autograd numbers nodes, and the profiler records the numbers on both sides. A
range that opens inside a backward operation is a recomputation.
"""

import csv
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from flamingo_dist.models.ranges import Part

STEPS = 3
"""Steps that a profile covers."""
OPERATORS = 25
"""Operators that the table names, the most expensive ones."""
BACKWARD = "autograd::engine::evaluate_function: "
COLLECTIVE = ("c10d::", "_c10d_functional::", "nccl:", "gloo:", "record_param_comms")
"""Beginnings of the names of collectives' events."""
ONCE = ("data", "optimizer")
"""Parts without a backward."""
_PARTS = frozenset(get_args(Part))
Place = tuple[str, str]
"""A part and "forward", "backward", "recompute" or ""."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a profile; times are milliseconds a step."""

    network: str
    """Name of the network."""
    contender: str
    """Whose step."""
    kind: str
    """`part`, `operator` or `whole`."""
    name: str
    """Of the part or the operator; of a whole: `wall`, or `busy`, all kernels together."""
    direction: str = ""
    """`forward`, `backward` or `recompute` of a part that has them."""
    calls: float = 0.0
    """Operations a step."""
    ms: float
    """Kernels' time on a GPU, the operations' own time on a CPU."""
    host_ms: float = 0.0
    """The operations' own time on the host, the profiler's cost included."""
    share: float = 0.0
    """Of all kernels' time, or of all operations' on a CPU."""


def profile_step(
    step: Callable[[], object], *, network: str, contender: str, device: torch.device, folder: Path
) -> list[Line]:
    """Profile warm steps and write their Chrome trace, `trace-NETWORK-CONTENDER.json.gz`.

    Args:
        step: runs one step; called three times.
        network: its name.
        contender: whose step it is.
        device: where it runs.
        folder: of the trace.

    Returns:
        The lines of the table.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        started = time.perf_counter()
        for _ in range(STEPS):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        wall = 1e3 * (time.perf_counter() - started) / STEPS
    folder.mkdir(parents=True, exist_ok=True)
    short = "".join(c if c.isalnum() else "-" for c in contender).strip("-")
    profiler.export_chrome_trace(str(folder / f"trace-{network}-{short}.json.gz"))
    blank = Line(network=network, contender=contender, kind="", name="", ms=0.0)
    return summarise(
        list(profiler.events() or []), blank, steps=STEPS, on_gpu=device.type == "cuda", wall=wall
    )


def summarise(events: Sequence[Any], blank: Line, *, steps: int, on_gpu: bool, wall: float) -> list[Line]:
    """Return the lines of recorded events: the whole, then parts and operators, the most expensive first.

    Args:
        events: torch's `FunctionEvent`s.
        blank: a line with the names that all share.
        steps: how many steps they cover.
        on_gpu: whether kernels' time counts, or the host's.
        wall: milliseconds of a step by the clock.
    """
    on_host = [e for e in events if e.device_type == DeviceType.CPU]
    places = _places(on_host)
    by_part: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    by_operator: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for event in on_host:
        host = event.self_cpu_time_total
        own = event.self_device_time_total if on_gpu else host
        tables = [by_part[places[event.id]]]
        if not event.is_user_annotation:
            tables.append(by_operator[event.name, ""])
        for sums in tables:
            for i, value in enumerate((1.0, own, host)):
                sums[i] += value
    busy = sum(own for _, own, _ in by_part.values())
    lines = [
        replace(blank, kind="whole", name="wall", ms=wall),
        replace(blank, kind="whole", name="busy", ms=1e-3 * busy / steps, share=1.0),
    ]
    for kind, table in (("part", by_part), ("operator", by_operator)):
        lines += _lines(replace(blank, kind=kind), table, steps, busy)[
            : OPERATORS if kind == "operator" else None
        ]
    return lines


def _lines(blank: Line, table: Mapping[Place, Sequence[float]], steps: int, busy: float) -> list[Line]:
    lines = [
        replace(
            blank,
            name=name,
            direction=direction,
            calls=calls / steps,
            ms=1e-3 * own / steps,
            host_ms=1e-3 * host / steps,
            share=own / busy if busy else 0.0,
        )
        for (name, direction), (calls, own, host) in table.items()
    ]
    return sorted(lines, key=lambda line: line.ms, reverse=True)


def _places(events: Iterable[Any]) -> dict[int, Place]:
    """Return where each event of the host belongs, by the event's number."""
    ordered = sorted(events, key=lambda e: e.time_range.start)
    found: dict[int, tuple[str | None, Any]] = {}  # innermost range, and the backward operation around it
    for event in ordered:
        part, backward = found[event.cpu_parent.id] if event.cpu_parent is not None else (None, None)
        if event.name.startswith(BACKWARD):
            part, backward = None, event
        elif event.name in _PARTS:
            part = event.name
        elif event.name.startswith(COLLECTIVE):
            part = "collectives"
        found[event.id] = part, backward
    # The node with a number is made by the last operation that saw it.
    made_in = {
        (e.thread, e.sequence_nr): found[e.id][0]
        for e in ordered
        if e.sequence_nr >= 0 and found[e.id][1] is None
    }
    places: dict[int, Place] = {}
    for number, (part, backward) in found.items():
        if part == "collectives" or part in ONCE:
            places[number] = part, ""
        elif backward is None:
            places[number] = part or "other", "forward" if part else ""
        elif part is not None:
            places[number] = part, "recompute"
        else:
            made = made_in.get((backward.fwd_thread, backward.sequence_nr))
            places[number] = made or "other", "backward"
    return places


def write_profile(lines: Sequence[Line], folder: Path) -> Path:
    """Write `profile.csv` and `profile.md` into `folder` and return the path of the second."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "profile.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Line)])
        writer.writeheader()
        writer.writerows(asdict(line) for line in lines)
    page = folder / "profile.md"
    page.write_text(_page(lines), encoding="utf-8")
    return page


def _page(lines: Sequence[Line]) -> str:
    text = [
        "# Where the time of a step goes",
        "",
        f"Means of {STEPS} warm steps under torch's profiler. ms is the kernels' time on a GPU and the operations' own "
        "time on a CPU; what streams run at once counts twice. host ms holds the profiler's own cost.",
    ]
    for network, contender in dict.fromkeys((line.network, line.contender) for line in lines):
        mine = [line for line in lines if (line.network, line.contender) == (network, contender)]
        wall, busy = (line.ms for line in mine if line.kind == "whole")
        text += [
            "",
            f"## {network}, {contender}",
            "",
            f"A step took {wall:.2f} ms, of which {busy:.2f} ms in operations.",
        ]
        for kind in ("part", "operator"):
            text += [
                "",
                f"| {kind} | | ms | share | host ms | calls |",
                "| --- | --- | ---: | ---: | ---: | ---: |",
            ]
            text += [_table_line(line) for line in mine if line.kind == kind]
    return "\n".join(text) + "\n"


def _table_line(line: Line) -> str:
    name = line.name.replace("|", "/")
    figures = f"{line.ms:.3f} | {line.share:.1%} | {line.host_ms:.3f} | {line.calls:.1f}"
    return f"| {name} | {line.direction} | {figures} |"
