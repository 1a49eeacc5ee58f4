"""docs/benchmarks.md, written from results: a person changes this module, never the page."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from jobs.bench.page_text import BASELINES, EXPECTATION, HOW, MEASURED, NO_FIGURES, ROOFLINE
from jobs.bench.roofline import table
from jobs.bench.rows import Results, Row
from jobs.bench.shapes import FUSED, PERCEIVER, XATTN

NAMED = {shape.name for shape in (*XATTN, *PERCEIVER, *FUSED)}
GOALS = (("fwd", 0.80), ("bwd", 0.70))
"""Shares of a copy's rate that cross-attention is to reach at the 9B and 80B shapes."""
COMPILED = ("B2", "B4", "compiled")
"""How the names of torch.compile's contenders begin. They come late in a run with a budget."""
UNCOMPILED = (
    "† no baseline of torch.compile was timed at this shape: it may be better than the best that was."
)


@dataclass(frozen=True)
class Duel:
    """Ours against the best baseline on one shape in one mode."""

    level: str
    op: str
    shape: str
    mode: str
    ours: Row
    best: Row
    mark: str
    """"†" where no compiled baseline was timed."""

    @property
    def ratio(self) -> float:
        """The baseline's time by ours: above 1 we win."""
        assert self.ours.median_ms is not None, "a duel is between timed rows"
        assert self.best.median_ms is not None, "a duel is between timed rows"
        return self.best.median_ms / self.ours.median_ms

    @property
    def share(self) -> float | None:
        """Our rate as a share of a copy's."""
        return self.ours.copy_share

    @property
    def tie(self) -> bool:
        """Whether the 20/80 quantiles overlap: neither is faster than the other's spread."""
        mine, other = self.ours, self.best
        if None in (mine.q20_ms, mine.q80_ms, other.q20_ms, other.q80_ms):
            return False
        return bool(mine.q20_ms <= other.q80_ms and other.q20_ms <= mine.q80_ms)  # type: ignore[operator]


