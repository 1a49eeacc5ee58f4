"""What a trainer rank holds: the batches of all data sets step by step, and their saved position."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.batch import Batch
from data_pipeline.config import DatasetConfig
from data_pipeline.dataset import DatasetStream
from data_pipeline.errors import BadDataError, ResumeError
from data_pipeline.evidence import changed
from data_pipeline.ledger import Ledger
from data_pipeline.tokenizer import Tokenizer, TokenizerConfig

_STATE_VERSION = 1


class Feed(Protocol):
    """Batches of all data sets for one rank. A feed holds no position: any step may be asked for."""

    def next(self, step: int) -> dict[str, Batch]:
        """Return the batches of one step by data set, in the order of the configuration."""
        ...

    def state(self, step: int) -> dict[str, Any]:
        """Return the position before `step` as small, plain JSON: what a checkpoint stores."""
        ...

    def check_state(self, saved: Mapping[str, Any]) -> int:
        """Return the step to continue at, or raise ResumeError that names every difference."""
        ...

    def close(self) -> None:
        """Release threads; for feeds of Ray actors nothing is stopped."""
        ...


def check_datasets(datasets: Sequence[DatasetConfig], dp_size: int) -> None:
    """Check data sets against one another and the layout.

    Raises:
        ValueError: for no data set, two of one name, or a batch that does not divide among the ranks.
    """
    counts = Counter(config.name for config in datasets)
    if not counts or max(counts.values()) > 1:
        raise ValueError(f"data sets {[c.name for c in datasets]}: give at least one, each with its own name")
    for config in datasets:
        config.local_batch_size(dp_size)


def make_state(described: Mapping[str, Mapping[str, Any]], step: int) -> dict[str, Any]:
    """Make the position of a feed.

    Args:
        described: `DatasetStream.describe()` of each data set.
        step: next step to be trained.
    """
    datasets = {}
    for name, description in described.items():
        position = step * int(description["settings"]["batch_size"])
        epoch = position // int(description["samples"])
        datasets[name] = {"position": position, "epoch": epoch, **description}
    return {"version": _STATE_VERSION, "step": step, "datasets": datasets}


def check_saved(
    described: Mapping[str, Mapping[str, Any]],
    saved: Mapping[str, Any],
    shard_url: Callable[[str, int], str] = lambda name, shard: f"shard number {shard}",
) -> int:
    """Compare a saved position with what this run would read.

    Args:
        described: `DatasetStream.describe()` of each data set of this run.
        saved: what `make_state` gave.
        shard_url: gives the URL of a shard by its data set and number, for the message.

    Returns:
        The step to continue at.

    Raises:
        ResumeError: names every field that differs, with both values.
    """
    try:
        if saved["version"] != _STATE_VERSION:
            raise ResumeError(
                f"data position of version {saved['version']}, this code reads {_STATE_VERSION}"
            )
        step, before = int(saved["step"]), saved["datasets"]
        names = list(before)
    except (KeyError, TypeError) as error:
        raise ResumeError(f"not a data position: {saved!r}"[:300]) from error
    faults = [f"data set {n!r} is not in the checkpoint" for n in described if n not in before]
    faults += [f"data set {n!r} of the checkpoint is gone" for n in names if n not in described]
    for name in (n for n in described if n in before):
        now, then = _flat(described[name]), _flat(before[name])
        for field in sorted(now.keys() | (then.keys() - {"position", "epoch"})):
            if now.get(field) != then.get(field):
                faults.append(f"{name}.{field} was {then.get(field)!r}, is {now.get(field)!r}")
        if now.get("shards") == then.get("shards"):
            faults += _changed_shards(name, before[name], described[name], shard_url)
    if faults:
        raise ResumeError(
            "the data cannot be continued where the checkpoint stopped: "
            + "; ".join(faults)
            + ". Restore these, or start a new run from the checkpoint's weights alone"
        )
    return step


def _flat(description: Mapping[str, Any]) -> dict[str, Any]:
    """Lift the settings to the level of the other fields."""
    plain = {k: v for k, v in description.items() if k not in ("settings", "evidence")}
    return {**plain, **description.get("settings", {})}


def _changed_shards(
    name: str, before: Mapping[str, Any], now: Mapping[str, Any], shard_url: Callable[[str, int], str]
) -> list[str]:
    """Say which shards of a data set hold something else than before, as far as both positions know."""
    then: Mapping[str, Any] = before.get("evidence", {})  # earlier versions saved none
    faults = []
    for kind, what in {"headers": "tar headers", "sha256": "checksum"}.items():
        if kind not in then or (shards := changed(then[kind], now["evidence"][kind])) is None:
            continue
        which = f"{shard_url(name, shards[0])} was" if shards else "several shards were"
        faults.append(f"{name}: {which} changed since the checkpoint (same size, other {what})")
    return faults


class LocalFeed:
    """A feed that reads in its own process, ahead in one thread if told so.

    Batches are pure functions of their step, so tensor-parallel ranks with a LocalFeed each see the same. The
    budget of bad samples counts what this rank reads; `RayFeed` counts over all ranks and stops them
    together.
    """

    def __init__(
        self,
        datasets: Sequence[DatasetConfig],
        tokenizer: Tokenizer | TokenizerConfig,
        *,
        seed: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        prefetch: int = 0,
        quarantine: str | Path | None = None,
    ) -> None:
        """Open all data sets.

        Args:
            datasets: the data sets.
            tokenizer: the language model's tokenizer, or where to load it from.
            seed: seed of the run.
            dp_rank: data-parallel rank.
            dp_size: number of data-parallel ranks.
            prefetch: steps read ahead by a thread; 0 reads when asked.
            quarantine: file for bad samples; give it to one rank of a tensor-parallel group only.

        Raises:
            MissingShardError: when shards are missing.
            ValueError: for data sets that cannot be read in this layout.
        """
        check_datasets(datasets, dp_size)
        loaded = tokenizer.load() if isinstance(tokenizer, TokenizerConfig) else tokenizer
        self._streams = {config.name: DatasetStream(config, loaded, seed) for config in datasets}
        self._rank, self._size, self._prefetch = dp_rank, dp_size, prefetch
        self._described = {name: stream.describe() for name, stream in self._streams.items()}
        self._ledger = Ledger(datasets, quarantine)
        for name, stream in self._streams.items():
            self._ledger.record(name, 0, stream.index.skips)
        # One thread: the streams' caches are not shared, and batches come in the order of the steps.
        self._thread = ThreadPoolExecutor(1, "data") if prefetch else None
        self._ahead: dict[int, Future[dict[str, Batch]]] = {}

    def next(self, step: int) -> dict[str, Batch]:
        """Return the batches of one step.

        Raises:
            BadDataError: when the bad samples pass their budget, or a shard vanished.
        """
        batches = self._take(step)
        for name, batch in batches.items():
            self._ledger.record(name, len(batch.keys), batch.skips)
        if (message := self._ledger.verdict()) is not None:
            raise BadDataError(message)
        return batches

    def state(self, step: int) -> dict[str, Any]:
        """Return the position before `step`."""
        return make_state(self._described, step)

    def check_state(self, saved: Mapping[str, Any]) -> int:
        """Return the step to continue at; ResumeError names every difference."""
        return check_saved(self._described, saved, lambda name, n: self._streams[name].index.entries[n].url)

    def summary(self) -> dict[str, Any]:
        """Return counts of read and bad samples, see `Ledger.summary`."""
        return self._ledger.summary()

    def close(self) -> None:
        """Stop the thread that reads ahead."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def _make(self, step: int) -> dict[str, Batch]:
        """Read the batches of one step."""
        return {name: s.batch(step, self._rank, self._size) for name, s in self._streams.items()}

    def _take(self, step: int) -> dict[str, Batch]:
        """Take a step that was read ahead, or read it now; then have the following ones read."""
        if self._thread is None:
            return self._make(step)
        wanted = range(step, step + self._prefetch + 1)
        for stale in [s for s in self._ahead if s not in wanted]:
            self._ahead.pop(stale).cancel()
        for ahead in wanted:
            if ahead not in self._ahead:
                self._ahead[ahead] = self._thread.submit(self._make, ahead)
        return self._ahead.pop(step).result()
