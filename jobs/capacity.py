"""Whether a Ray cluster has what a run asks for; Ray itself would wait for it without end."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

import ray

from jobs.config import RunConfig

GROWTH_SECONDS = 300.0
"""How long a cluster that the run has joined may take to grow to what is asked for: an autoscaler starts nodes in
minutes, and so do nodes that join one by one."""
_LOOK_SECONDS = 5.0
_SLACK = 1e-6
"""Ray counts in ten-thousandths; fractions of CPUs are summed in floating point."""


def asked_for(config: RunConfig) -> dict[str, float]:
    """Return the logical CPUs and GPUs that the training processes and the readers reserve together."""
    resources, readers = config.resources, config.data.readers
    cpus = resources.workers * resources.cpus_per_worker + readers.readers * readers.cpus_per_reader
    return {"CPU": cpus, "GPU": float(resources.workers if resources.use_gpu else 0)}


def await_capacity(
    config: RunConfig,
    *,
    may_grow: bool,
    seconds: float = GROWTH_SECONDS,
    there: Callable[[], Mapping[str, float]] = ray.cluster_resources,
) -> None:
    """Compare what a run asks for with the whole cluster, whoever uses it now.

    Args:
        config: the run.
        may_grow: whether the cluster is not the run's own, so that nodes may still join it.
        seconds: how long to wait for them.
        there: what the cluster has in all.

    Raises:
        ValueError: the cluster has less, still after `seconds` if it may grow.
    """
    asked = asked_for(config)
    if not (lacking := _lacking(asked, there())):
        return
    if may_grow:
        print(f"{_says(asked, there())}; waiting up to {seconds:.0f} s for it to grow.", flush=True)
        deadline = time.monotonic() + seconds
        with _demand(config):
            while (lacking := _lacking(asked, there())) and time.monotonic() < deadline:
                time.sleep(min(_LOOK_SECONDS, max(0.0, deadline - time.monotonic())))
    if lacking:
        raise ValueError(f"{_says(asked, there())}; {_remedy(lacking, may_grow=may_grow)}.")


def _lacking(asked: Mapping[str, float], there: Mapping[str, float]) -> list[str]:
    return [name for name, wanted in asked.items() if wanted > there.get(name, 0.0) + _SLACK]


def _says(asked: Mapping[str, float], there: Mapping[str, float]) -> str:
    pairs = [f"{asked[name]:g} {name}s" for name in asked if asked[name]]
    found = [f"{there.get(name, 0.0):g} {name}s" for name in asked if asked[name]]
    return (
        f"the run asks for {' and '.join(pairs)} (resources.workers, cpus_per_worker and use_gpu, data.readers), "
        f"the Ray cluster has {' and '.join(found)}"
    )


def _remedy(lacking: list[str], *, may_grow: bool) -> str:
    found = ["lower --resources.workers"]
    if "GPU" in lacking:
        found.append("train on CPUs with --resources.no-use-gpu")
    if "CPU" in lacking:
        found.append("lower --resources.cpus-per-worker or --data.readers.readers")
    found.append("add nodes to the cluster" if may_grow else "join a larger cluster with --ray-address")
    return ", or ".join(found)


@contextmanager
def _demand(config: RunConfig) -> Iterator[None]:
    """Ask the cluster's autoscaler, if it has one, for what the run needs: it adds nodes for demand alone."""
    resources, readers = config.resources, config.data.readers
    worker = {"CPU": math.ceil(resources.cpus_per_worker), "GPU": int(resources.use_gpu)}
    bundles = [{name: count for name, count in worker.items() if count}] * resources.workers
    bundles += [{"CPU": 1}] * math.ceil(readers.readers * readers.cpus_per_reader)
    _request(bundles)
    try:
        yield
    finally:
        _request([])  # a request lasts until the next one


def _request(bundles: list[dict[str, int]]) -> None:
    # A hint: where there is no autoscaler, nodes that somebody adds are waited for all the same.
    with suppress(Exception):
        from ray.autoscaler.sdk import request_resources

        request_resources(bundles=bundles)
