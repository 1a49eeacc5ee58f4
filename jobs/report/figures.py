"""The pictures of a report.

Each function takes a run and returns an `<svg>` element, or None where the run recorded no such data.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import numpy as np
from matplotlib import colormaps

from jobs.console import mean_magnitude
from jobs.report.charts import Chart, bins, colour, smooth, style, thin
from jobs.report.read import Run
from jobs.report.summary import PROBE_KINDS

Points: TypeAlias = list[tuple[float, float]]
"""(step, value) pairs."""

STEP_PARTS = ("data", "forward_backward", "optimizer", "checkpoint")
"""Parts of a step's seconds; what they leave over is "other"."""


def loss_curves(run: Run) -> str | None:
    """Draw the loss of each data set: steps faint, running mean on them, held-out loss as points."""
    names = _names(run.steps, "loss")
    if not names:
        return None
    with style():
        chart = Chart(len(names))
        for place, (axes, name) in enumerate(zip(chart.axes, names, strict=True)):
            _raw_and_smooth(axes, _points(run.steps, "loss", name), colour(place), label="training")
            held_out = _points(run.probes, "data", name, "true")
            if held_out:
                axes.plot(*zip(*held_out, strict=True), "o", color=colour(place), ms=3, label="held out")
                axes.legend()
            axes.set(title=name, xlabel="step", ylabel="nats a token" if place == 0 else None)
        return chart.svg("Training loss of each data set over the steps")


def optimiser(run: Run) -> str | None:
    """Draw the learning rate and the norm of the gradient."""
    named = {"learning rate": _points(run.steps, "lr"), "gradient norm": _points(run.steps, "grad_norm")}
    named = {title: points for title, points in named.items() if points}
    if not named:
        return None
    with style():
        chart = Chart(len(named), columns=2)
        for axes, (title, points) in zip(chart.axes, named.items(), strict=True):
            steps, values = zip(*points, strict=True)
            axes.plot(*thin(steps, values), color=colour(0), linewidth=1.0)
            # A few spikes would press an otherwise even norm to the floor.
            if title == "gradient norm" and min(values) > 0 and max(values) > 20 * float(np.median(values)):
                axes.set_yscale("log")
            else:
                axes.set_ylim(bottom=0)
            axes.set(title=title, xlabel="step")
        return chart.svg("Learning rate and gradient norm over the steps")


def gates(run: Run) -> str | None:
    """Draw how far the gates of every block are open, attention and feed-forward."""
    steps = [step for step in run.steps if any(step.get("gates", {}).values())]
    if not steps:
        return None
    titles = {"attn": "cross-attention gates", "ffw": "feed-forward gates"}
    kinds = [kind for kind in titles if steps[-1]["gates"].get(kind)]
    numbers = [step["step"] for step in steps]
    with style():
        chart = Chart(len(kinds), columns=2, height=2.8)
        for axes, kind in zip(chart.axes, kinds, strict=True):
            blocks = len(steps[-1]["gates"][kind])
            shades = colormaps["plasma"](np.linspace(0.1, 0.8, blocks))
            for block, shade in enumerate(shades):
                values = [mean_magnitude(step["gates"][kind][block]) for step in steps]
                label = f"block {block + 1}" if block in (0, blocks - 1) else None
                axes.plot(*thin(numbers, values), color=shade, linewidth=1.1, label=label)
            axes.set(title=titles[kind], xlabel="step", ylabel="|tanh(gate)|")
            axes.set_ylim(bottom=0)
        chart.axes[0].legend()
        return chart.svg("Gate values of every gated block over the steps")


def grounding(run: Run) -> str | None:
    """Draw the four losses of the probe for each data set, and the gap of all."""
    names = _names(run.probes, "data")
    if not names:
        return None
    dashes = {"true": "-", "shuffled": "-", "blank": "--", "gates_off": ":"}
    with style():
        chart = Chart(len(names) + 1)
        *panels, last = chart.axes
        for place, (axes, name) in enumerate(zip(panels, names, strict=True)):
            lines = {kind: _points(run.probes, "data", name, kind) for kind in PROBE_KINDS}
            for shade, (kind, points) in enumerate(lines.items()):
                _line(axes, points, dashes[kind], color=colour(shade), label=kind.replace("_", " "))
            axes.set(title=name, xlabel="step", ylabel="held-out nats a token" if place == 0 else None)
            true = dict(lines["true"])
            gap = [(step, value - true[step]) for step, value in lines["shuffled"] if step in true]
            _line(last, gap, "-", color=colour(place + 4), label=name)
        panels[0].legend()
        last.axhline(0, color="#888888", linewidth=0.8)
        last.set(title="gap: shuffled - true", xlabel="step")
        last.legend()
        return chart.svg("Grounding probe over the steps")