def duels(rows: Iterable[Row]) -> list[Duel]:
    """Return ours against the best baseline wherever both were timed, in the order of the rows."""
    groups: dict[tuple[str, str, str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.status == "timed" and row.median_ms is not None:
            groups[row.level, row.op, row.shape, row.sizes, row.mode].append(row)
    found = []
    for (level, op, shape, _, mode), group in groups.items():
        mine, others = ([row for row in group if row.ours is ours] for ours in (True, False))
        if mine and others:
            mark = "" if any(row.contender.startswith(COMPILED) for row in others) else "†"
            found.append(Duel(level, op, shape, mode, min(mine, key=_time), min(others, key=_time), mark))
    return found


def write_page(results: Results | None) -> str:
    """Return the page: with figures if `results` were measured on a GPU, without any otherwise."""
    parts = ["# Benchmarks", _note(results), HOW, MEASURED, BASELINES]
    parts.append(f"{ROOFLINE.strip()}\n\n{table()}")
    parts.append(EXPECTATION)
    if results is None or not results.rows:
        parts.append(NO_FIGURES)
    else:
        parts += _figures(results)
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _note(results: Results | None) -> str:
    if results is None or not results.rows:
        return "This page holds no measured figure yet: no GPU was at hand when it was written."
    about = results.environment
    where = about.get("gpu") or "a machine WITHOUT a GPU, at tiny shapes: the times below mean nothing"
    copy = about.get("copy_gb_per_s")
    rate = f" A copy ran at {copy:,.0f} GB/s, bytes read and written." if copy else ""
    return (
        f"Measured on {where}; torch {about.get('torch')}, triton {about.get('triton')}, CUDA {about.get('cuda')}, "
        f"Python {about.get('python')}, commit `{about.get('commit')}`.{rate} Written from the results by "
        "`flamingo bench page`; `benchmarks/results/README.md` says what each file is of."
    )


def _figures(results: Results) -> list[str]:
    fought = duels(results.rows)
    named = [duel for duel in fought if duel.shape in NAMED or not results.measured]
    swept = [duel for duel in fought if duel not in named and duel.mode == "fwd+bwd"]
    head = "Medians with 20/80 quantiles, milliseconds."
    if any(duel.mark for duel in fought):
        head += f"\n\n{UNCOMPILED}"
    parts = [f"## Named shapes\n\n{head}\n\n{_duel_table(named)}"]
    if swept:
        parts.append("## Sweep, forward and backward\n\n" + _duel_table(swept))
    parts += [
        _goals(fought, results.rows),
        _losses(fought),
        _every(results.rows, named),
        _steps(results.rows),
    ]
    parts.append(_without_speed(results))
    return [part for part in parts if part]


def _duel_table(fought: Sequence[Duel]) -> str:
    lines = [
        "| level, operation | shape | mode | ours | best baseline | times faster | GB/s, % of copy |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for duel in fought:
        rate = "" if duel.share is None else f"{duel.ours.gb_per_s:,.0f}, {100 * duel.share:.0f}%"
        tie = " (tie)" if duel.tie else ""
        lines.append(
            f"| {duel.level} {duel.op} | {duel.shape} | {duel.mode} | {_spread(duel.ours)} | "
            f"{duel.best.contender}{duel.mark} {_spread(duel.best)} | {duel.ratio:.2f}{tie} | {rate} |"
        )
    return "\n".join(lines) if fought else "Nothing was timed on both sides."


def _goals(fought: Sequence[Duel], rows: Sequence[Row]) -> str:
    """Return which goals are met; one that was not measured is neither met nor missed."""
    lines = ["## Goals", "", "| goal | shape | measured | met |", "| --- | --- | --- | --- |"]
    core = [duel for duel in fought if (duel.level, duel.op) == ("core", "gated_xattn")]
    for duel in core:
        for mode, goal in GOALS:
            if duel.mode == mode and duel.shape.split()[0] in ("9B", "80B") and duel.share is not None:
                met = "yes" if duel.share >= goal else "no"
                lines.append(f"| {mode}: {goal:.0%} of a copy | {duel.shape} | {duel.share:.0%} | {met} |")
        wanted = {"train": 1.5, "long": 2.0}.get(duel.shape.split()[-1])
        if wanted is not None and duel.mode == "fwd+bwd":
            met = "yes" if duel.ratio >= wanted else "no"
            lines.append(
                f"| fwd+bwd: {wanted} times the best baseline{duel.mark} | {duel.shape} | {duel.ratio:.2f} | {met} |"
            )
    layers = [d for d in fought if (d.level, d.op, d.mode) == ("layer", "gated_xattn", "fwd+bwd")]
    slower = [duel.shape for duel in layers if duel.ratio < 1 and not duel.tie]
    if layers:
        shown = f"slower at {len(slower)} of {len(layers)}" if slower else f"none slower of {len(layers)}"
        open_ones = sum(bool(duel.mark) for duel in layers)
        met = (
            "no" if slower else f"not decided: {open_ones} without compiled baselines" if open_ones else "yes"
        )
        lines.append(f"| layer never slower | all that were timed | {shown} | {met} |")
    lines += _step_goals(rows)
    return "\n".join(lines) if len(lines) > 4 else ""


def _step_goals(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the goals of a whole step at 3B and 9B: useful MFU, and the speed beside transformers' classes."""
    steps = [row for row in rows if row.level == "step" and row.status == "timed"]
    for row in steps:
        if row.ours and row.shape in ("3b", "9b") and row.useful_mfu is not None:
            met = "yes" if row.useful_mfu >= 0.4 else "no"
            yield f"| step: useful MFU 40% | {row.shape}, {row.sizes} | {row.useful_mfu:.1%} | {met} |"
        alike = [r for r in steps if (r.shape, r.sizes) == (row.shape, row.sizes)]
        theirs = [r for r in alike if "IDEFICS" in r.contender]
        if row.ours and row.shape == "3b-idefics" and theirs and row.median_ms:
            ratio = _time(theirs[0]) / row.median_ms
            met = "yes" if ratio >= 2 else "no"
            yield f"| step: 2 times IDEFICS' classes | {row.shape}, {row.sizes} | {ratio:.2f} | {met} |"


def _losses(fought: Sequence[Duel]) -> str:
    lost = sorted((duel for duel in fought if duel.ratio < 1), key=lambda duel: duel.ratio)
    if not lost:
        marked = sum(bool(duel.mark) for duel in fought)
        against = (
            f" {marked} of {len(fought)} comparisons are without compiled baselines (†)." if marked else ""
        )
        return f"## Where we lose\n\nAt no shape that was timed.{against} Shapes that were not reached may differ."
    head = f"## Where we lose\n\nThe best baseline is faster in {len(lost)} of {len(fought)} comparisons, worst first"
    return f"{head}{', the first 40' if len(lost) > 40 else ''}.\n\n{_duel_table(lost[:40])}"


def _every(rows: Sequence[Row], named: Sequence[Duel]) -> str:
    """Return every contender's forward and backward at the named shapes, with memory."""
    keys = dict.fromkeys((duel.level, duel.op, duel.shape) for duel in named)
    lines = [
        "## Every contender at the named shapes",
        "",
        "Forward and backward; peak and saved memory beyond the inputs.",
        "",
        "| level, operation, shape | contender | ms | clock | peak MB | saved MB | worst error | note |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if row.mode == "fwd+bwd" and row.status == "timed" and (row.level, row.op, row.shape) in keys:
            error = "" if row.worst_error is None else f"{float(row.worst_error):.0e}"
            lines.append(
                f"| {row.level} {row.op}, {row.shape} | {row.contender} | {_spread(row)} | {row.clock} | "
                f"{_number(row.peak_mb)} | {_number(row.saved_mb)} | {error} | {row.note} |"
            )
    return "\n".join(lines)


def _steps(rows: Sequence[Row]) -> str:
    steps = [row for row in rows if row.level == "step"]
    if not steps:
        return ""
    lines = [
        "## Whole step",
        "",
        "Useful MFU: needed FLOPs by the time, as a share of a large matrix product's rate in the same run.",
        "",
        "| network | implementation | tokens/s | useful MFU | ms a step | peak MB |",
        "|---|---|---|---|---|---|",
    ]
    for row in steps:
        shown = _number(row.tokens_per_s) or f"{row.status}: {row.reason}"
        mfu = "" if row.useful_mfu is None else f"{row.useful_mfu:.1%}"
        lines.append(
            f"| {row.shape}, {row.sizes} | {row.contender} | {shown} | {mfu} | {_spread(row)} | "
            f"{_number(row.peak_mb)} |"
        )
    return "\n".join(lines)


def _without_speed(results: Results) -> str:
    """Return who got no speed and why, each reason once."""
    reasons: dict[tuple[str, str, str], int] = defaultdict(int)
    for row in results.rows:
        if row.status != "timed":
            reasons[row.contender, row.status, row.reason] += 1
    lines = ["## Without a speed", ""]
    lines += [f"- {who}: {what}, {count} rows: {why}" for (who, what, why), count in reasons.items()]
    missed = results.environment.get("not_reached")
    if missed:
        lines.append(f"- {missed} shapes of the sweep were not reached within the time budget.")
    return "\n".join(lines) if len(lines) > 2 else ""


def _spread(row: Row) -> str:
    if row.median_ms is None:
        return ""
    return f"{row.median_ms:.3f} ({row.q20_ms:.3f} to {row.q80_ms:.3f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}"


def _time(row: Row) -> float:
    assert row.median_ms is not None, "timed"
    return row.median_ms
