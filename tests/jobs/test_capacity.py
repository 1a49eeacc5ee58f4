"""A run that asks for more than the Ray cluster has says so instead of waiting."""

from dataclasses import replace

import pytest

from jobs import capacity
from jobs.capacity import asked_for, await_capacity
from jobs.config import RunConfig
from jobs.recipes.smoke import smoke


def on_gpus() -> RunConfig:
    config = smoke()
    return replace(config, resources=replace(config.resources, use_gpu=True))


def test_what_a_run_asks_for():
    assert asked_for(smoke()) == {"CPU": 4.5, "GPU": 0.0}
    assert asked_for(on_gpus()) == {"CPU": 4.5, "GPU": 4.0}


def test_a_cluster_that_has_it_all_is_fine(capsys):
    await_capacity(smoke(), may_grow=False, there=lambda: {"CPU": 4.5, "node:1": 1.0})
    await_capacity(on_gpus(), may_grow=True, there=lambda: {"CPU": 8, "GPU": 4})
    assert capsys.readouterr().out == ""


def test_gpus_that_are_not_there_are_refused_at_once():
    says = r"asks for 4.5 CPUs and 4 GPUs .*, the Ray cluster has 8 CPUs and 0 GPUs; .*--resources.no-use-gpu"
    with pytest.raises(ValueError, match=says):
        await_capacity(on_gpus(), may_grow=False, there=lambda: {"CPU": 8})


def test_cpus_that_are_not_there_are_refused():
    says = "has 4 CPUs; lower --resources.workers, or lower --resources.cpus-per-worker"
    with pytest.raises(ValueError, match=says):
        await_capacity(smoke(), may_grow=False, there=lambda: {"CPU": 4})


def test_a_joined_cluster_may_grow_for_a_while(monkeypatch, capsys):
    monkeypatch.setattr(capacity, "_LOOK_SECONDS", 0.01)
    requests = []
    monkeypatch.setattr(capacity, "_request", requests.append)
    sizes = iter([2, 2, 2, 5])
    await_capacity(smoke(), may_grow=True, seconds=60, there=lambda: {"CPU": next(sizes)})
    assert "has 2 CPUs; waiting up to 60 s for it to grow" in capsys.readouterr().out
    assert requests == [[{"CPU": 1}] * 5, []]
    with pytest.raises(ValueError, match="add nodes to the cluster"):
        await_capacity(smoke(), may_grow=True, seconds=0.03, there=lambda: {"CPU": 2})
