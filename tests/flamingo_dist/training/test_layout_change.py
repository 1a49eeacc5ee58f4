"""A checkpoint of one layout resumes in another: same state to the bit, same next losses."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flamingo_dist.models.flamingo import FlamingoConfig
from flamingo_dist.parallel.topology import ParallelConfig, Topology
from flamingo_dist.training.checkpoint import CheckpointWriter, load_checkpoint
from flamingo_dist.training.checkpoint_folder import CheckpointError, read_manifest, step_folder
from flamingo_dist.training.fragments import Fragment, Slice
from flamingo_dist.training.stored_state import read_fragments, stored_shapes
from tests import tiny

pytestmark = pytest.mark.distributed
RUN = {"model": "tiny"}
SAVED_AT, MORE = 3, 2
PARTITIONED = ParallelConfig(zero_stage=3, frozen="partitioned", activation_checkpointing=True)


def network() -> FlamingoConfig:
    """Tensor parallelism 4 must divide it."""
    base = tiny.network(gate_init=0.5)
    return replace(
        base,
        lm=replace(base.lm, num_kv_heads=4),
        resampler=replace(base.resampler, heads=4),
        gated=replace(base.gated, heads=4),
    )


def make_step(topology: Topology, parallel: ParallelConfig, config: FlamingoConfig | None = None):
    train = tiny.train_config(SAVED_AT + MORE)
    return tiny.make_step(topology, replace(parallel, tensor=topology.tensor), train, config or network())


def train_on(step, topology: Topology, first: int, last: int) -> list[dict[str, float]]:
    return [dict(step.run(i, tiny.batches(i, topology)).loss) for i in range(first, last)]


def save_and_go_on(topology: Topology, folder: str, parallel: ParallelConfig) -> list[dict[str, float]]:
    step = make_step(topology, parallel)
    train_on(step, topology, 0, SAVED_AT)
    writer = CheckpointWriter(Path(folder), topology, keep=1)
    writer.save(step.engine, SAVED_AT, {"run": RUN, "data": {}})
    losses = train_on(step, topology, SAVED_AT, SAVED_AT + MORE)  # while it is written
    writer.wait()
    return losses


def load_and_go_on(topology: Topology, folder: str, again: str, parallel: ParallelConfig):
    """Load, save at once into another folder, and train on."""
    step = make_step(topology, parallel)
    done = load_checkpoint(step.engine, step_folder(Path(folder), SAVED_AT), RUN, topology, lambda _: None)
    writer = CheckpointWriter(Path(again), topology, keep=1)
    writer.save(step.engine, done, {"run": RUN, "data": {}})
    draws = torch.rand(2).tolist()
    losses = train_on(step, topology, done, done + MORE)
    writer.wait()
    return losses, draws


def load_another_network(topology: Topology, folder: str) -> str:
    base = network()
    other = replace(base, cross_every=1, resampler=replace(base.resampler, latents=5))
    step = make_step(topology, ParallelConfig(zero_stage=3), other)
    with pytest.raises(CheckpointError) as told:
        load_checkpoint(step.engine, step_folder(Path(folder), SAVED_AT), RUN, topology, lambda _: None)
    return str(told.value)


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """All stored tensors, whole."""
    path = step_folder(folder, SAVED_AT)
    whole = {name: torch.full(shape, torch.nan) for name, shape in stored_shapes(path).items()}
    read_fragments(
        path,
        {
            name: Fragment(v.view(-1), 0, Slice(shape=tuple(v.shape), tag=tiny.WHOLE, tp_rank=0, tp_size=1))
            for name, v in whole.items()
        },
    )
    return whole


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tp2dp2")
    losses = ranks.run(save_and_go_on, str(folder), ParallelConfig(zero_stage=3), world=4, tensor=2)[0]
    return folder, losses


@pytest.mark.parametrize(
    ("world", "tensor", "parallel"),
    [
        (1, 1, ParallelConfig(zero_stage=0)),
        (4, 1, ParallelConfig(zero_stage=3)),
        (4, 4, PARTITIONED),
        (4, 1, ParallelConfig(zero_stage=2)),
        (2, 2, ParallelConfig(zero_stage=1)),
    ],
)
def test_another_layout_has_the_same_state_and_the_same_next_losses(
    ranks, saved, tmp_path, world, tensor, parallel
):
    folder, expected = saved
    results = ranks.run(load_and_go_on, str(folder), str(tmp_path), parallel, world=world, tensor=tensor)
    for losses, _ in results:
        for mine, theirs in zip(losses, expected, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5)
    assert len({tuple(draws) for _, draws in results}) == world, "ranks must not draw the same numbers"
    before, after = state_of(folder), state_of(tmp_path)
    assert before.keys() == after.keys()
    assert {name.split("/")[0] for name in before} == {"weight", "exp_avg", "exp_avg_sq"}
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    assert read_manifest(step_folder(tmp_path, SAVED_AT))["updates"] == SAVED_AT


def test_moments_matter(ranks, saved, tmp_path):
    """The losses above would differ if the optimizer's state were lost."""
    folder, expected = saved
    losses = ranks.run(go_on_without_moments, str(folder), world=1)[0]
    assert losses[0] == pytest.approx(expected[0], rel=1e-5)
    assert losses[-1] != pytest.approx(expected[-1], rel=1e-5)


def go_on_without_moments(topology: Topology, folder: str) -> list[dict[str, float]]:
    step = make_step(topology, ParallelConfig(zero_stage=0))
    path = step_folder(Path(folder), SAVED_AT)
    load_checkpoint(step.engine, path, RUN, topology, lambda _: None)
    step.engine.optimizer.state.clear()
    return train_on(step, topology, SAVED_AT, SAVED_AT + MORE)


def test_another_network_is_refused_by_name(ranks, saved):
    told = ranks.run(load_another_network, str(saved[0]), world=1)[0]
    assert "does not fit the network: missing ['exp_avg/gated.1.attn.k.weight'" in told
