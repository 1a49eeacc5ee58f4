"""`flamingo data build`: the parts of a corpus as Ray Data tasks, with progress and a report on the console."""

from __future__ import annotations

import json
import logging
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import ray
import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from data_pipeline.building.config import BuildConfig
from data_pipeline.building.corpus import BuildReport, Step, build_corpus

_MAX_BLOCKS = 4096
_LINE_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class BuildArguments:
    """Arguments of `flamingo data build` beside what is built."""

    config: Annotated[BuildConfig, tyro.conf.arg(name="")]
    """The corpus."""
    ray_address: str | None = None
    """Address of a running Ray cluster, or "auto"; by default Ray is started on this machine for the build."""
    cpus: int | None = None
    """Tasks at a time on a Ray that is started here; by default one a core."""
    overwrite: bool = False
    """Remove a corpus or an unfinished build that is in the output folder."""
    json: bool = False
    """Print the report as JSON."""


def build(arguments: BuildArguments, console: Console | None = None) -> BuildReport:
    """Build a corpus on Ray Data and print what it came to.

    Args:
        arguments: what is built, and where.
        console: where progress and the report are written.

    Raises:
        ValueError: nothing is left of the sources, or the output folder holds something else.
        FileNotFoundError: a source is not there.
    """
    console = console or Console(stderr=arguments.json)
    started = time.monotonic()
    with ray_for_build(arguments.ray_address, arguments.cpus):
        report = build_corpus(arguments.config, RayDataRunner(console), overwrite=arguments.overwrite)
    if arguments.json:
        print(json.dumps({"url": report.url, **report.to_json()}, indent=1, ensure_ascii=False))
    else:
        print_report(report, time.monotonic() - started, console)
    return report


@contextmanager
def ray_for_build(address: str | None, cpus: int | None) -> Iterator[None]:
    """Use the Ray that runs in this process, or connect to one, or start one for the time of the block."""
    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    if address is not None:
        ray.init(address=address, **quiet)
        try:
            yield
        finally:
            ray.shutdown()
        return
    # Unix sockets limit the length of a path, so the files go to a short folder.
    with tempfile.TemporaryDirectory(prefix="fb-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, _temp_dir=folder, **quiet)
        try:
            yield
        finally:
            ray.shutdown()


class RayDataRunner:
    """Runs tasks as a Ray Data pipeline: one row a task, one block a few rows, results as they come."""

    def __init__(self, console: Console | None = None) -> None:
        """Show progress on `console`, if any."""
        self._console = console

    def __call__(self, step: Step, tasks: list[Any], what: str, done: int) -> Iterable[int]:
        """Run `step` over `tasks` on the cluster.

        Args:
            step: a function of one task that returns its number; may run twice if a worker dies.
            tasks: picklable.
            what: what is counted, for the progress.
            done: how many are done already.

        Yields:
            Numbers of finished tasks.
        """
        if not tasks:
            return
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # ours counts what an earlier run did, too
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        # Packed as Ray packs any argument: Arrow has no column of tasks, and says so in a warning.
        packed = [{"task": ray.cloudpickle.dumps(task)} for task in tasks]
        rows = ray.data.from_items(packed, override_num_blocks=min(len(tasks), _MAX_BLOCKS))
        finished = rows.map(partial(_run_packed, step), num_cpus=1)
        with Meter(self._console, what, done, done + len(tasks)) as meter:
            for row in finished.iter_rows():
                if row["fault"]:
                    raise ray.cloudpickle.loads(row["fault"])
                meter.advance()
                yield int(row["number"])


def _run_packed(step: Step, row: dict[str, Any]) -> dict[str, Any]:
    """Run one task in a worker; what it raises comes back as data, since Ray Data keeps its text alone."""
    try:
        return {"number": step(ray.cloudpickle.loads(row["task"])), "fault": b""}
    except Exception as error:
        error.add_note(f"in a worker:\n{traceback.format_exc()}")
        return {"number": -1, "fault": ray.cloudpickle.dumps(error)}


class Meter:
    """Progress: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console | None, what: str, done: int, total: int) -> None:
        """Count to `total` from `done`."""
        self._console, self._what, self._done, self._total = console, what, done, total
        self._bar: Progress | None = None
        self._last = time.monotonic()

    def __enter__(self) -> Meter:
        if self._console is not None and self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
            self._bar = Progress(*columns, *times, console=self._console)
            self._task = self._bar.add_task(self._what, total=self._total, completed=self._done)
            self._bar.start()
        elif self._console is not None and self._done:
            self._console.print(f"{self._what}: {self._done} of {self._total} were done before")
        return self

    def advance(self) -> None:
        """Count one."""
        self._done += 1
        if self._bar is not None:
            self._bar.advance(self._task)
        elif self._console is not None:
            now = time.monotonic()
            if now - self._last >= _LINE_SECONDS or self._done == self._total:
                self._last = now
                self._console.print(f"{self._what}: {self._done} of {self._total}")

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def print_report(report: BuildReport, seconds: float, console: Console) -> None:
    """Print what a build came to: totals, and a table of what was left out."""
    how = "found, built before" if report.reused else f"built in {seconds:.1f} s"
    media = "clips" if report.kind == "video" else "images"
    console.print(
        f"{report.samples} samples, {report.media} {media}, {report.words} words, {report.shards} shards, "
        f"{report.bytes / 1e6:.1f} MB in {report.url} ({how})"
    )
    counts = report.tally.counts
    table = Table("left out", "count", "of", "for example", title=None)
    for cause, count in report.tally.documents.most_common():
        examples = report.tally.examples.get(cause, [""])
        table.add_row(cause, str(count), f"{counts['read']} samples", examples[0][:80])
    for cause, count in report.tally.images.most_common():
        examples = report.tally.examples.get(f"image: {cause}", [""])
        table.add_row(f"image: {cause}", str(count), f"{counts['images read']} images", examples[0][:80])
    if table.row_count:
        console.print(table)
