"""Readers as Ray actors: the one module of this room that knows Ray.

    readers (any number, any node)      make batches, hold no state
      ^ calls, bounded by `prefetch`
    coordinator (one a data-parallel rank)   hands the same object to every tensor-parallel peer
      ^ next(step)
    RayFeed (in each trainer rank)      zero-copy numpy views of the object store

A batch is a pure function of its step, so what a dead or slow reader was asked for is asked of another
(`data_pipeline.dispatch`), and a coordinator that dies begins anew at the step it is next asked for. A
`LedgerActor` counts bad samples over all ranks; when they are too many, it names one step beyond every step
that any rank was given, and every rank fails at that step: no rank is left waiting in a collective for one
that stopped.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from data_pipeline.batch import Batch, Skip, empty_batch
from data_pipeline.config import DatasetConfig
from data_pipeline.dataset import DatasetStream
from data_pipeline.dispatch import Dispatcher, Unit
from data_pipeline.errors import BadDataError, NotOpenError
from data_pipeline.feed import check_datasets, check_saved, make_state
from data_pipeline.index import ShardIndex
from data_pipeline.ledger import LedgerActor
from data_pipeline.tokenizer import Tokenizer, TokenizerConfig

_ASKS = 4
# By default Ray holds back the failure of a call to a killed actor that will restart for 1 to 2 s, in case
# its cause of death arrives, which is more than the read-ahead lasts.
_HEAR_AT_ONCE = {"RAY_timeout_ms_task_wait_for_death_info": "0"}


@dataclass(frozen=True, kw_only=True)
class ReaderConfig:
    """How many readers there are and how far they read ahead."""

    readers: int = 2
    """Reader actors of the whole job, shared by all ranks; spread over the nodes."""
    cpus_per_reader: float = 0.25
    """Logical CPUs that Ray reserves for a reader; may be a fraction."""
    prefetch: int = 2
    """Steps of each data-parallel rank that are read ahead; bounds the memory of waiting batches."""
    retries: int = 3
    """Times that a batch is asked for again when its reader dies; a sample that kills every reader that
    touches it would otherwise be retried for ever."""
    slow_after: float = 4.0
    """A batch that takes this many times as long as usual is asked of another reader too, and the first answer
    counts; 0 never asks twice."""
    timeout_s: float = 900.0
    """Seconds after which a rank that waits for a batch fails with an error."""

    def __post_init__(self) -> None:
        if self.readers < 1 or self.prefetch < 0 or self.retries < 0:
            raise ValueError(
                f"readers {self.readers}, prefetch {self.prefetch}, retries {self.retries}: "
                "at least 1, 0 and 0 are needed"
            )
        if not self.cpus_per_reader >= 0 or not self.timeout_s > 0:
            raise ValueError(
                f"cpus_per_reader {self.cpus_per_reader}, timeout_s {self.timeout_s}: "
                "the first must be at least 0, the second above 0"
            )
        if self.slow_after != 0 and not self.slow_after >= 1:
            raise ValueError(f"slow_after {self.slow_after}: give 1 or more, or 0 to never ask twice")


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What a coordinator reads from.

    Handed over by a call: an actor whose constructor took references to objects could not be restarted once Ray
    let go of them, of which Ray warns at each start.
    """

    readers: tuple[Any, ...]
    """Handles of the `Reader` actors."""
    ledger: Any
    """Handle of the `LedgerActor`."""
    loaded: tuple[Any, ...]
    """References to the tokenizer and to the indices by name, which the driver loaded once."""


class Reader:
    """Actor that makes batches."""

    def __init__(self, datasets: Sequence[DatasetConfig], seed: int) -> None:
        """Hold the configuration; nothing is opened yet."""
        self._datasets, self._seed = tuple(datasets), seed
        self._streams: dict[str, DatasetStream] = {}

    def open(self, loaded: Sequence[ray.ObjectRef[Any]]) -> None:
        """Open the data sets, unless they are open.

        Args:
            loaded: see `Sources.loaded`.
        """
        if not self._streams:
            self.open_streams(*ray.get(list(loaded)))

    def open_streams(self, tokenizer: Tokenizer, indices: Mapping[str, ShardIndex]) -> None:
        """Open the data sets with a tokenizer and the indices by name."""
        self._streams = {
            c.name: DatasetStream(c, tokenizer, self._seed, index=indices[c.name]) for c in self._datasets
        }

    def make(self, name: str, step: int, dp_rank: int, dp_size: int) -> tuple[Batch, tuple[Skip, ...]]:
        """Make one batch; the skips come as a second object, so that counting them moves no batch.

        Raises:
            NotOpenError: a restarted reader has to `open` first.
        """
        if not self._streams:
            raise NotOpenError(f"asked for step {step} of {name!r} before open")
        batch = self._streams[name].batch(step, dp_rank, dp_size)
        return batch, batch.skips


