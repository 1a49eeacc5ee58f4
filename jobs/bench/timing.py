"""Clocks: CUDA events with a cold L2, graphs for what is shorter than its launch, a plain clock on a CPU."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from statistics import quantiles

import torch

Call = Callable[[], object]

GRAPH_BELOW_MS = 2.0
"""Calls shorter than this are also captured into a CUDA graph: launching forward and backward from Python takes a
millisecond (9B, H200: 1.2 ms by events, of which the GPU works 0.7)."""
FLUSH_BYTES = 256 * 2**20
"""Written before each timed call: several times the L2 cache of any GPU, so that every input comes from memory."""


@dataclass(frozen=True, kw_only=True)
class Times:
    """Milliseconds of one call."""

    median: float
    low: float
    """20th percentile."""
    high: float
    """80th percentile."""
    repeats: int
    how: str
    """`events`, `graph`, or `clock` on a CPU."""


@dataclass
class Clock:
    """Times calls on one device."""

    device: torch.device
    budget_ms: float = 120.0
    """Time that the repeats of one measurement may take, beside flushing."""
    min_repeats: int = 5
    max_repeats: int = 100
    _scratch: torch.Tensor | None = field(default=None, repr=False)
    _stream: "torch.cuda.Stream | None" = field(default=None, repr=False)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the body on the clock's own stream.

        A backward pass runs on the stream of its forward, and no graph can be captured from the default one.
        """
        if self.device.type != "cuda":
            yield
            return
        self._stream = self._stream or torch.cuda.Stream(self.device)
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.synchronize()

    def measure(self, call: Call) -> Times:
        """Return the times of `call`, warmed up; as a CUDA graph where that is quicker.

        Whatever is timed must not read a value back to the host if it is to become a graph; what cannot be captured is
        timed by events alone.
        """
        if self.device.type != "cuda":
            return _summary(self._on_cpu(call), "clock")
        best = _summary(self._by_events(call), "events")
        if best.median < GRAPH_BELOW_MS:
            graph = capture(call)
            if graph is not None:
                replayed = _summary(self._by_events(graph.replay), "graph")
                best = replayed if replayed.median < best.median else best
        return best

    def _on_cpu(self, call: Call) -> list[float]:
        call()
        started = time.perf_counter()
        times: list[float] = []
        while len(times) < self.min_repeats or (
            len(times) < self.max_repeats and 1e3 * (time.perf_counter() - started) < self.budget_ms
        ):
            before = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - before))
        return times

    def _by_events(self, call: Call) -> list[float]:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        once = max(1e3 * (time.perf_counter() - started), 1e-3)
        repeats = int(min(self.max_repeats, max(self.min_repeats, self.budget_ms / once)))
        pairs = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(repeats)
        ]
        for before, after in pairs:
            # Also gives the host time to queue the call's launches while the device is still writing.
            self._flush()
            before.record()
            call()
            after.record()
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in pairs]

    def _flush(self) -> None:
        if self._scratch is None:
            self._scratch = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.device)
        self._scratch.zero_()


def capture(call: Call) -> "torch.cuda.CUDAGraph | None":
    """Return `call` as a CUDA graph, or None if it cannot be captured.

    From the default stream nothing can, and the attempt would leave torch's random generator waiting for a capture
    that never ends: whoever draws next fails.
    """
    if torch.cuda.current_stream() == torch.cuda.default_stream():
        return None
    try:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            call()
    except RuntimeError:
        with suppress(RuntimeError):
            torch.cuda.synchronize()
        return None
    return graph


def copy_bandwidth(clock: Clock) -> float:
    """Return the bytes a second that a large copy reads and writes on the clock's device."""
    size = 2**30 if clock.device.type == "cuda" else 2**22
    source = torch.ones(size // 2, dtype=torch.bfloat16, device=clock.device)
    target = torch.empty_like(source)
    return 2 * size / (1e-3 * clock.measure(lambda: target.copy_(source)).median)


def matmul_rate(clock: Clock, dtype: torch.dtype) -> float:
    """Return the operations a second of a large matrix product of `dtype` on the clock's device."""
    size = 8192 if clock.device.type == "cuda" else 256
    a, b = (torch.randn(size, size, device=clock.device).to(dtype) for _ in range(2))
    return 2 * size**3 / (1e-3 * clock.measure(lambda: a @ b).median)


def _summary(times: list[float], how: str) -> Times:
    cuts = quantiles(times, n=10, method="inclusive")
    return Times(median=cuts[4], low=cuts[1], high=cuts[7], repeats=len(times), how=how)
