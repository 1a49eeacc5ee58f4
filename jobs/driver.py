"""The driver of a run: a Ray cluster, data actors, training processes by Ray Train, a console, a report."""

import json
import logging
import os
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer

from data_pipeline.actors import RayPipeline
from flamingo_dist.training.checkpoint_folder import check_run, find_checkpoint, read_manifest
from flamingo_dist.training.loop import TrainOutcome
from jobs.capacity import asked_for, await_capacity
from jobs.config import RunConfig
from jobs.console import TrainingConsole
from jobs.control import Control
from jobs.errors import USER_ERRORS, RunFailedError
from jobs.features import encode_features
from jobs.frozen import frozen_contents
from jobs.places import absolute_checkpoint, with_absolute_paths
from jobs.preflight import check_held_out, check_vocabulary, warn_of_random_parts
from jobs.report import record_environment, write_report, write_summary
from jobs.run_lock import locked
from jobs.worker import WorkerTask, ray_train_entry

OVERHEAD_CPUS = 1
"""Logical CPUs for the data coordinators, the ledger and Ray Train's controller, on a Ray started here."""


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """How a run is started, apart from what it computes."""

    ray_address: str | None = None
    """Address of a running Ray cluster, or "auto"; None starts Ray on this machine for the run."""
    resume: str | None = None
    """Checkpoint to resume from: "auto", "latest", a step, or a path; None starts afresh."""
    allow_change: tuple[str, ...] = ()
    """Settings that may differ from the checkpoint's, see `check_run`."""
    verbose: bool = False
    """Show the logs of all processes."""


class Phases:
    """Seconds by phase of a run, kept in `phases.json`."""

    def __init__(self, run_dir: Path) -> None:
        """Go on from an earlier start of the same run."""
        self._path = run_dir / "phases.json"
        self.seconds: dict[str, float] = json.loads(self._path.read_text()) if self._path.exists() else {}

    def add(self, name: str, seconds: float) -> None:
        """Add `seconds` to a phase."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self._path.write_text(json.dumps(self.seconds, indent=1))

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time of the block to phase `name`."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - started)


@contextmanager
def ray_cluster(config: RunConfig, launch: LaunchConfig) -> Iterator[None]:
    """Connect to a Ray cluster, or start one on this machine for the time of the block.

    A cluster started here gets as many logical CPUs as the run needs, whatever the machine has: two cores run
    four small processes well enough. Its files go to a short temporary folder (Unix sockets limit the length).
    """
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray runs its workers at nice 15; any other process on the machine would then stall training.
    os.environ.setdefault("RAY_worker_niceness", "0")
    common: dict[str, Any] = {
        "log_to_driver": launch.verbose,
        "logging_level": logging.INFO if launch.verbose else logging.WARNING,
        "runtime_env": {"env_vars": worker_environment(config)},
    }
    if launch.ray_address is not None:
        ray.init(address=launch.ray_address, **common)
        try:
            yield
        finally:
            ray.shutdown()
        return
    cpus = asked_for(config)["CPU"] + OVERHEAD_CPUS
    with tempfile.TemporaryDirectory(prefix="fl-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        with _stop_requests_held():
            ray.init(
                num_cpus=max(int(-(-cpus // 1)), os.cpu_count() or 1),
                include_dashboard=False,
                _temp_dir=folder,
                **common,
            )
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _stop_requests_held() -> Iterator[None]:
    """Hold SIGTERM back for the time of the block, and for good in the processes that it starts.

    `timeout` and systemd send it to all processes of a run. Ray's own would end at once, before the driver, which it is
    for, has saved a checkpoint; the driver ends them itself.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def worker_environment(config: RunConfig) -> dict[str, str]:
    """Return the environment of the training processes and readers."""
    environment = {
        "OMP_NUM_THREADS": str(config.resources.threads_per_worker),
        "RAY_TRAIN_V2_ENABLED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not config.resources.use_gpu:
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def run(config: RunConfig, launch: LaunchConfig | None = None) -> TrainOutcome:
    """Run a configuration from data to report.

    Args:
        config: the run.
        launch: how it is started.

    Returns:
        How training ended.

    Raises:
        ValueError: a configuration, checkpoint or data set that cannot be run, before or during training.
        RunFailedError: a training process failed for another reason.
    """
    launch = launch or LaunchConfig()
    config = with_absolute_paths(config)
    launch = replace(launch, resume=absolute_checkpoint(launch.resume))
    check_vocabulary(config)
    check_held_out(config)
    warn_of_random_parts(config)
    description = describe(config)
    run_dir = check_run_folder(config, launch, description)
    with locked(run_dir):
        write_run_folder(run_dir, config)
        return _run_in(run_dir, config, launch, description)


def _run_in(
    run_dir: Path, config: RunConfig, launch: LaunchConfig, description: dict[str, Any]
) -> TrainOutcome:
    """Run from data to report in a run folder that is this process's own."""
    phases = Phases(run_dir)
    with ray_cluster(config, launch):
        await_capacity(config, may_grow=launch.ray_address is not None)
        started = time.monotonic()
        with phases.timed("encode"):
            streamed = encode_features(config)
        try:
            with phases.timed("train"):
                outcome = _train(config, streamed, launch, run_dir, description)
        except Exception:
            report_what_is_there(run_dir)
            raise
        phases.add("total", time.monotonic() - started)
    write_summary(run_dir)
    write_report(run_dir)
    return outcome


def report_what_is_there(run_dir: Path) -> None:
    """Write summary and report of a run that failed, be it in its last captions, if it has trained at all."""
    if not (run_dir / "metrics.jsonl").exists():
        return
    try:
        write_summary(run_dir)
        write_report(run_dir)
    except Exception as error:  # not in the place of what ended the run
        warnings.warn(f"no report of {run_dir}: {type(error).__name__}: {error}", stacklevel=2)


def describe(config: RunConfig) -> dict[str, Any]:
    """Return what a resumed run must share with the one it goes on with: settings, and what frozen weights hold.

    Raises:
        ValueError: published weights cannot be read.
    """
    try:
        return {**config.identity(), "frozen": frozen_contents(config)}
    except OSError as error:
        raise ValueError(f"published weights cannot be read: {error}") from error


def check_run_folder(config: RunConfig, launch: LaunchConfig, description: Mapping[str, Any]) -> Path:
    """Return the run's folder, which need not exist, if the run may start in it.

    Args:
        config: the run.
        launch: how it is started.
        description: see `describe`.

    Raises:
        ValueError: the folder holds a run and `launch` does not resume it.
        CheckpointError: the checkpoint to resume is not there, or is of another run.
    """
    run_dir = (Path(config.runs_dir) / config.name).resolve()
    if (run_dir / "metrics.jsonl").exists() and launch.resume is None:
        raise ValueError(
            f"{run_dir} holds a run already; resume it with --resume latest, choose another --name, or delete it."
        )
    if launch.resume is not None:
        path = find_checkpoint(run_dir / "checkpoints", launch.resume)
        if path is not None:
            check_run(read_manifest(path), description, launch.allow_change)  # before any process starts
    return run_dir


def write_run_folder(run_dir: Path, config: RunConfig) -> None:
    """Write the resolved configuration and the environment into the run's folder."""
    (run_dir / "config.json").write_text(json.dumps(config.to_json(), indent=1))
    record_environment(run_dir, recipe=config.recipe, extra={"world_size": config.resources.workers})


def _train(
    config: RunConfig, streamed: RunConfig, launch: LaunchConfig, run_dir: Path, description: dict[str, Any]
) -> TrainOutcome:
    """Start the data actors and the training processes, and show what they do until they end."""
    tensor = config.parallel.tensor
    data = config.resources.workers // tensor
    pipeline = RayPipeline(
        tuple(streamed.data.train.values()),
        config.data.tokenizer,
        seed=config.train.seed,
        dp_size=data,
        tp_size=tensor,
        config=config.data.readers,
        quarantine=run_dir / "quarantine.jsonl",
    )
    control = ray.remote(Control).options(num_cpus=0).remote()
    task = WorkerTask(
        config=streamed,
        run_dir=str(run_dir),
        feeds={(d, t): pipeline.feed(d, t) for d in range(data) for t in range(tensor)},
        pictures={name: dataset.urls for name, dataset in config.data.held_out.items()},
        control=control,
        resume=launch.resume,
        description=description,
        allow_change=launch.allow_change,
    )
    try:
        return _fit(make_trainer(config, task, run_dir), control, config)
    finally:
        pipeline.shutdown()
        ray.kill(control)


def make_trainer(config: RunConfig, task: WorkerTask, run_dir: Path) -> TorchTrainer:
    """Return Ray Train's trainer for a run: one worker a rank, tensor-parallel peers on one node."""
    resources = config.resources
    wanted: dict[str, float] = {"CPU": resources.cpus_per_worker}
    if resources.use_gpu:
        wanted["GPU"] = 1
    return TorchTrainer(
        ray_train_entry,
        train_loop_config={"task": task},
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.use_gpu,
            resources_per_worker=wanted,
            placement_strategy="PACK",
        ),
        torch_config=TorchConfig(
            backend="nccl" if resources.use_gpu else "gloo",
            timeout_s=config.parallel.collective_timeout_seconds,
        ),
        run_config=RayRunConfig(
            name=config.name,
            storage_path=str(run_dir / "ray_train"),
            failure_config=FailureConfig(max_failures=resources.max_failures),
        ),
    )


