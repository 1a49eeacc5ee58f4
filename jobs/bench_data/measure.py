"""Time of one loader, in a process of its own so that none inherits another's imports, threads or caches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import psutil


@dataclass(frozen=True, kw_only=True)
class LoaderTask:
    """What a loader is asked to read."""

    loader: str
    """Name in `jobs.bench_data.loaders.LOADERS`."""
    shards: str
    """Folder of the shards."""
    samples: int
    """Samples in them: one epoch is read."""
    batch_size: int
    """Samples of a batch."""
    image_size: int
    """Pixels that every image is resized to."""
    workers: int
    """Processes that decode; 0 reads in the measured process."""
    scratch: str
    """Folder for formats of the loader's own, made before the clock starts."""


@dataclass(frozen=True, kw_only=True)
class LoaderResult:
    """What one loader did."""

    loader: str
    """Its name."""
    version: str
    """Version of its package."""
    workers: int
    """Processes that decode; 0 is one process for all."""
    samples: int
    """Samples that came, a whole epoch."""
    seconds: float
    """Wall time of the epoch, the first batch included."""
    cpu_seconds: float
    """CPU time of all processes in it."""
    first_batch_s: float
    """From nothing but imported packages to the first batch."""
    resume_s: float
    """From nothing to the first batch after 90% of the epoch."""
    resume: str
    """How it resumes: "exact", "state" of its own, or "reads through"."""
    error: str = ""
    """Why there is no figure."""

    @property
    def per_core(self) -> float:
        """Samples a second of CPU time: what one core gives, however busy the machine is."""
        return self.samples / self.cpu_seconds if self.cpu_seconds else 0.0

    def row(self) -> dict[str, Any]:
        """Return the result as a row of a table."""
        return {**asdict(self), "per_core": round(self.per_core, 1)}


class Reading:
    """One loader in two situations; made anew for each."""

    package = ""
    """Distribution whose version is told."""
    resume_kind = "reads through"
    """How it resumes."""

    def __init__(self, task: LoaderTask) -> None:
        """Prepare what may be prepared once, such as a format of its own; not timed."""
        self.task = task

    def start(self, skip: int) -> Iterator[int]:
        """Yield the size of each batch of an epoch, from sample `skip` on."""
        raise NotImplementedError


def cpu_seconds() -> float:
    """Return the CPU time of this process and all that it started, the ended ones included."""
    own = psutil.Process()
    total = 0.0
    for process in (own, *own.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def measure(task: LoaderTask, make: Callable[[LoaderTask], Reading]) -> LoaderResult:
    """Measure one loader: an epoch, the first batch, the first batch after 90% of the epoch.

    Args:
        task: what is read.
        make: makes the loader.
    """
    try:
        reading = make(task)
        resume_s = _first(reading, int(0.9 * task.samples) // task.batch_size * task.batch_size)
        reading = make(task)
        used, started = cpu_seconds(), time.perf_counter()
        batches = reading.start(0)
        samples = next(batches)
        first_batch_s = time.perf_counter() - started
        samples += sum(batches)
        seconds = time.perf_counter() - started
        used = cpu_seconds() - used
        return _result(task, reading, samples, seconds, used, first_batch_s, resume_s)
    except Exception as error:
        empty = LoaderResult(
            loader=task.loader,
            version="",
            workers=task.workers,
            samples=0,
            seconds=0.0,
            cpu_seconds=0.0,
            first_batch_s=0.0,
            resume_s=0.0,
            resume="",
            error=f"{type(error).__name__}: {error}"[:200],
        )
        return empty


def _first(reading: Reading, skip: int) -> float:
    """Return the seconds to the first batch from `skip` on."""
    started = time.perf_counter()
    batches = reading.start(skip)
    next(batches)
    return time.perf_counter() - started


def _result(
    task: LoaderTask,
    reading: Reading,
    samples: int,
    seconds: float,
    cpu: float,
    first_batch_s: float,
    resume_s: float,
) -> LoaderResult:
    from importlib.metadata import PackageNotFoundError, version

    try:
        number = version(reading.package)
    except PackageNotFoundError:
        number = ""
    return LoaderResult(
        loader=task.loader,
        version=number,
        workers=task.workers,
        samples=samples,
        seconds=round(seconds, 3),
        cpu_seconds=round(cpu, 3),
        first_batch_s=round(first_batch_s, 3),
        resume_s=round(resume_s, 3),
        resume=reading.resume_kind,
    )
