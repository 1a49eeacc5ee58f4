"""Which reader makes which batch: the least busy first, another one when one dies or is late.

Any reader can make any batch and makes the same one, so a batch may be asked for twice: the first answer
counts, and a sample comes exactly once whatever happened on the way. A reader that died gets no work until it
answers again; what it was asked for goes to the living ones at once.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from data_pipeline.errors import NotOpenError

_REMEMBERED = 32  # durations of a data set's batches
_LEAST_KNOWN = 3  # durations before a batch can be called late
_LEAST_PATIENCE_S = 0.2  # below it, lateness is the noise of the machine
_MOST_COPIES = 3  # readers that work on one unit
_RESTART_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Unit:
    """One batch that is wanted."""

    dataset: str
    """Name of the data set."""
    step: int
    """The step."""
    dp_rank: int
    """Data-parallel rank that it is for."""
    dp_size: int
    """Number of data-parallel ranks."""


@dataclass(eq=False)
class _Reader:
    """What a dispatcher knows of one reader."""

    actor: Any
    make: Any
    """Its method, which gives the batch and its skips as two objects."""
    pending: int = 0
    """Calls that it has not answered, those included that another reader answered first."""
    opening: asyncio.Task[None] | None = None
    """While it starts or is down, what ends when it can be asked."""
    fault: RayError | None = None
    """Why it can never be asked again."""


@dataclass(eq=False)
class _Call:
    """One reader asked for one unit."""

    reader: _Reader
    batch: Any
    skips: Any
    begun: float = field(default_factory=time.monotonic)


_Calls = dict["asyncio.Task[Any]", _Call]


class Dispatcher:
    """Asks readers for units on behalf of one data-parallel rank, in the event loop of its coordinator."""

    def __init__(
        self, readers: Sequence[Any], loaded: Sequence[Any], *, first: int, retries: int, slow_after: float
    ) -> None:
        """Have the readers open their data sets; needs a running event loop.

        Args:
            readers: handles of `Reader` actors.
            loaded: references that each reader opens its data sets with.
            first: which of equally busy readers is asked first; ranks that differ in it spread their calls.
            retries: deaths of readers that one unit outlives.
            slow_after: a unit that takes this many times the usual is asked of another reader; 0 never.
        """
        # Ray does not repeat the call, so that a death is heard of at once.
        calls = [actor.make.options(num_returns=2, max_task_retries=0) for actor in readers]
        self._readers = [_Reader(actor, make) for actor, make in zip(readers, calls, strict=True)]
        self._loaded, self._turn = list(loaded), first
        self._retries, self._slow_after = retries, slow_after
        self._seconds: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))
        self._last_answer = 0.0
        self._waiting: set[asyncio.Task[Any]] = set()  # an event loop alone does not keep its tasks alive
        self.asked_twice = 0
        """Units that were late and asked of another reader too."""
        for reader in self._readers:
            self._open(reader)

    async def make(self, unit: Unit) -> tuple[Any, Any]:
        """Have one unit made.

        Args:
            unit: which.

        Returns:
            A reference to the batch, and its skips.

        Raises:
            ray.exceptions.RayError: no reader could make it; what the last one said.
        """
        calls: _Calls = {}
        deaths = 0
        try:
            while True:
                if not calls:
                    self._ask(await self._choose(), unit, calls)
                patience = self._patience(unit)
                done, _ = await asyncio.wait(calls, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                if not done and self._is_late(unit, calls):
                    self._ask_another(unit, calls)
                for task in done:
                    call = calls.pop(task)
                    try:
                        skips = task.result()
                    except (RayActorError, NotOpenError):
                        deaths += 1
                        if deaths > self._retries:
                            raise
                        continue
                    self._last_answer = time.monotonic()
                    self._seconds[unit.dataset].append(self._last_answer - call.begun)
                    return call.batch, skips
        finally:
            for call in calls.values():
                ray.cancel(call.skips)  # one that waits in a slow reader's queue is taken out of it
                call.batch = None

    def _ask(self, reader: _Reader, unit: Unit, calls: _Calls) -> None:
        """Ask one reader."""
        batch, skips = reader.make.remote(unit.dataset, unit.step, unit.dp_rank, unit.dp_size)
        call = _Call(reader, batch, skips)
        reader.pending += 1
        task = asyncio.create_task(self._answer(call))
        calls[task] = call
        self._waiting.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        """Let go of a call that was answered; the fault of one that nobody waits for any more is nobody's."""
        self._waiting.discard(task)
        if not task.cancelled():
            task.exception()

    async def _answer(self, call: _Call) -> Any:
        """Wait for a reader's answer; runs on when another reader was faster, as the reader is busy until then."""
        try:
            return await call.skips
        except (RayActorError, NotOpenError):
            self._open(call.reader)
            raise
        finally:
            call.reader.pending -= 1

    def _open(self, reader: _Reader) -> None:
        """Have a reader that starts or was restarted open its data sets; it gets no work until it did."""
        if reader.opening is None and reader.fault is None:
            reader.opening = asyncio.create_task(self._opened(reader))

    async def _opened(self, reader: _Reader) -> None:
        """Ask until the reader has opened its data sets, or says that it never will."""
        while reader.fault is None:
            try:
                await reader.actor.open.options(max_task_retries=0).remote(self._loaded)
                break
            except ActorUnavailableError:  # it is being restarted
                await asyncio.sleep(_RESTART_POLL_S)
            except RayError as error:
                reader.fault = error
        reader.opening = None

    def _patience(self, unit: Unit) -> float | None:
        """Return the seconds after which a unit is late, or is looked at again; None where none ever is."""
        if not self._slow_after or len(self._readers) == 1:
            return None
        known = self._seconds[unit.dataset]
        usual = statistics.median(known) if len(known) >= _LEAST_KNOWN else 0.0
        return max(_LEAST_PATIENCE_S, self._slow_after * usual)

    def _is_late(self, unit: Unit, calls: _Calls) -> bool:
        """Whether a unit takes long while others come: when all wait for a storage, asking twice only adds to it."""
        if len(self._seconds[unit.dataset]) < _LEAST_KNOWN or len(calls) >= _MOST_COPIES:
            return False
        newest = max(call.begun for call in calls.values())
        idle = any(reader.pending == 0 for reader in self._living(()))
        return idle or self._last_answer > newest

    def _ask_another(self, unit: Unit, calls: _Calls) -> None:
        """Ask a further reader for a late unit, if one lives that does not have it."""
        living = self._living(call.reader for call in calls.values())
        if living:
            self.asked_twice += 1
            self._ask(self._least_busy(living), unit, calls)

    async def _choose(self) -> _Reader:
        """Return the least busy of the living readers; where none lives, wait for the first that does.

        Raises:
            ray.exceptions.RayError: none will.
        """
        while not (living := self._living(())):
            coming = [reader.opening for reader in self._readers if reader.opening is not None]
            if not coming:
                raise next(reader.fault for reader in self._readers if reader.fault is not None)
            await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
        return self._least_busy(living)

    def _living(self, without: Iterable[_Reader]) -> list[_Reader]:
        """Return the readers that are not known to be down."""
        left_out = list(without)
        return [r for r in self._readers if r.opening is None and r.fault is None and r not in left_out]

    def _least_busy(self, living: Sequence[_Reader]) -> _Reader:
        """Return the reader with the fewest calls, of equally busy ones each in turn."""
        self._turn += 1
        turns = [living[(self._turn + n) % len(living)] for n in range(len(living))]
        return min(turns, key=lambda reader: reader.pending)