def _fit(trainer: TorchTrainer, control: Any, config: RunConfig) -> TrainOutcome:
    """Run the trainer in a thread; this one draws the console and turns signals into a stop request."""
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    with _stop_on_signals(control), TrainingConsole(config.train.steps) as console:
        thread.start()
        while thread.is_alive():
            thread.join(timeout=0.5)
            for record in ray.get(control.drain.remote()):
                console.update(record)
    # First: processes that Ray started again after it have ended without a failure of their own.
    met: Exception | None = ray.get(control.error.remote())
    if met is not None:
        raise met
    if failure:
        raise_user_error(failure[0])
    outcome: TrainOutcome | None = ray.get(control.outcome.remote())
    if outcome is None:
        raise RunFailedError(
            "the training processes ended without an outcome; run with --verbose for their logs."
        )
    return outcome


@contextmanager
def _stop_on_signals(control: Any) -> Iterator[None]:
    """Turn SIGTERM and the first SIGINT into "save a checkpoint and end"; a second SIGINT interrupts."""

    def on_signal(number: int, _: Any) -> None:
        control.request_stop.remote()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def raise_user_error(error: BaseException) -> None:
    """Raise what a training process raised: its own message for errors meant for users, else a summary.

    Raises:
        ValueError: of the kind that the training process raised.
        RunFailedError: for anything else.
    """
    failures = getattr(error, "worker_failures", {})
    causes = [getattr(f, "cause", None) or getattr(f, "_base_exc", None) or f for f in failures.values()]
    for cause in causes:
        if isinstance(cause, USER_ERRORS):
            raise cause from None
    told = "\n".join(dict.fromkeys(str(cause) for cause in causes)) or str(error)
    raise RunFailedError(f"a training process failed: {told}") from error
