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
    """Processes, or threads of `ours`, that decode; 0 reads in the measured process."""
    scratch: str
    """Folder for formats of the loader's own, made before the clock starts."""
    decode: str = "ours"
    """What turns bytes into pixels, a name in `jobs.bench_data.decode.DECODES`."""


@dataclass(frozen=True, kw_only=True)
class LoaderResult:
    """What one loader did."""

    loader: str
    """Its name."""
    version: str
    """Version of its package."""
    workers: int
    """Processes, or threads of `ours`, that decode; 0 is the measured process alone."""
    decode: str
    """What turned bytes into pixels."""
    samples: int
    """Samples that came, a whole epoch."""
    seconds: float
    """Wall time of the epoch, the first batch included."""
    cpu_seconds: float
    """CPU time of all processes in it."""
    start_cpu_seconds: float
    """CPU time of all processes up to the first batch: what starting costs, however long the epoch is."""
    first_samples: int
    """Samples of the first batch."""
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
        """Samples a second of CPU time after the first batch: what one core gives, however busy the machine is."""
        spent = self.cpu_seconds - self.start_cpu_seconds
        return (self.samples - self.first_samples) / spent if spent > 0 else 0.0

    @property
    def per_second(self) -> float:
        """Samples a second of the clock after the first batch."""
        spent = self.seconds - self.first_batch_s
        return (self.samples - self.first_samples) / spent if spent > 0 else 0.0

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
        first_samples = next(batches)
        first_batch_s, start_cpu = time.perf_counter() - started, cpu_seconds() - used
        samples = first_samples + sum(batches)
        seconds, used = time.perf_counter() - started, cpu_seconds() - used
        return LoaderResult(
            loader=task.loader,
            version=_version(reading.package),
            workers=task.workers,
            decode=task.decode,
            samples=samples,
            first_samples=first_samples,
            seconds=round(seconds, 3),
            cpu_seconds=round(used, 3),
            start_cpu_seconds=round(start_cpu, 3),
            first_batch_s=round(first_batch_s, 3),
            resume_s=round(resume_s, 3),
            resume=reading.resume_kind,
        )
    except Exception as error:
        return failed(task, f"{type(error).__name__}: {error}")


def failed(task: LoaderTask, error: str) -> LoaderResult:
    """Return a result without figures that says why there are none."""
    return LoaderResult(
        loader=task.loader,
        version="",
        workers=task.workers,
        decode=task.decode,
        samples=0,
        first_samples=0,
        seconds=0.0,
        cpu_seconds=0.0,
        start_cpu_seconds=0.0,
        first_batch_s=0.0,
        resume_s=0.0,
        resume="",
        error=error[:200],
    )


def _first(reading: Reading, skip: int) -> float:
    """Return the seconds to the first batch from `skip` on."""
    started = time.perf_counter()
    batches = reading.start(skip)
    next(batches)
    return time.perf_counter() - started


def _version(package: str) -> str:
    """Return the version of a distribution, "" of none."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return ""
