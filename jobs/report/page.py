"""`report.html`: one file that shows a run, with nothing to fetch."""

import json
from html import escape
from pathlib import Path
from typing import Any

from data_pipeline.files import write_whole
from jobs.console import duration
from jobs.report.figures import FIGURES
from jobs.report.pictures import samples_section
from jobs.report.read import Run, read_run
from jobs.report.style import CSS
from jobs.report.summary import PROBE_KINDS, summarise


def write_report(run_dir: Path | str) -> Path:
    """Write `report.html` into a run folder.

    Args:
        run_dir: The run folder; what it lacks (a probe, samples, phases) is left out of the page.

    Returns:
        Path of the file.
    """
    run = read_run(run_dir)
    path = run.folder / "report.html"
    write_whole(path, render(run).encode())
    return path


def render(run: Run) -> str:
    """Make the page.

    Args:
        run: The run.

    Returns:
        A whole HTML document.
    """
    summary = summarise(run)
    parts = [_header(run, summary)]
    for name, (draw, heading, caption) in FIGURES.items():
        picture = draw(run)
        if picture is not None:
            table = {"grounding": _held_out_table, "candidates": _candidate_table}.get(name)
            parts.append(_section(heading, picture, caption, table(summary) if table else ""))
    parts += [_phases(summary), samples_section(run), _bad_samples(run), _details(run, summary)]
    title = escape(f"{summary['recipe'] or run.folder.name}: training report")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, parts))
        + "\n</body>\n</html>\n"
    )


def table(head: list[str], rows: list[list[Any]]) -> str:
    """Make an HTML table; numbers are rounded, missing values shown as a dash."""
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = ["".join(f"<td>{_cell(cell)}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: Any) -> str:
    """Text of one table cell."""
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else escape(str(value))


def _header(run: Run, summary: dict[str, Any]) -> str:
    """Title, where the run comes from, and its key figures."""
    known = {name: version for name, version in (summary["versions"] or {}).items() if version}
    versions = ", ".join(f"{name} {version}" for name, version in known.items())
    facts = [summary["commit"] and f"commit {summary['commit']}", summary["machine"], versions]
    lines = "".join(f"<p>{escape(fact)}</p>" for fact in facts if fact)
    cards = "".join(
        f"<div><b>{escape(text)}</b><span>{escape(label)}</span></div>" for label, text in _key(run, summary)
    )
    title = escape(summary["recipe"] or run.folder.name)
    return f'<header><h1>{title}</h1>{lines}<div class="key">{cards}</div></header>'


def _key(run: Run, summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Key figures as (label, text); what the run did not record is left out."""
    found: list[tuple[str, str | None]] = [("steps", str(summary["steps"]))]
    if len(run.steps) > 1 and "time" in run.steps[0]:
        found.append(("first to last step", duration(run.steps[-1]["time"] - run.steps[0]["time"])))
    found += [
        (f"final loss, {name}", f"{value:.3f}") for name, value in (summary["final_loss_mean"] or {}).items()
    ]
    found += [
        (f"grounding gap, {name} (nats)", f"{value:+.3f}")
        for name, value in (summary["grounding_gap_nats"] or {}).items()
        if value is not None
    ]
    found += [
        (f"top-1, {name} (chance {ranks['chance_top1']:.1%})", f"{ranks['top1']:.1%}")
        for name, ranks in (summary["candidates"] or {}).items()
    ]
    found += [
        ("tokens a second", _formatted("{:,.0f}", summary["tokens_per_second"])),
        (_of_peak("useful MFU", summary), _formatted("{:.1%}", summary["useful_mfu"])),
        (_of_peak("HFU", summary), _formatted("{:.1%}", summary["hfu"])),
        ("data wait", _formatted("{:.1%}", summary["data_wait_share"])),
        ("checkpoint stall", _formatted("{:.1%}", summary["checkpoint_stall_share"])),
        ("skipped steps", str(summary["skipped_steps"])),
        ("bad samples", str(summary["bad_samples"])),
    ]
    return [(label, text) for label, text in found if text is not None]


def _of_peak(label: str, summary: dict[str, Any]) -> str:
    """Say of what peak an MFU is a share."""
    if summary["peak_tflops"] is None:
        return label
    return f"{label} (of {summary['peak_tflops']:.3g} TFLOP/s, {summary['peak_source']})"


def _formatted(form: str, value: float | None) -> str | None:
    """Format a number; None stays None."""
    return None if value is None else form.format(value)


def _section(heading: str, picture: str, caption: str, extra: str = "") -> str:
    """Join a heading, a picture with its caption, and what belongs below it."""
    figure = f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"
    return f"<section><h2>{escape(heading)}</h2>{figure}{extra}</section>"


def _held_out_table(summary: dict[str, Any]) -> str:
    """Losses of the last probe."""
    head = ["last probe, nats a token", *(kind.replace("_", " ") for kind in PROBE_KINDS), "gap"]
    gaps = summary["grounding_gap_nats"] or {}
    rows = [
        [name, *(losses[kind] for kind in PROBE_KINDS), gaps.get(name)]
        for name, losses in (summary["held_out_loss"] or {}).items()
    ]
    return table(head, rows)


def _candidate_table(summary: dict[str, Any]) -> str:
    """Ranking of candidates at the last probe."""
    kinds = ("top1", "chance_top1", "top5", "chance_top5", "count")
    head = ["last probe", "top-1", "by chance", "top-5", "by chance", "queries"]
    return table(
        head, [[name, *(ranks.get(k) for k in kinds)] for name, ranks in summary["candidates"].items()]
    )


def _phases(summary: dict[str, Any]) -> str:
    """Where the time of the whole job went."""
    seconds = dict(summary["seconds"] or {})
    if not seconds:
        return ""
    # "total" may hold more than the phases: the time between them, such as the start of processes.
    total = seconds.pop("total", sum(seconds.values()))
    rows = [
        [phase, duration(value), f"{value / max(total, 1e-9):.1%}"]
        for phase, value in [*seconds.items(), ("total", total)]
    ]
    return f"<section><h2>Phases</h2>{table(['phase', 'time', 'share'], rows)}</section>"


def _bad_samples(run: Run) -> str:
    """Bad samples, counted by data set and cause."""
    if not run.quarantine:
        return ""
    counts: dict[tuple[str, str], int] = {}
    for skip in run.quarantine:
        group = (str(skip.get("dataset") or "-"), str(skip.get("cause") or "unknown"))
        counts[group] = counts.get(group, 0) + 1
    rows: list[list[Any]] = [
        [*group, count] for group, count in sorted(counts.items(), key=lambda item: -item[1])
    ]
    return f"<section><h2>Bad samples</h2>{table(['data set', 'cause', 'samples'], rows)}</section>"


def _details(run: Run, summary: dict[str, Any]) -> str:
    """Show the resolved configuration, and say what the page could not read."""
    torn = summary["unreadable_lines"]
    note = f"<p>{torn} lines of the run's logs could not be read (cut off by a stop).</p>" if torn else ""
    config = escape(json.dumps(run.config, indent=2, default=str))
    shown = (
        f"<details><summary>Resolved configuration</summary><pre>{config}</pre></details>"
        if run.config
        else ""
    )
    return f"<section><h2>Configuration</h2>{note}{shown}</section>" if note or shown else ""