class Coordinator:
    """Actor of one data-parallel rank: keeps calls to readers outstanding and serves all peers alike."""

    def __init__(
        self,
        datasets: Sequence[DatasetConfig],
        pad_id: int,
        dp_rank: int,
        dp_size: int,
        peers: int,
        config: ReaderConfig,
    ) -> None:
        """Hold the configuration, as a reader does."""
        self._datasets, self._pad_id, self._config = tuple(datasets), pad_id, config
        self._ledger: Any = None
        self._dispatcher: Dispatcher | None = None
        self._rank, self._size, self._peers, self._prefetch = dp_rank, dp_size, peers, config.prefetch
        self._samples = {c.name: c.local_batch_size(dp_size) for c in datasets}
        self._steps: dict[int, asyncio.Task[dict[str, list[Any]]]] = {}
        self._verdicts: dict[int, asyncio.Task[str | None]] = {}
        self._asked: dict[int, int] = {}

    async def open(self, sources: Sources) -> None:
        """Learn whom to ask, unless that is known; nothing is read until the first step is asked for."""
        if self._dispatcher is None:
            self._ledger = sources.ledger
            self._dispatcher = Dispatcher(
                sources.readers,
                sources.loaded,
                first=self._rank,
                retries=self._config.retries,
                slow_after=self._config.slow_after,
            )

    async def next(self, step: int, peer: int, lost: Sequence[str] = ()) -> dict[str, list[Any]]:
        """Give references to the batches of a step, the same ones to every peer.

        Args:
            step: the step.
            peer: tensor-parallel rank that asks.
            lost: references to batches of this step that were lost with the node that held them.

        Returns:
            By data set, a list of one reference: a bare one would be fetched for the caller by Ray.

        Raises:
            BadDataError: when the run must stop at this step.
            NotOpenError: a restarted coordinator has to `open` first.
        """
        if self._dispatcher is None:
            raise NotOpenError(f"asked for step {step} before open")
        self._asked[peer] = step
        if lost and step in self._steps:
            held = await asyncio.shield(self._steps[step])
            if any(box[0].hex() in lost for box in held.values()):  # else a peer had them made again before
                self._steps.pop(step)
        for ahead in range(step, step + self._prefetch + 1):
            if ahead not in self._steps:
                self._steps[ahead] = asyncio.create_task(self._build(ahead))
        self._drop(step)
        try:
            batches = await asyncio.shield(self._steps[step])
        except Exception:
            self._steps.pop(step, None)  # asked again, it is made again
            raise
        if step not in self._verdicts:
            self._verdicts[step] = asyncio.create_task(self._ask_ledger(step))
        if (message := await self._verdicts[step]) is not None:
            raise BadDataError(message)
        return batches

    def held(self) -> list[int]:
        """Return the steps whose batches are held."""
        return sorted(self._steps)

    def asked_twice(self) -> int:
        """Return how many batches were late and asked of another reader too."""
        return self._dispatcher.asked_twice if self._dispatcher is not None else 0

    def _drop(self, step: int) -> None:
        """Drop steps that all peers have taken, and those that a resume elsewhere left behind."""
        everyone = len(self._asked) == self._peers
        oldest = min(self._asked.values()) if everyone else step - self._prefetch - 1
        # A peer that lags further than the read-ahead was restarted; its steps can be made again.
        oldest = max(oldest, step - self._prefetch - 1)
        newest = max(step, *(a for a in self._asked.values() if a <= step + self._prefetch)) + self._prefetch
        for stale in [s for s in self._steps if not oldest <= s <= newest]:
            self._steps.pop(stale).cancel()
            self._verdicts.pop(stale, None)

    async def _ask_ledger(self, step: int) -> str | None:
        """Ask whether the step may be trained."""
        answer: str | None = await self._ledger.may_pass.remote(self._rank, step, self._samples)
        return answer

    async def _build(self, step: int) -> dict[str, list[Any]]:
        """Have the batches of a step made, and report their bad samples before anyone trains on them."""
        assert self._dispatcher is not None, "next made it"
        units = [Unit(config.name, step, self._rank, self._size) for config in self._datasets]
        made = await asyncio.gather(*map(self._dispatcher.make, units), return_exceptions=True)
        batches, read = {}, {}
        for config, result in zip(self._datasets, made, strict=True):
            samples = self._samples[config.name]
            if isinstance(result, BaseException):  # dead readers, or a fault in our own code
                found: Sequence[Skip] = (self._failed(config, step, result),)
                empty = empty_batch(
                    samples // config.pack,
                    config.tokens_per_row,
                    config.media_shape,
                    pixels=config.media == "pixels",
                    pad_id=self._pad_id,
                    pack=config.pack,
                    skips=tuple(found),
                )
                batch = ray.put(empty)
            else:
                batch, found = result
            batches[config.name] = [batch]
            read[config.name] = (samples, tuple(found))
        if any(found for _, found in read.values()):
            await self._ledger.report.remote(self._rank, step, read)
        return batches

    def _failed(self, config: DatasetConfig, step: int, error: BaseException) -> Skip:
        """Describe a batch that no reader could make; the ledger then stops every rank, not this alone."""
        lines = [line for line in str(error).splitlines() if line.strip()]
        return Skip(
            key="",
            shard="",
            cause="reader failed",
            detail=f"step {step}: {type(error).__name__}: {' | '.join(lines[:1] + lines[-3:])}"[:1000],
            dataset=config.name,
            position=step * config.batch_size,
            fatal=True,
        )


