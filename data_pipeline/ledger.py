"""Keeping account of bad samples: counts by cause and source, the quarantine file, and the budget."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.batch import Skip
from data_pipeline.config import DatasetConfig

_NAMED_CAUSES = 3
_REMEMBERED = 256  # steps; those read ahead are reported out of order, older ones are repeats after a resume


class Ledger:
    """Counts the bad samples of a run and says when they are too many.

    A data set fails when its bad samples pass both `bad_sample_floor` and the share `bad_sample_budget` of
    what was read since the run started, or at once at a fatal fault (a shard vanished). Each bad sample is
    one line of `quarantine.jsonl`; lines that are there from before a restart are not written again.
    """

    def __init__(self, datasets: Sequence[DatasetConfig], quarantine: str | Path | None = None) -> None:
        """Open the ledger.

        Args:
            datasets: the data sets with their budgets.
            quarantine: file that bad samples are appended to; None keeps counts only.
        """
        self._configs = {config.name: config for config in datasets}
        self._path = Path(quarantine) if quarantine is not None else None
        self._read: Counter[str] = Counter()
        self._bad: Counter[str] = Counter()
        self._causes: Counter[tuple[str, str]] = Counter()
        self._sources: Counter[tuple[str, str]] = Counter()
        self._seen: set[tuple[str, int, str, str]] = set()
        self._written = self._load_written()
        self._last: dict[str, Skip] = {}
        self._fatal: Skip | None = None

    def _load_written(self) -> set[tuple[str, int, str, str]]:
        """Read which bad samples the quarantine file holds already."""
        if self._path is None or not self._path.exists():
            return set()
        written = set()
        for line in self._path.read_text("utf-8", errors="replace").splitlines():
            try:
                written.add(_identity(Skip(**json.loads(line))))
            except (ValueError, TypeError):
                continue  # a line cut by a crash; the sample is written again when it is met again
        return written

    def record(self, dataset: str, samples: int, skips: Iterable[Skip]) -> None:
        """Count what one batch read.

        Args:
            dataset: name of the data set.
            samples: samples read, bad ones included.
            skips: the bad ones; one that was recorded before is not counted twice.
        """
        self._read[dataset] += samples
        lines = []
        for skip in skips:
            skip = dataclasses.replace(skip, dataset=dataset)
            if _identity(skip) in self._seen:
                continue
            self._seen.add(_identity(skip))
            self._bad[dataset] += 1
            self._causes[dataset, skip.cause] += 1
            self._sources[dataset, skip.shard] += 1
            self._last[dataset] = skip
            if skip.fatal and self._fatal is None:
                self._fatal = skip
            if _identity(skip) not in self._written:
                lines.append(json.dumps(dataclasses.asdict(skip), ensure_ascii=False) + "\n")
        if lines and self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a+b") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
                if file.read(1) not in (b"", b"\n"):  # a crash cut the last line
                    lines.insert(0, "\n")
                file.write("".join(lines).encode())

    def verdict(self) -> str | None:
        """Return why the run must stop, or None."""
        where = f"; see {self._path}" if self._path is not None else ""
        if self._fatal is not None:
            skip = self._fatal
            sample = f" at sample {skip.key!r}" if skip.key else ""
            return f"data set {skip.dataset!r}: {skip.cause}{sample}: {skip.detail}{where}"
        for name, bad in self._bad.items():
            config = self._configs[name]
            allowed = max(config.bad_sample_floor, config.bad_sample_budget * self._read[name])
            if bad > allowed:
                causes = [(n, cause) for (d, cause), n in self._causes.items() if d == name]
                top = ", ".join(f"{n} x {cause}" for n, cause in sorted(causes, reverse=True)[:_NAMED_CAUSES])
                last = self._last[name]
                return (
                    f"data set {name!r}: {bad} bad samples of {self._read[name]} read, more than the "
                    f"{allowed:.0f} that bad_sample_budget {config.bad_sample_budget} and bad_sample_floor "
                    f"{config.bad_sample_floor} allow ({top}; last: sample {last.key!r} of {last.shard}: "
                    f"{last.detail}); repair the shards or raise the budget{where}"
                )
        return None

    def summary(self) -> dict[str, Any]:
        """Return counts of the run so far, by data set: read, bad, causes, sources."""
        return {
            name: {
                "read": self._read[name],
                "bad": self._bad[name],
                "causes": {cause: n for (d, cause), n in self._causes.items() if d == name},
                "sources": {shard: n for (d, shard), n in self._sources.items() if d == name},
            }
            for name in self._configs
        }


class LedgerActor:
    """Actor that counts bad samples over all ranks and stops all ranks at one step."""

    def __init__(
        self, datasets: Sequence[DatasetConfig], quarantine: str | None, skips: Mapping[str, Sequence[Skip]]
    ) -> None:
        """Open the ledger with what indexing found."""
        self._ledger = Ledger(datasets, quarantine)
        for name, found in skips.items():
            self._ledger.record(name, 0, found)
        self._counted: dict[int, set[int]] = {}
        self._furthest = -1
        self._stop_at: int | None = None

    def report(self, dp_rank: int, step: int, read: Mapping[str, tuple[int, Sequence[Skip]]]) -> None:
        """Count a step that one rank's readers have made; a step made again is not counted again."""
        counted = self._counted.setdefault(dp_rank, set())
        newest = max(counted, default=step)
        again = step in counted or step <= newest - _REMEMBERED
        if not again:
            counted.add(step)
            if len(counted) > 2 * _REMEMBERED:
                counted -= {s for s in counted if s <= newest - _REMEMBERED}
        for name, (samples, skips) in read.items():
            self._ledger.record(name, 0 if again else samples, skips)

    def may_pass(self, dp_rank: int, step: int, samples: Mapping[str, int]) -> str | None:
        """Allow a rank to train a step, or say why not. All ranks get the same answer for the same step.

        Args:
            dp_rank: the rank.
            step: the step; one without bad samples is counted now, others were reported when they were made.
            samples: what the rank reads in a step, by data set.
        """
        self.report(dp_rank, step, {name: (number, ()) for name, number in samples.items()})
        message = self._ledger.verdict()
        if message is not None and self._stop_at is None:
            self._stop_at = self._furthest + 1
        if self._stop_at is not None and step >= self._stop_at:
            return message
        self._furthest = max(self._furthest, step)
        return None

    def summary(self) -> dict[str, Any]:
        """Return counts of read and bad samples, see `Ledger.summary`."""
        return self._ledger.summary()


def _identity(skip: Skip) -> tuple[str, int, str, str]:
    """Name one bad sample of one place in the order."""
    return skip.dataset, skip.position, skip.shard, skip.key
