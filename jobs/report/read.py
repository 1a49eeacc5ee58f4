"""Reading a run folder (docs/architecture.md, "Run folder"), whole or cut short."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.files import write_whole


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run folder holds; a missing file leaves its field empty."""

    folder: Path
    """The run folder."""
    config: dict[str, Any] = field(default_factory=dict)
    """config.json: the resolved configuration."""
    environment: dict[str, Any] = field(default_factory=dict)
    """environment.json: recipe, commit, versions, machine."""
    steps: list[dict[str, Any]] = field(default_factory=list)
    """"step" objects of metrics.jsonl in the order of steps, each step once."""
    probes: list[dict[str, Any]] = field(default_factory=list)
    """"probe" objects of metrics.jsonl in the order of steps, each step once."""
    peak: dict[str, Any] = field(default_factory=dict)
    """Newest "peak" object of metrics.jsonl: what MFU is a share of."""
    phases: dict[str, float] = field(default_factory=dict)
    """phases.json: seconds of each phase."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """samples.json: held-out images with true and generated captions."""
    quarantine: list[dict[str, Any]] = field(default_factory=list)
    """quarantine.jsonl: bad samples."""
    unreadable_lines: int = 0
    """Lines of metrics.jsonl or quarantine.jsonl that are no JSON: a run that is killed leaves half a
    line."""


def read_run(folder: Path | str) -> Run:
    """Read a run folder.

    A resumed run goes on from its checkpoint: what was written after that before does not count, be it of steps that
    the resumed run has not reached again.

    Args:
        folder: The run folder.

    Returns:
        Its contents.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no run folder at {folder}: give the folder that holds metrics.jsonl")
    metrics, broken = _read_lines(folder / "metrics.jsonl")
    quarantine, broken_too = _read_lines(folder / "quarantine.jsonl")
    return Run(
        folder=folder,
        config=_read_json(folder / "config.json") or {},
        environment=_read_json(folder / "environment.json") or {},
        **_kept_branch(metrics),
        peak=next((record for record in reversed(metrics) if record.get("kind") == "peak"), {}),
        phases=_read_json(folder / "phases.json") or {},
        samples=_read_json(folder / "samples.json") or [],
        quarantine=quarantine,
        unreadable_lines=broken + broken_too,
    )


def write_json(path: Path, value: Any) -> None:
    """Write JSON that any parser reads (numbers that are not finite become null), whole or not at all."""
    write_whole(path, (json.dumps(_finite(value), indent=2, allow_nan=False) + "\n").encode())


def _finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read_json(path: Path) -> Any:
    """Contents of a JSON file, None where it is missing."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Objects of a JSON-lines file and the number of lines that hold none."""
    if not path.exists():
        return [], 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        found = list(_parse(lines))
    objects = [record for record in found if record is not None]
    return objects, len(found) - len(objects)


def _parse(lines: Iterator[str]) -> Iterator[dict[str, Any] | None]:
    """Object of each line that is not empty; None for what is no object."""
    for line in lines:
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                record = None
            yield record if isinstance(record, dict) else None


def _kept_branch(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Objects of the kinds "step" and "probe" that belong to the weights that went on, in the order of steps.

    The file is in the order of time. A step written at number s comes after exactly s steps, and a probe at s as
    well: what an earlier start wrote from there on is of weights that a resume left behind.
    """
    steps: list[dict[str, Any]] = []
    probes: list[dict[str, Any]] = []
    for record in records:
        kind = record.get("kind")
        if kind not in ("step", "probe"):
            continue
        number = record["step"]
        while steps and steps[-1]["step"] >= number:
            steps.pop()
        # A probe at s looks at the weights that step s begins with.
        while probes and probes[-1]["step"] >= number + (kind == "step"):
            probes.pop()
        (steps if kind == "step" else probes).append(record)
    return {"steps": steps, "probes": probes}