class RayFeed:
    """Feed of one trainer rank; picklable, so that the driver makes it and the rank receives it."""

    def __init__(
        self,
        coordinator: Any,
        sources: Sources,
        peer: int,
        described: Mapping[str, Mapping[str, Any]],
        timeout_s: float,
    ) -> None:
        """Hold the handles; `RayPipeline.feed` makes one."""
        self._coordinator, self._sources, self._peer = coordinator, sources, peer
        self._described, self._timeout_s = described, timeout_s

    def next(self, step: int) -> dict[str, Batch]:
        """Return the batches of one step; their arrays are read-only views of the object store.

        Raises:
            BadDataError: on all ranks at the same step, when the run must stop.
            TimeoutError: when no batch came in time.
        """
        gone = (ray.exceptions.ObjectLostError, ray.exceptions.ActorUnavailableError)
        lost: list[str] = []
        for ask in range(_ASKS):
            try:
                asked = self._coordinator.next.remote(step, self._peer, lost)
                boxes = ray.get(asked, timeout=self._timeout_s)
                refs = [boxes[name][0] for name in self._described]
                lost = [ref.hex() for ref in refs]
                return dict(zip(self._described, ray.get(refs, timeout=self._timeout_s), strict=True))
            except BadDataError as error:
                # Ray's own wrapper holds a remote traceback; the user needs the message alone.
                cause = getattr(error, "cause", error)
                raise BadDataError(str(cause)) from None
            except ray.exceptions.GetTimeoutError as error:
                raise TimeoutError(
                    f"no batch for step {step} within {self._timeout_s:.0f} s: the readers are stuck "
                    "or have no CPUs; look at `ray status` and `ray list actors`, or lower cpus_per_reader"
                ) from error
            except NotOpenError:  # restarted, it does not know the readers
                ray.get(self._coordinator.open.remote(self._sources), timeout=self._timeout_s)
            except gone:
                # Batches go with the node that holds them, or with the coordinator that owns them: the same
                # ones are made again.
                if ask == _ASKS - 1:
                    raise
        raise AssertionError("unreachable: the last attempt returns or raises")

    def state(self, step: int) -> dict[str, Any]:
        """Return the position before `step`."""
        return make_state(self._described, step)

    def check_state(self, saved: Mapping[str, Any]) -> int:
        """Return the step to continue at; ResumeError names every difference."""

        def url(name: str, shard: int) -> str:
            indices: Mapping[str, ShardIndex] = ray.get(self._sources.loaded[1], timeout=self._timeout_s)
            return indices[name].entries[shard].url

        return check_saved(self._described, saved, url)

    def summary(self) -> dict[str, Any]:
        """Return counts of read and bad samples over all ranks, see `Ledger.summary`."""
        summary: dict[str, Any] = ray.get(self._sources.ledger.summary.remote(), timeout=self._timeout_s)
        return summary

    def close(self) -> None:
        """Do nothing: the actors belong to the driver."""