def candidates(run: Run) -> str | None:
    """Draw how often the right name ranks first or among five, against chance."""
    names = _names(run.probes, "candidates")
    if not names:
        return None
    with style():
        chart = Chart(len(names))
        for axes, name in zip(chart.axes, names, strict=True):
            for place, kind in enumerate(("top1", "top5")):
                label = kind.replace("top", "top-")
                found = _points(run.probes, "candidates", name, kind)
                chance = _points(run.probes, "candidates", name, f"chance_{kind}")
                _line(axes, found, "-", color=colour(place), label=label)
                _line(axes, chance, ":", color=colour(place), label=f"{label} by chance")
            axes.set(title=name, xlabel="step", ylabel="share of queries")
            axes.set_ylim(bottom=0)
        chart.axes[0].legend()
        return chart.svg("Candidate scoring over the steps, with chance")


def speed(run: Run) -> str | None:
    """Draw tokens a second, where the time of a step goes, and the share of the machine's peak."""
    # The first step pays for start-up and would set the scale for all others.
    steps = [step for step in run.steps[1:] if step.get("seconds", {}).get("step")]
    if not steps:
        return None
    with style():
        used = {"useful MFU": _points(steps, "useful_mfu"), "HFU": _points(steps, "hfu")}
        chart = Chart(3 if used["HFU"] else 2, columns=2, height=2.8)
        left, right, *rest = chart.axes
        for axes in rest:
            for place, (label, points) in enumerate(used.items()):
                _raw_and_smooth(axes, points, colour(place), label=label)
            axes.set(title="share of the peak", xlabel="step")
            axes.set_ylim(bottom=0)
            axes.legend()
        _raw_and_smooth(left, _points(steps, "tokens_per_second"), colour(0))
        left.set(title="tokens a second", xlabel="step")
        left.set_ylim(bottom=0)
        x, areas = bins([step["step"] for step in steps], _step_parts(steps))
        labels = [part.replace("_", " + ") for part in STEP_PARTS] + ["other"]
        shades = [colour(place) for place in (1, 0, 2, 3, 5)]
        right.stackplot(x, areas, labels=labels, colors=shades, alpha=0.85)
        right.set(title="seconds a step", xlabel="step")
        right.legend(loc="upper left", ncols=3)
        # Room above the areas for the legend.
        right.set_ylim(0, 1.35 * float(np.sum(areas, axis=0).max()))
        return chart.svg("Throughput and seconds of a step by part")


def _names(records: Iterable[dict[str, Any]], part: str) -> list[str]:
    """List the data sets that any record has in one of its parts, in order of appearance."""
    return list(dict.fromkeys(name for record in records for name in record.get(part) or {}))


def _points(records: Iterable[dict[str, Any]], *path: str) -> Points:
    """Points (step, value) of the records that hold a number at `path`."""
    points = []
    for record in records:
        value: Any = record
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            points.append((record["step"], float(value)))
    return points


def _line(axes: Any, points: Points, dashes: str, **looks: Any) -> None:
    """Draw a line through few points, each marked."""
    if points:
        axes.plot(*zip(*points, strict=True), dashes, marker="o", ms=3, **looks)


def _raw_and_smooth(axes: Any, points: Points, shade: str, **looks: Any) -> None:
    """Draw every value faint and the running mean on it."""
    if points:
        steps, values = zip(*points, strict=True)
        axes.plot(*thin(steps, values), color=shade, alpha=0.25, linewidth=0.8)
        axes.plot(*thin(steps, smooth(values).tolist()), color=shade, **looks)


def _step_parts(steps: list[dict[str, Any]]) -> list[list[float]]:
    """Seconds of each part of `STEP_PARTS`, then what they leave of the whole step."""
    parts = [[step["seconds"].get(part, 0.0) for step in steps] for part in STEP_PARTS]
    known = [math.fsum(values) for values in zip(*parts, strict=True)]
    return [*parts, [max(step["seconds"]["step"] - own, 0.0) for step, own in zip(steps, known, strict=True)]]


FIGURES: dict[str, tuple[Callable[[Run], str | None], str, str]] = {
    "loss": (loss_curves, "Loss", "Each step faint, its running mean on it; points are the held-out loss."),
    "grounding": (
        grounding,
        "Grounding",
        "The same held-out texts with their own images, with those of other samples, with blank images, and "
        "by the bare language model. The gap between shuffled and true is what the right image is worth. It "
        "can widen while the true loss rises (over-fitting): read both.",
    ),
    "candidates": (
        candidates,
        "Candidate names",
        "Known names ranked by log-likelihood given a held-out image. Dotted: random scores.",
    ),
    "gates": (
        gates,
        "Gates",
        "One line a gated block, dark to light from first to last. At 0 the network is the bare LM.",
    ),
    "optimiser": (optimiser, "Optimizer", "Norm of the whole gradient before clipping."),
    "speed": (speed, "Speed", "Without the first step. Data is the time that a step waits for its batches."),
}
"""Pictures in the order of the page: function, heading, caption."""
