"""The training loop: batches in, steps, checkpoints, probes and one metrics record a step out."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from flamingo_dist.models.ranges import part
from flamingo_dist.parallel.topology import Topology
from flamingo_dist.training.batch import TrainBatch
from flamingo_dist.training.checkpoint import CheckpointWriter, load_checkpoint, on_all_ranks
from flamingo_dist.training.checkpoint_folder import find_checkpoint, set_aside_newer
from flamingo_dist.training.config import TrainConfig
from flamingo_dist.training.step import StepResult, TrainStep

Record = dict[str, Any]


class BatchSource(Protocol):
    """Where this rank's batches come from; it holds no position."""

    def next(self, step: int) -> Mapping[str, TrainBatch]:
        """Return the batches of step number `step` by data set."""
        ...

    def bad_samples(self) -> int:
        """Return how many bad samples the last batches had on this rank."""
        ...

    def state(self, step: int) -> Mapping[str, Any]:
        """Return the position before `step` as plain JSON."""
        ...

    def check_state(self, saved: Mapping[str, Any]) -> int:
        """Return the step that `saved` stands before; raise ValueError where this run's data differ."""
        ...


class Observer(Protocol):
    """What the loop tells, and asks, the world outside. Every rank has one."""

    def record(self, record: Record) -> None:
        """Take one metrics record; called with equal records on all ranks."""
        ...

    def stop_requested(self) -> bool:
        """Return whether someone wants the run to save and end."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainOutcome:
    """How a training loop ended."""

    status: Literal["finished", "stopped"]
    """"stopped": a stop was requested; a checkpoint was saved and the run can be resumed."""
    steps: int
    """Optimizer steps done in all, earlier runs included."""
    resumed_from: int | None
    """Step that this run resumed at."""
    skipped: int
    """Steps of this run that were skipped for a non-finite loss or gradient."""


class TrainLoop:
    """Runs a training loop on one rank; all ranks run it in step."""

    def __init__(
        self,
        step: TrainStep,
        source: BatchSource,
        observer: Observer,
        *,
        config: TrainConfig,
        topology: Topology,
        checkpoints: Path,
        run: Mapping[str, Any],
        gates: Callable[[], Mapping[str, list[Tensor]]],
        probe: Callable[[], Record] | None = None,
        utilisation: Callable[[Mapping[str, int], Mapping[str, int], float], Mapping[str, float]]
        | None = None,
        may_change: Sequence[str] = (),
    ) -> None:
        """Prepare.

        Args:
            step: runs one optimizer step.
            source: this rank's batches.
            observer: takes records, may ask for a stop.
            config: training settings.
            topology: the run's degrees.
            checkpoints: folder of the run's checkpoints, shared by all ranks.
            run: what a resume must find equal, plain JSON.
            gates: gives tanh of the gates by kind, one tensor per gated block.
            probe: runs the grounding probe on all ranks together and returns its record.
            utilisation: gives shares of the machine's peak, to be recorded, from a step's loss tokens and media by
                data set and its seconds.
            may_change: settings of `run` that a resume may find changed, see `check_run`.
        """
        self.step, self.source, self.observer = step, source, observer
        self.config, self.topology = config, topology
        self.checkpoints, self.run_description = checkpoints, run
        self.gates, self.probe, self.utilisation = gates, probe, utilisation
        self.may_change = may_change
        self.writer = CheckpointWriter(checkpoints, topology, keep=config.keep_checkpoints)

    def resume(self, wanted: str | None) -> int | None:
        """Restore the checkpoint that `wanted` names ("auto", "latest", a step or a path), on all ranks together.

        The first rank chooses: others may see an older listing of a shared folder. Newer checkpoints of the run are
        set aside, so that what is trained from here on is the run.

        Returns:
            Steps done, or None where the run starts afresh.

        Raises:
            CheckpointError: see `load_checkpoint`; on all ranks.
        """
        if wanted is None:
            return None
        first = self.topology.rank == 0
        path = on_all_ranks(lambda: find_checkpoint(self.checkpoints, wanted) if first else None)[0]
        if path is None:
            return None

        def check_data(saved: Mapping[str, Any]) -> None:
            self.source.check_state(saved)

        step = load_checkpoint(
            self.step.engine, path, self.run_description, self.topology, check_data, self.may_change
        )
        on_all_ranks(lambda: set_aside_newer(self.checkpoints, step) if first else None)
        return step

    def run(self, resume: str | None = None) -> TrainOutcome:
        """Train to the last step, or until a stop is requested.

        Args:
            resume: see `resume`; None starts afresh.
        """
        resumed = self.resume(resume)
        done = resumed or 0
        stopped = False
        if self.config.probe_every and resumed is None:
            self._record_probe(0)  # with all gates shut: the bare LM, whatever the images
        try:
            while done < self.config.steps and not stopped:
                done, stopped = self._iterate(done)
        finally:
            self.writer.settle()  # whatever ended the run, a save under way may still become whole
        if not stopped and not self._probe_is_due(done):
            self._record_probe(done)
        return TrainOutcome(
            status="stopped" if stopped else "finished",
            steps=done,
            resumed_from=resumed,
            skipped=self.step.skipped,
        )

    def _iterate(self, number: int) -> tuple[int, bool]:
        """Run step `number` with all that belongs to it; return the steps done and whether to stop."""
        started = time.perf_counter()
        with part("data"):
            batches = self.source.next(number)
        data_seconds = time.perf_counter() - started
        result = self.step.run(
            number,
            batches,
            stop=self.observer.stop_requested(),
            bad_samples=self.source.bad_samples(),
        )
        done = number + 1
        checkpoint_seconds = 0.0
        is_last = done == self.config.steps
        every = self.config.checkpoint_every
        is_end = is_last or result.stop_requested
        if is_end or (every and done % every == 0):
            checkpoint_seconds = self._save(done, wait=is_end)
        record = self._record(result, data_seconds, checkpoint_seconds, time.perf_counter() - started)
        self.observer.record(record)
        if self._probe_is_due(done):
            self._record_probe(done)
        return done, result.stop_requested and not is_last

    def _probe_is_due(self, done: int) -> bool:
        return bool(self.config.probe_every) and done % self.config.probe_every == 0

    def _record_probe(self, done: int) -> None:
        if self.probe is not None:
            self.observer.record({"kind": "probe", "step": done, **self.probe()})

    def _save(self, done: int, *, wait: bool) -> float:
        """Start to save, or save to the end, and return the seconds that training stood still for it."""
        started = time.perf_counter()
        description = {"run": self.run_description, "data": self.source.state(done)}
        self.writer.save(self.step.engine, done, description)
        if wait:
            self.writer.wait()
        return time.perf_counter() - started

    def _record(self, result: StepResult, data: float, checkpoint: float, total: float) -> Record:
        """Return the metrics record of a step, see docs/architecture.md."""
        used = {} if self.utilisation is None else self.utilisation(result.loss_tokens, result.media, total)
        return {
            "kind": "step",
            "step": result.step,
            "time": time.time(),
            "loss": dict(result.loss),
            "tokens": dict(result.loss_tokens),
            "weights": dict(result.weights),
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "gates": {
                kind: [float(gate.abs().mean()) for gate in gates] for kind, gates in self.gates().items()
            },
            "seconds": {"data": data, **result.seconds, "checkpoint": checkpoint, "step": total},
            "tokens_per_second": result.tokens / total,
            **used,
            "skipped": int(not result.applied),
            "bad_samples": result.bad_samples,
        }
