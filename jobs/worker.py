"""What one training process of a run does, from process group to last caption."""

import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist

from data_pipeline.batch import Batch
from data_pipeline.errors import ResumeError
from data_pipeline.feed import Feed
from flamingo_dist.parallel.topology import Topology, init_groups, world_device
from flamingo_dist.training.batch import TrainBatch
from flamingo_dist.training.build import build_engine
from flamingo_dist.training.loop import Record, TrainLoop, TrainOutcome
from flamingo_dist.training.step import TrainStep
from jobs.batches import to_train_batch
from jobs.config import RunConfig
from jobs.errors import ERRORS_OF_ALL_RANKS, USER_ERRORS
from jobs.held_out import HeldOut
from jobs.metrics import MetricsFile
from jobs.pictures import PictureBook
from jobs.utilisation import agree_on_peak


@dataclass(frozen=True, kw_only=True)
class WorkerTask:
    """What the driver hands to every training process."""

    config: RunConfig
    """The run."""
    run_dir: str
    """Run folder, on a file system that all nodes share."""
    feeds: Mapping[tuple[int, int], Feed]
    """Feeds by (data-parallel rank, tensor-parallel rank)."""
    pictures: Mapping[str, tuple[str, ...]]
    """Shards with the original media of the held-out data sets, by name."""
    control: Any
    """Handle of the run's `Control` actor."""
    resume: str | None
    """Checkpoint to resume from, see `find_checkpoint`."""
    description: Mapping[str, Any]
    """What a checkpoint to resume must be of, see `jobs.driver.describe`."""
    allow_change: tuple[str, ...] = ()
    """Settings of it that may differ, see `check_run`."""


class FeedSource:
    """The training loop's batches, from a feed of the data pipeline.

    Where the data sets take turns, one step of the feed lasts for as many of training: each data set's batch waits for
    its turn, so that none is read and left out.
    """

    def __init__(self, feed: Feed, device: torch.device, *, turns: int = 1) -> None:
        """Take batches from `feed` to `device`.

        Args:
            feed: of all data sets, in the order in which they take turns.
            device: where they go.
            turns: steps of training to a step of the feed: 1, or the number of data sets.
        """
        self._feed, self._device, self._turns = feed, device, turns
        self._held: tuple[int, dict[str, Batch]] | None = None
        self._bad = 0

    def next(self, step: int) -> dict[str, TrainBatch]:
        """Return the batches of `step`."""
        asked, turn = divmod(step, self._turns)
        if self._held is None or self._held[0] != asked:
            self._held = asked, self._feed.next(asked)
        batches = self._held[1]
        if self._turns > 1:
            name = list(batches)[turn]
            batches = {name: batches[name]}
        else:
            self._held = None
        self._bad = sum(len(batch.skips) for batch in batches.values())
        return {name: to_train_batch(batch, self._device) for name, batch in batches.items()}

    def bad_samples(self) -> int:
        """Return the bad samples of the last batches."""
        return self._bad

    def state(self, step: int) -> dict[str, Any]:
        """Return the position before `step`: the feed's, and whose turn it is."""
        asked, turn = divmod(step, self._turns)
        return {**self._feed.state(asked), "turns": self._turns, "turn": turn}

    def check_state(self, saved: Mapping[str, Any]) -> int:
        """Return the step that a saved position stands before.

        Raises:
            ResumeError: the data differ, or how the data sets take turns.
        """
        turns = saved.get("turns", 1)
        if turns != self._turns:
            raise ResumeError(
                f"the data cannot be continued where the checkpoint stopped: a feed step lasted for {turns} steps "
                f"of training, and now for {self._turns} (train.mixing). Restore it, or start a new run from the "
                "checkpoint's weights alone"
            )
        return self._feed.check_state(saved) * turns + int(saved.get("turn", 0))


