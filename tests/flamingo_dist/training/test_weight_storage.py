"""Training around a quantised frozen LM: equal to the LM of the dequantised values, on every layout, and resumable."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flamingo_dist.models.flamingo import FlamingoConfig
from flamingo_dist.models.linear import ColumnLinear, RowLinear
from flamingo_dist.parallel.topology import ParallelConfig, Topology, single_process
from flamingo_dist.planning.memory import state_memory
from flamingo_dist.planning.workload import DatasetShape, Workload
from flamingo_dist.training.build import build_model
from flamingo_dist.training.loop import TrainLoop
from tests import tiny
from tests.flamingo_dist.models.lm_oracles import save_oracles
from tests.flamingo_dist.training.test_checkpoint import RUN, Keep, Source, losses, settings
from tests.flamingo_dist.training.test_lm_kinds import networks

pytestmark = pytest.mark.distributed
STEPS = 2
PLAIN = ParallelConfig(zero_stage=0)


def kinds(published: dict[str, str], storage: str) -> dict[str, FlamingoConfig]:
    """Every kind of LM in int8; fp8 differs from it in the codes alone."""
    found = networks(published)
    return found if storage == "int8" else {name: found[name] for name in ("chinchilla", "qwen2")}


def stored_as(config: FlamingoConfig, storage: Any) -> FlamingoConfig:
    """With "fp8 products", fp8 and multiplied so."""
    kind, _, products = storage.partition(" ")
    lm = replace(config.lm, weight_storage=kind, matrix_products="fp8" if products else "same")
    return replace(config, lm=lm)


def matrices(step: Any) -> dict[str, Any]:
    lm = step.engine.module.lm
    return {n: m for n, m in lm.named_modules() if isinstance(m, ColumnLinear | RowLinear)}


def steps_of(step: Any, topology: Topology, count: int = STEPS) -> list[tuple[dict[str, float], float]]:
    results = [step.run(i, tiny.batches(i, topology)) for i in range(count)]
    return [(dict(r.loss), r.grad_norm) for r in results]


def quantised_and_dequantised(topology: Topology, published: dict[str, str], storage: str) -> Any:
    """Steps with the quantised LM, with an LM that was given the dequantised values, and with the LM as it was."""
    found = {}
    train = tiny.train_config(STEPS, lr=2e-3)
    for name, config in kinds(published, storage).items():
        stored = tiny.make_step(topology, PLAIN, train, stored_as(config, storage))
        twin = tiny.make_step(topology, PLAIN, train, config)
        plain = tiny.make_step(topology, PLAIN, train, config)
        twins = matrices(twin)
        assert twins.keys() == matrices(stored).keys()
        for part, layer in matrices(stored).items():
            twins[part].weight.copy_(layer.quantised.dequantised())
        found[name] = [steps_of(step, topology) for step in (stored, twin, plain)]
    return found


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_oracles(folder)
    return {name: str(folder / name) for name in ("gpt2", "qwen2")}


@pytest.mark.parametrize("storage", ["int8", "fp8"])
def test_steps_equal_those_with_the_dequantised_values(ranks, published, storage):
    found = ranks.run(quantised_and_dequantised, published, storage, world=1)[0]
    for name, (stored, twin, plain) in found.items():
        for (loss, norm), (want, want_norm), (other, _) in zip(stored, twin, plain, strict=True):
            assert loss == pytest.approx(want, abs=1e-5), name
            assert norm == pytest.approx(want_norm, rel=1e-4), name
            assert loss == pytest.approx(other, abs=0.1), name
        assert stored[0][0] != plain[0][0], "the storage has an effect"


def train(topology: Topology, parallel: ParallelConfig, published: dict[str, str], storage: str) -> Any:
    """Steps of every kind of LM, and the codes and scales of its row-parallel matrices."""
    found = {}
    for name, config in kinds(published, storage).items():
        step = tiny.make_step(topology, parallel, tiny.train_config(STEPS), stored_as(config, storage))
        rows = {
            part: (layer.quantised.codes_OI.float(), layer.quantised.scale_O)
            for part, layer in matrices(step).items()
            if isinstance(layer, RowLinear)
        }
        found[name] = (steps_of(step, topology), rows)
    return found


LAYOUTS = [
    (2, 2, ParallelConfig(tensor=2, zero_stage=3, activation_checkpointing=True), "fp8"),
    (4, 2, ParallelConfig(tensor=2, zero_stage=2, activation_checkpointing=True), "int8"),
]


@pytest.fixture(scope="module")
def reference(ranks, published):
    return {s: ranks.run(train, PLAIN, published, s, world=1)[0] for s in ("int8", "fp8")}


@pytest.mark.parametrize(("world", "tensor", "parallel", "storage"), LAYOUTS, ids=["tp2", "tp2 dp2"])
def test_every_layout_trains_alike(ranks, published, reference, world, tensor, parallel, storage):
    results = ranks.run(train, parallel, published, storage, world=world, tensor=tensor)
    for name, (steps, rows) in reference[storage].items():
        for result in results:
            for (loss, norm), (want, want_norm) in zip(result[name][0], steps, strict=True):
                assert loss == pytest.approx(want, abs=3e-5), name
                assert norm == pytest.approx(want_norm, rel=1e-3), name
        for part, (codes, scale) in rows.items():
            parts = [results[rank][name][1][part] for rank in range(tensor)]
            assert torch.equal(torch.cat([p[0] for p in parts], dim=1), codes), (name, part)
            assert all(torch.equal(p[1], scale) for p in parts), (name, part)


def train_fp8(topology: Topology, parallel: ParallelConfig) -> Any:
    """Steps with fp8 products, of the tiny network."""
    config = stored_as(tiny.network(gate_init=0.5), "fp8 products")
    return steps_of(tiny.make_step(topology, parallel, tiny.train_config(STEPS), config), topology)


FP8_LAYOUTS = {
    "recomputed": (1, 1, ParallelConfig(zero_stage=0, activation_checkpointing=True), 1e-6),
    "dp2": (2, 1, ParallelConfig(zero_stage=3, activation_checkpointing="selective"), 1e-5),
    # A rank's part of a row has a largest value of its own: other codes, within fp8's own rounding.
    "tp2": (2, 2, ParallelConfig(tensor=2, zero_stage=3), 2e-2),
    "rows in parts": (1, 1, ParallelConfig(zero_stage=0, micro_rows=1), 1e-5),
}


@pytest.mark.parametrize("name", FP8_LAYOUTS)
def test_fp8_products_train_alike(ranks, fp8_reference, name):
    world, tensor, parallel, bound = FP8_LAYOUTS[name]
    for result in ranks.run(train_fp8, parallel, world=world, tensor=tensor):
        for (loss, norm), (want, want_norm) in zip(result, fp8_reference, strict=True):
            assert loss == pytest.approx(want, abs=bound)
            assert norm == pytest.approx(want_norm, rel=10 * bound)


@pytest.fixture(scope="module")
def fp8_reference(ranks):
    return ranks.run(train_fp8, PLAIN, world=1)[0]


def learn(topology: Topology) -> dict[str, list[float]]:
    found = {}
    parallel = ParallelConfig(zero_stage=3, activation_checkpointing=True)
    for storage in ("same", "int8", "fp8", "fp8 products"):
        config = stored_as(tiny.network(gate_init=0.5), storage)
        step = tiny.make_step(topology, parallel, tiny.train_config(5, dtype="bf16"), config)
        found[storage] = [sum(step.run(i, tiny.batches(0, topology)).loss.values()) for i in range(5)]
    return found


def test_a_run_in_bf16_learns_as_without(ranks):
    runs = ranks.run(learn, world=1)[0]
    for storage in ("int8", "fp8", "fp8 products"):
        assert runs[storage][-1] < runs[storage][0] - 0.1, storage
        assert runs[storage] == pytest.approx(runs["same"], abs=0.05), storage


def resumed(topology: Topology, folder: str) -> tuple[Any, Any]:
    parallel = ParallelConfig(tensor=topology.tensor, zero_stage=3, activation_checkpointing=True)

    def run(name: str, stop_after: int | None, resume: str) -> Any:
        config = stored_as(tiny.network(gate_init=0.5), "int8")
        step = tiny.make_step(topology, parallel, settings(4), config)
        whole = TrainLoop(
            step,
            Source(topology),
            Keep(stop_after),
            config=settings(4),
            topology=topology,
            checkpoints=Path(folder) / name,
            run=RUN,
            gates=step.engine.module.gate_values,
        )
        whole.run(resume)
        return losses(whole.observer.records)

    return run("a", None, "auto"), run("b", 2, "auto") | run("b", None, "latest")


def test_a_resumed_run_is_the_straight_one_to_the_bit(ranks, tmp_path):
    for straight, parts in ranks.run(resumed, str(tmp_path), world=2, tensor=2):
        assert len(straight) == 4
        assert parts == straight


@pytest.mark.parametrize("storage", ["int8", "fp8", "fp8 products"])
def test_planned_bytes_are_those_of_the_tensors(storage):
    config = stored_as(tiny.network(), storage)
    parallel = ParallelConfig(zero_stage=0)
    shape = DatasetShape(name="docs", rows=4, tokens=14, media=2, frames=2)
    work = Workload(model=config, datasets=(shape,), parallel=parallel, bytes_per_value=2)
    with single_process() as topology:
        model = build_model(config, parallel, topology, dtype=torch.bfloat16, seed=0)
    held = sum(b.numel() * b.element_size() for b in model.lm.buffers())
    assert state_memory(work, tp=1, dp=1, residency="resident")["frozen"] == held
    if storage != "fp8 products":  # which keep the codes twice
        plain = replace(work, model=tiny.network())
        assert held < state_memory(plain, tp=1, dp=1, residency="resident")["frozen"]


def test_partitioned_weights_cannot_be_quantised():
    parallel = ParallelConfig(zero_stage=3, frozen="partitioned")
    with single_process() as topology, pytest.raises(ValueError, match="needs parallel.frozen='resident'"):
        build_model(
            stored_as(tiny.network(), "int8"), parallel, topology, dtype=torch.float32, seed=0, ds_config={}
        )


def test_a_storage_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"weight_storage='int4' is not known; choose one of \('same', "):
        stored_as(tiny.network(), "int4")
