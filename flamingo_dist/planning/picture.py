"""Stacked bars of a plan: memory and time of each layout."""

from pathlib import Path

from flamingo_dist.planning.plan import Layout


def draw_plan(layouts: list[Layout], path: Path, *, memory_gib: float) -> None:
    """Write a picture of the layouts.

    Args:
        layouts: in the order of the bars.
        path: a file of a kind that matplotlib writes, such as `.svg`.
        memory_gib: memory of a GPU, drawn as a line.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.6 + 0.9 * len(layouts)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    labels = [f"TP {x.tp} x DP {x.dp}\n{x.residency}" for x in layouts]
    for axis, bars, title in (
        (axes[0], [x.memory for x in layouts], "memory of a GPU, GiB"),
        (axes[1], [x.seconds for x in layouts], "seconds of a step"),
    ):
        left = [0.0] * len(layouts)
        for name in bars[0]:
            values = [bar[name] for bar in bars]
            axis.barh(labels, values, left=left, label=name)
            left = [a + b for a, b in zip(left, values, strict=True)]
        axis.set_xlabel(f"{title} (predicted)")
        axis.legend(fontsize=7)
    axes[0].axvline(memory_gib, color="black", linestyle="--")
    axes[0].invert_yaxis()
    figure.savefig(path)
