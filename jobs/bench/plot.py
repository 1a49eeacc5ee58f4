"""The picture of a benchmark: how near to a copy, and how much faster than the best baseline."""

from collections.abc import Sequence
from pathlib import Path

from jobs.bench.page import Duel, duels
from jobs.bench.rows import Results


def write_plot(results: Results, path: Path) -> bool:
    """Draw the results into `path` (the ending says the format); False where matplotlib is missing or nothing fits."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    fought = [duel for duel in duels(results.rows) if duel.mode == "fwd+bwd"]
    if not fought:
        return False
    shown = fought[:24]
    figure = Figure(figsize=(11, 1.4 + 0.32 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    speed, share = figure.subplots(1, 2, sharey=True)
    places = range(len(shown))
    speed.barh(places, [duel.ratio for duel in shown], color=_colours(shown))
    speed.axvline(1.0, color="#555555", linewidth=1)
    speed.set_yticks(places, [f"{duel.level} {duel.op}, {duel.shape}" for duel in shown], fontsize=8)
    speed.invert_yaxis()
    speed.set_xlabel("best baseline's time / ours, forward and backward (below 1 we lose)")
    known = [(place, duel.share) for place, duel in enumerate(shown) if duel.share is not None]
    share.barh([place for place, _ in known], [100 * value for _, value in known], color="#3b7dd8")
    share.set_xlabel("our GB/s as % of a copy's in the same run")
    title = f"{results.environment.get('gpu') or 'no GPU: tiny shapes, these times mean nothing'}"
    figure.suptitle(f"{title}, torch {results.environment.get('torch')}, {results.environment.get('triton')}")
    figure.savefig(path, dpi=110)
    return True


def _colours(fought: Sequence[Duel]) -> list[str]:
    return ["#2f9e77" if duel.ratio >= 1 else "#d14d72" for duel in fought]