class RunObserver:
    """Writes records on rank 0, shows them through the control actor, and asks it for stop requests.

    The question is asked without waiting: the answer to one step's question is read at the next.
    """

    def __init__(self, metrics: MetricsFile | None, control: Any, *, is_first: bool) -> None:
        """Write to `metrics` (None on other ranks than the first) and talk to `control`."""
        self._metrics, self._control, self._is_first = metrics, control, is_first
        self._question: Any = None

    def record(self, record: Record) -> None:
        """Write and show one record."""
        if self._metrics is not None:
            self._metrics.append(record)
        if self._is_first:
            self._control.show.remote(record)

    def stop_requested(self) -> bool:
        """Return whether a stop was requested, as far as is known."""
        if not self._is_first:
            return False  # the step spreads the first rank's wish
        answer = False
        if self._question is None:
            self._question = self._control.stop_requested.remote()
        ready, _ = ray.wait([self._question], timeout=0)
        if ready:
            answer = bool(ray.get(self._question))
            self._question = self._control.stop_requested.remote()
        return answer


def prepare_process(config: RunConfig) -> Topology:
    """Set threads, device, seeds and Megatron's groups of this training process."""
    torch.set_num_threads(config.resources.threads_per_worker)
    if config.resources.use_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    topology = Topology(world=dist.get_world_size(), rank=dist.get_rank(), tensor=config.parallel.tensor)
    init_groups(topology, timeout_seconds=config.parallel.collective_timeout_seconds)
    seed = config.train.seed + topology.data_rank
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return topology


def train_process(task: WorkerTask) -> TrainOutcome:
    """Train on this rank of the initialised default process group, then caption held-out media."""
    config = task.config
    topology = prepare_process(config)
    device = world_device()
    engine = build_engine(config.model, config.train, config.parallel, topology)
    step = TrainStep(
        engine,
        config.train,
        topology,
        {name: dataset.weight_at for name, dataset in config.data.train.items()},
        config.parallel,
    )
    run_dir = Path(task.run_dir)
    held_out = HeldOut(engine, config, topology, device, PictureBook(task.pictures))
    is_first = topology.rank == 0
    metrics = MetricsFile(run_dir / "metrics.jsonl") if is_first else None
    utilisation, peak = agree_on_peak(config, topology, device)
    if metrics is not None:
        metrics.append({"kind": "peak", "tflops": peak.flops / 1e12, "source": peak.source})
    loop = TrainLoop(
        step,
        FeedSource(
            task.feeds[topology.data_rank, topology.tensor_rank],
            device,
            turns=len(config.data.train) if config.train.mixing == "round_robin" else 1,
        ),
        RunObserver(metrics, task.control, is_first=is_first),
        config=config.train,
        topology=topology,
        checkpoints=run_dir / "checkpoints",
        run=task.description,
        gates=engine.module.gate_values,
        probe=held_out.probe if config.data.held_out else None,
        utilisation=utilisation.of_step,
        may_change=task.allow_change,
    )
    outcome = loop.run(task.resume)
    if outcome.status == "finished" and config.captions.dataset:
        held_out.write_captions(run_dir)
    return outcome


def ray_train_entry(settings: dict[str, Any]) -> None:
    """Entry point of a Ray Train worker; its process group is set up already.

    After a failure Ray Train starts all workers again: they then go on from the last checkpoint, unless what failed
    would fail again, as errors do that are meant for users.
    """
    task: WorkerTask = settings["task"]
    if ray.get(task.control.error.remote()) is not None:
        return
    restarts = ray.get(task.control.begin.remote(dist.get_rank()))
    resume = task.resume if restarts == 0 else "auto"
    try:
        outcome = train_process(WorkerTask(**{**vars(task), "resume": resume}))
    except ERRORS_OF_ALL_RANKS as error:
        # Starting again would not help; told to the driver, instead of failing a process that Ray would restart.
        _tell(task.control, error)
        return
    except USER_ERRORS as error:
        # Perhaps of this rank alone: raised, so that Ray ends those that wait for it, but told before.
        _tell(task.control, error)
        raise
    if dist.get_rank() == 0:
        ray.get(task.control.finish.remote(outcome))
    dist.barrier()


def _tell(control: Any, error: Exception) -> None:
    """Tell the driver `error`, or its words where it cannot travel, and wait until it is held."""
    try:
        ray.get(control.fail.remote(error))
    except Exception:  # of many kinds: what an error holds may be of any library
        ray.get(control.fail.remote(ValueError(f"{type(error).__name__}: {error}")))
