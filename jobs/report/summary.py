"""`summary.json`: the figures of a run by which it is judged and compared."""

from pathlib import Path
from statistics import fmean
from typing import Any

from jobs.report.read import Run, read_run, write_json

PROBE_KINDS = ("true", "shuffled", "blank", "gates_off")
"""The four losses of the grounding probe."""

SMOOTHING_STEPS = 10
"""Steps behind `final_loss_mean`."""


def write_summary(run_dir: Path | str) -> Path:
    """Write `summary.json` into a run folder.

    Args:
        run_dir: The run folder.

    Returns:
        Path of the file.
    """
    run = read_run(run_dir)
    path = run.folder / "summary.json"
    write_json(path, summarise(run))
    return path


def summarise(run: Run) -> dict[str, Any]:
    """Reduce a run to its key figures. What the run did not record is None (null), never a guess.

    Times, shares and speeds are counted from the second recorded step on: the first pays for compilation,
    allocation and the first fill of the data queues.

    Args:
        run: The run.

    Returns:
        The contents of summary.json.
    """
    held_out = _latest(run.probes, "data")
    settled = run.steps[1:]
    return {
        "recipe": run.environment.get("recipe", run.config.get("recipe")),
        "commit": run.environment.get("commit", run.config.get("commit")),
        "versions": run.environment.get("versions"),
        "machine": run.environment.get("machine"),
        "steps": len(run.steps),
        "last_step": run.steps[-1]["step"] if run.steps else None,
        "skipped_steps": sum(int(step.get("skipped") or 0) for step in run.steps),
        # The quarantine file also holds what was found bad before the first step.
        "bad_samples": len(run.quarantine) or sum(int(step.get("bad_samples") or 0) for step in run.steps),
        "final_loss": _latest(run.steps, "loss") or None,
        "final_loss_mean": _final_mean(run),
        "grounding_gap_nats": {name: _gap(losses) for name, losses in held_out.items()} or None,
        "held_out_loss": {
            name: {kind: losses.get(kind) for kind in PROBE_KINDS} for name, losses in held_out.items()
        }
        or None,
        "step_0_minus_bare_lm_nats": _untrained_difference(run),
        "candidates": _latest(run.probes, "candidates") or None,
        "tokens_per_second": _mean_rate(settled, "tokens_per_second"),
        "useful_mfu": _mean_rate(settled, "useful_mfu"),
        "hfu": _mean_rate(settled, "hfu"),
        "peak_tflops": run.peak.get("tflops"),
        "peak_source": run.peak.get("source"),
        "data_wait_share": _share(settled, "data"),
        "checkpoint_stall_share": _share(settled, "checkpoint"),
        "seconds": run.phases or None,
        "unreadable_lines": run.unreadable_lines,
    }


def _latest(records: list[dict[str, Any]], part: str) -> dict[str, Any]:
    """Take of each data set what the last record with it says; not every record need have every one."""
    latest: dict[str, Any] = {}
    for record in records:
        latest.update(record.get(part) or {})
    return latest


def _gap(losses: dict[str, float | None]) -> float | None:
    """Grounding gap of one data set; None where a loss is missing or was not finite (null in the file)."""
    shuffled, true = losses.get("shuffled"), losses.get("true")
    return None if shuffled is None or true is None else shuffled - true


def _untrained_difference(run: Run) -> dict[str, float | None] | None:
    """Held-out loss before the first step minus that of the bare LM; 0 while all gates are shut."""
    first = next((probe["data"] for probe in run.probes if probe["step"] == 0), None)
    if first is None:
        return None
    pairs = {name: (losses.get("true"), losses.get("gates_off")) for name, losses in first.items()}
    return {
        name: None if true is None or bare is None else true - bare for name, (true, bare) in pairs.items()
    }


def _final_mean(run: Run) -> dict[str, float] | None:
    """Mean loss of each data set over its last steps: one step's loss is noisy."""
    losses: dict[str, list[float]] = {}
    for step in run.steps:
        for name, value in step["loss"].items():
            if value is not None:  # null stands for a loss that was not finite
                losses.setdefault(name, []).append(value)
    means = {name: fmean(values[-SMOOTHING_STEPS:]) for name, values in losses.items()}
    return means or None


def _mean_rate(steps: list[dict[str, Any]], rate: str) -> float | None:
    """Mean of a rate over the whole time: the steps' rates weighted by their seconds."""
    timed = [
        (step[rate], step["seconds"]["step"])
        for step in steps
        if step.get(rate) is not None and step.get("seconds", {}).get("step")
    ]
    seconds = sum(duration for _, duration in timed)
    return sum(rate * duration for rate, duration in timed) / seconds if seconds else None


def _share(steps: list[dict[str, Any]], part: str) -> float | None:
    """Share of the step time that one part takes."""
    timed = [step["seconds"] for step in steps if part in step.get("seconds", {})]
    whole = sum(seconds["step"] for seconds in timed)
    return sum(seconds[part] for seconds in timed) / whole if whole else None
