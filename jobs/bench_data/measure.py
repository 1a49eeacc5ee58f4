"""Time of one loader, in a process of its own so that none inherits another's imports, threads or caches.

A loader reads an epoch of a quarter of the samples and one of all. What the longer took more, over the samples it has
more, is the price of a sample; what is left is the price of a start. A loader that has read much before its first batch
comes, or that starts many processes, is measured as fairly as any other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import psutil

from jobs.doctor.versions import installed


@dataclass(frozen=True, kw_only=True)
class LoaderTask:
    """What a loader is asked to read."""

    loader: str
    """Name in `jobs.bench_data.loaders.LOADERS`."""
    shards: str
    """Folder of the shards."""
    samples: int
    """Samples in them."""
    short_shards: str
    """Folder of fewer shards."""
    short_samples: int
    """Samples in those."""
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
    """Samples that came in the long epoch."""
    seconds: float
    """Wall time of it, the first batch included."""
    cpu_seconds: float
    """CPU time of all processes in it."""
    short_samples: int
    """Samples that came in the short epoch."""
    short_seconds: float
    """Wall time of it."""
    short_cpu_seconds: float
    """CPU time of it."""
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
        spent = self.cpu_seconds - self.short_cpu_seconds
        return (self.samples - self.short_samples) / spent if spent > 0 else 0.0

    @property
    def per_second(self) -> float:
        """Samples a second of the clock."""
        spent = self.seconds - self.short_seconds
        return (self.samples - self.short_samples) / spent if spent > 0 else 0.0

    @property
    def start_cpu_seconds(self) -> float:
        """CPU time that an epoch of any length takes; the noise of both epochs is in it, so it is never below 0."""
        return max(0.0, self.cpu_seconds - self.samples / self.per_core) if self.per_core else 0.0

    def row(self) -> dict[str, Any]:
        """Return the result as a row of a table."""
        return {**asdict(self), "per_core": round(self.per_core, 1), "per_second": round(self.per_second, 1)}


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

    def stop(self) -> None:
        """End processes that outlive the last batch; called when their CPU time was read."""


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
    """Measure one loader: the first batch after 90% of the epoch, the short epoch, the long one.

    Args:
        task: what is read.
        make: makes the loader.
    """
    try:
        # First, so that what is imported late is imported before anything is counted.
        resume_s = _first(make(task), int(0.9 * task.samples) // task.batch_size * task.batch_size)
        short = replace(task, shards=task.short_shards, samples=task.short_samples)
        reading = make(task)
        fewer, all_of_them = _epoch(make(short)), _epoch(reading)
        return LoaderResult(
            loader=task.loader,
            version=installed([reading.package]).get(reading.package, ""),
            workers=task.workers,
            decode=task.decode,
            samples=all_of_them.samples,
            seconds=round(all_of_them.seconds, 3),
            cpu_seconds=round(all_of_them.cpu_seconds, 3),
            short_samples=fewer.samples,
            short_seconds=round(fewer.seconds, 3),
            short_cpu_seconds=round(fewer.cpu_seconds, 3),
            first_batch_s=round(all_of_them.first_batch_s, 3),
            resume_s=round(resume_s, 3),
            resume=reading.resume_kind,
        )
    except Exception as error:
        return failed(task, f"{type(error).__name__}: {error}")


class _Epoch(NamedTuple):
    samples: int
    seconds: float
    cpu_seconds: float
    first_batch_s: float


def _epoch(reading: Reading) -> _Epoch:
    """Read one epoch from nothing."""
    used, started = cpu_seconds(), time.perf_counter()
    batches = reading.start(0)
    samples = next(batches)
    first_batch_s = time.perf_counter() - started
    samples += sum(batches)
    epoch = _Epoch(samples, time.perf_counter() - started, cpu_seconds() - used, first_batch_s)
    reading.stop()
    return epoch


def failed(task: LoaderTask, error: str) -> LoaderResult:
    """Return a result without figures that says why there are none."""
    return LoaderResult(
        loader=task.loader,
        version="",
        workers=task.workers,
        decode=task.decode,
        samples=0,
        seconds=0.0,
        cpu_seconds=0.0,
        short_samples=0,
        short_seconds=0.0,
        short_cpu_seconds=0.0,
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
    seconds = time.perf_counter() - started
    reading.stop()
    return seconds