class RayPipeline:
    """All data actors of a run; made by the driver, alive as long as it holds this object."""

    def __init__(
        self,
        datasets: Sequence[DatasetConfig],
        tokenizer: Tokenizer | TokenizerConfig,
        *,
        seed: int,
        dp_size: int,
        tp_size: int = 1,
        config: ReaderConfig | None = None,
        quarantine: str | Path | None = None,
    ) -> None:
        """Open the data sets, so that their errors come before any trainer starts, and start the actors.

        Args:
            datasets: the data sets.
            tokenizer: the language model's tokenizer, or where the driver loads it from.
            seed: seed of the run.
            dp_size: number of data-parallel ranks.
            tp_size: ranks of a tensor-parallel group, which share their batches.
            config: number of readers and read-ahead.
            quarantine: file for bad samples, on the driver's node.

        Raises:
            MissingShardError: when shards are missing.
            ValueError: for data sets that cannot be read in this layout.
        """
        check_datasets(datasets, dp_size)
        self.config, self.datasets = config or ReaderConfig(), tuple(datasets)
        self._dp_size, self._tp_size = dp_size, tp_size
        loaded = tokenizer.load() if isinstance(tokenizer, TokenizerConfig) else tokenizer
        streams = {c.name: DatasetStream(c, loaded, seed) for c in datasets}
        for name, stream in streams.items():
            if stream.index.skips:
                warnings.warn(
                    f"data set {name!r} is damaged and lacks what could not be indexed: {stream.index.damage()}",
                    stacklevel=2,
                )
        self._described = {name: stream.describe() for name, stream in streams.items()}
        # Kept for as long as the pipeline lives: actors that are restarted ask for it again.
        self._sources = Sources(
            readers=tuple(self._start_readers(seed)),
            ledger=self._start_ledger(datasets, streams, quarantine),
            loaded=(ray.put(loaded), ray.put({name: stream.index for name, stream in streams.items()})),
        )
        self.readers = self._sources.readers
        coordinator = ray.remote(Coordinator).options(
            num_cpus=0, max_restarts=-1, max_task_retries=-1, runtime_env={"env_vars": _HEAR_AT_ONCE}
        )
        self.coordinators = [
            coordinator.remote(self.datasets, loaded.pad_id, rank, dp_size, tp_size, self.config)
            for rank in range(dp_size)
        ]
        for actor in self.coordinators:
            actor.open.remote(self._sources)

    def _start_readers(self, seed: int) -> list[Any]:
        """Start the readers, spread over the nodes."""
        reader = ray.remote(Reader).options(
            num_cpus=self.config.cpus_per_reader, max_restarts=-1, scheduling_strategy="SPREAD"
        )
        return [reader.remote(self.datasets, seed) for _ in range(self.config.readers)]

    def _start_ledger(
        self,
        datasets: Sequence[DatasetConfig],
        streams: Mapping[str, DatasetStream],
        quarantine: str | Path | None,
    ) -> Any:
        """Start the ledger on the driver's node, where the run folder is."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        ledger = ray.remote(LedgerActor).options(
            num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here
        )
        path = str(Path(quarantine).absolute()) if quarantine is not None else None
        return ledger.remote(datasets, path, {name: stream.index.skips for name, stream in streams.items()})

    def feed(self, dp_rank: int, tp_rank: int = 0) -> RayFeed:
        """Make the feed of one trainer rank.

        Raises:
            ValueError: when there is no such rank.
        """
        if not (0 <= dp_rank < self._dp_size and 0 <= tp_rank < self._tp_size):
            raise ValueError(
                f"dp_rank {dp_rank}, tp_rank {tp_rank}: this pipeline serves {self._dp_size} data-parallel "
                f"x {self._tp_size} tensor-parallel ranks"
            )
        coordinator = self.coordinators[dp_rank]
        return RayFeed(coordinator, self._sources, tp_rank, self._described, self.config.timeout_s)

    def shutdown(self) -> None:
        """Stop all actors."""
        for actor in (*self.coordinators, *self.readers, self._sources.ledger):
            ray.kill(actor)
