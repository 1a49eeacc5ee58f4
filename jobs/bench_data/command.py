"""Runs the measurements, writes CSV, a table and a plot."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from jobs.bench_data.corpus import write_corpus
from jobs.bench_data.decode import DECODES
from jobs.bench_data.loaders import LOADERS, NEEDS, ON_RAY, OUR_DECODE
from jobs.bench_data.measure import LoaderResult, LoaderTask
from jobs.bench_data.seeks import SeekResult, measure_seek

_SHARD_COUNTS = (10, 100, 1_000, 10_000, 100_000)
_TEN_MILLION = (1_000, 10_000)


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What `flamingo data bench` measures."""

    out: str = "runs/data_bench"
    """Folder for the shards and the results."""
    samples: int = 3000
    """Pairs in the shards; an epoch of them is read, and one of a quarter of them."""
    batch_size: int = 32
    """Pairs of a batch."""
    image_size: int = 224
    """Pixels that images are resized to."""
    workers: tuple[int, ...] = (0, 2)
    """Numbers of decoding processes to measure, or of threads of `ours`; 0 is the measured process itself."""
    decodes: tuple[str, ...] = tuple(DECODES)
    """What other loaders decode with: "ours", "pillow" or both. Our reader uses its own."""
    loaders: tuple[str, ...] = tuple(LOADERS)
    """Which loaders; those whose package is not installed are left out."""
    repeats: int = 3
    """Times that each loader is measured; the middle one by samples a second of CPU time is told."""
    seek_shards: tuple[int, ...] = _SHARD_COUNTS
    """Numbers of shards of the synthetic corpora that are sought in."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.loaders if name not in LOADERS]:
            raise ValueError(f"loaders {unknown}: unknown; choose from {', '.join(LOADERS)}")
        if unknown := [name for name in self.decodes if name not in DECODES]:
            raise ValueError(f"decodes {unknown}: unknown; choose from {', '.join(DECODES)}")
        if self.samples < 10 * self.batch_size or self.batch_size < 1 or self.repeats < 1:
            raise ValueError(
                f"samples {self.samples}, batch_size {self.batch_size}, repeats {self.repeats}: "
                "at least ten batches of one sample, and one repeat"
            )


def bench(config: BenchConfig, console: Console | None = None) -> Path:
    """Measure everything and write the results.

    Args:
        config: what is measured.
        console: where progress is told.

    Returns:
        The table, a markdown file; `loaders.csv`, `seeks.csv` and `rates.png` lie beside it.
    """
    console = console or Console()
    out = Path(config.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    results = _measure_loaders(config, out, console)
    seeks = [measure_seek(n, 100, share) for n in config.seek_shards for share in (0.0, 0.9)]
    if config.seek_shards:
        seeks += [measure_seek(*_TEN_MILLION, share) for share in (0.0, 0.5, 0.9)]
    _write_csv(out / "loaders.csv", [result.row() for result in results])
    _write_csv(out / "seeks.csv", [asdict(seek) for seek in seeks])
    _plot(out / "rates.png", results)
    table = out / "table.md"
    table.write_text(render(config, results, seeks))
    console.print(f"wrote {table}")
    return table


def _measure_loaders(config: BenchConfig, out: Path, console: Console) -> list[LoaderResult]:
    """Measure all loaders in rounds, so that a machine that gets busier does so for all of them alike."""
    tasks = _tasks(config, out, console)
    rounds: list[list[LoaderResult]] = [[] for _ in tasks]
    for _ in range(config.repeats):
        for task, found in zip(tasks, rounds, strict=True):
            found.append(_in_own_process(task))
            console.print(_line(found[-1]), soft_wrap=True)
    return [_middle(found) for found in rounds]


def _tasks(config: BenchConfig, out: Path, console: Console) -> list[LoaderTask]:
    """Write the shards and list the loaders with their workers and decoders; tells which are not installed."""
    size = config.batch_size
    samples, short = (number // size * size for number in (config.samples, config.samples // 4))
    tasks = []
    for loader in config.loaders:
        if not _is_installed(NEEDS.get(loader, "data_pipeline")):
            console.print(f"{loader}: not installed, left out")
            continue
        for workers in config.workers:
            if workers == 0 and loader in ON_RAY:
                continue
            tasks += [
                LoaderTask(
                    loader=loader,
                    shards=str(write_corpus(out, samples)),
                    samples=samples,
                    short_shards=str(write_corpus(out, short)),
                    short_samples=short,
                    batch_size=size,
                    image_size=config.image_size,
                    workers=workers,
                    scratch=str(out / "formats"),
                    decode=decode,
                )
                for decode in (("ours",) if loader in OUR_DECODE else config.decodes)
            ]
    return sorted(tasks, key=lambda task: task.workers)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _in_own_process(task: LoaderTask) -> LoaderResult:
    """Measure in a fresh Python, whose last line is the result."""
    code = (
        "import json, sys\n"
        "from dataclasses import asdict\n"
        "from jobs.bench_data.loaders import LOADERS\n"
        "from jobs.bench_data.measure import LoaderTask, measure\n"
        "task = LoaderTask(**json.loads(sys.argv[1]))\n"
        "result = measure(task, LOADERS[task.loader])\n"
        "print('\\n' + json.dumps(asdict(result)), flush=True)\n"
    )
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(asdict(task))],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=Path(__file__).resolve().parents[2],
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError(f"{task.loader} ended with {done.returncode} and no result: {done.stderr[-800:]}")
    return LoaderResult(**json.loads(lines[-1]))


def _middle(results: list[LoaderResult]) -> LoaderResult:
    """Return the middle result by samples a second of CPU time."""
    return sorted(results, key=lambda result: result.per_core)[len(results) // 2]


def _line(result: LoaderResult) -> str:
    if result.error:
        return f"{result.loader}, {result.workers} workers, decode {result.decode}: {result.error}"
    return (
        f"{result.loader}, {result.workers} workers, decode {result.decode}: "
        f"{result.per_core:.0f} samples a second and core, "
        f"first batch {result.first_batch_s:.2f} s, resume at 90% {result.resume_s:.2f} s"
    )


def render(config: BenchConfig, results: list[LoaderResult], seeks: list[SeekResult]) -> str:
    """Return the results as markdown."""
    lines = [
        f"`flamingo data bench --samples {config.samples} --batch-size {config.batch_size} "
        f"--image-size {config.image_size} --repeats {config.repeats}`",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; JPEG 640 x 480, decoded "
        f"and resized to {config.image_size} by our function or by Pillow's (ours_scaled: with jpeg_margin 1); "
        f"tokens of the captions included; middle of {config.repeats} runs. Workers of `ours` are threads. Samples a "
        "second are those of an epoch beyond those of one a quarter as long, over the time that it took more; what is "
        "left of the CPU time is the start.",
        "",
        "| loader | version | workers | decode | samples / s of CPU | samples / s | start, s of CPU | first batch, s | "
        "at 90%, s | resumes by |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in results:
        if r.error:
            lines.append(f"| {r.loader} | | {r.workers} | {r.decode} | {r.error} | | | | | |")
            continue
        lines.append(
            f"| {r.loader} | {r.version} | {r.workers} | {r.decode} | {r.per_core:.1f} | {r.per_second:.1f} | "
            f"{r.start_cpu_seconds:.2f} | {r.first_batch_s:.2f} | {r.resume_s:.2f} | {r.resume} |"
        )
    lines += [
        "",
        "| shards | samples | position | open, s | seek, us | first batch, s | reads | state, bytes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {s.shards:,} | {s.samples:,} | {s.position:.0%} | {s.open_s:.3f} | {s.seek_us:.0f} | "
        f"{s.first_batch_s:.3f} | {s.reads} | {s.state_bytes} |"
        for s in seeks
    ]
    return "\n".join(lines) + "\n"


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def _plot(path: Path, results: list[LoaderResult]) -> None:
    """Draw samples a second of CPU time as bars."""
    from matplotlib.figure import Figure

    measured = [result for result in results if not result.error]
    figure = Figure(figsize=(8, 0.5 + 0.4 * max(1, len(measured))), layout="constrained")
    axes = figure.subplots()
    names = [f"{r.loader}, {r.workers} workers, decode {r.decode}" for r in measured]
    colours = ["tab:orange" if r.loader.startswith("ours") else "tab:blue" for r in measured]
    axes.barh(names, [r.per_core for r in measured], color=colours)
    axes.invert_yaxis()
    axes.set_xlabel("samples a second of CPU time")
    figure.savefig(path, dpi=110)
