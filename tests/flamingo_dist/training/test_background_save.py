"""Checkpoints are written while training goes on; whatever happens meanwhile, the one before stands."""

import shutil
import threading
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from flamingo_dist.parallel.topology import ParallelConfig, Topology
from flamingo_dist.training import checkpoint
from flamingo_dist.training.checkpoint import CheckpointWriter
from flamingo_dist.training.checkpoint_folder import (
    CheckpointError,
    begin,
    check_files,
    complete,
    list_checkpoints,
    read_manifest,
    step_folder,
)
from flamingo_dist.training.stored_state import read_whole
from tests import tiny

pytestmark = pytest.mark.distributed
DESCRIPTION = {"run": {}, "data": {}}


def trained(topology: Topology, folder: str) -> tuple:
    step = tiny.make_step(topology, ParallelConfig(zero_stage=3))
    step.run(0, tiny.batches(0, topology))
    return step, CheckpointWriter(Path(folder), topology, keep=2)


def slow_write(topology: Topology, folder: str) -> dict:
    """Hold the writing up, train on, let it go."""
    step, writer = trained(topology, folder)
    gate, real = threading.Event(), writer._write_files

    def held(*args):
        gate.wait(30)
        return real(*args)

    writer._write_files = held
    writer.save(step.engine, 1, DESCRIPTION)
    step.run(1, tiny.batches(1, topology))
    meanwhile = [p.name for p in list_checkpoints(Path(folder))]
    gate.set()
    writer.save(step.engine, 2, DESCRIPTION)  # waits for the first
    after_second_began = [p.name for p in list_checkpoints(Path(folder))]
    writer.wait()
    return {"meanwhile": meanwhile, "after": after_second_began}


def failing_write(topology: Topology, folder: str) -> dict:
    step, writer = trained(topology, folder)
    writer.save(step.engine, 1, DESCRIPTION)
    writer.wait()
    real = checkpoint.describe_files

    def full_disk(*args, **kwargs):
        if topology.rank == 1:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    checkpoint.describe_files = full_disk
    writer.save(step.engine, 2, DESCRIPTION)
    step.run(1, tiny.batches(1, topology))
    with pytest.raises(CheckpointError) as told:
        writer.save(step.engine, 3, DESCRIPTION)
    there = [p.name for p in list_checkpoints(Path(folder))]
    checkpoint.describe_files = real
    writer.save(step.engine, 4, DESCRIPTION)
    writer.wait()
    return {"told": str(told.value), "there": there}


def failing_random_state(topology: Topology, folder: str) -> str:
    """One rank's disk is full before the collectives of the tensors begin."""
    step, writer = trained(topology, folder)
    real = torch.save

    def full_disk(*args: object, **kwargs: object) -> None:
        if topology.rank == 1 and "rng-" in str(args[1]):
            raise OSError(28, "No space left on device")
        real(*args, **kwargs)

    with patch.object(torch, "save", full_disk):
        writer.save(step.engine, 1, DESCRIPTION)
        with pytest.raises(CheckpointError) as told:
            writer.wait()
    writer.save(step.engine, 2, DESCRIPTION)
    writer.wait()
    return str(told.value)


def dies_while_writing(topology: Topology, folder: str) -> None:
    """Return, and be killed, when the tensors of the second checkpoint are written but it is not complete."""
    step, writer = trained(topology, folder)
    writer.save(step.engine, 1, DESCRIPTION)
    writer.wait()
    written = threading.Event()

    def never(*_, **__):
        written.set()
        threading.Event().wait()

    checkpoint.complete = never
    writer.save(step.engine, 2, DESCRIPTION)
    assert written.wait(30)


def test_training_goes_on_while_a_checkpoint_is_written(ranks, tmp_path):
    for result in ranks.run(slow_write, str(tmp_path), world=2):
        assert result == {"meanwhile": [], "after": ["step-00000001"]}
    first, second = list_checkpoints(tmp_path)
    name, shape = "gated.0.attn.q.weight", torch.Size((16, 32))
    old, new = read_whole(first, name, shape), read_whole(second, name, shape)
    assert not torch.equal(old, new), "the copy must not follow the training"
    manifest = read_manifest(first)
    check_files(first, manifest)
    assert manifest["copy_seconds"] > 0
    assert manifest["write_seconds"] > 0


def test_a_failed_write_is_an_error_on_all_ranks_and_the_checkpoint_before_stands(ranks, tmp_path):
    for result in ranks.run(failing_write, str(tmp_path), world=2):
        assert "step-00000002 failed; the checkpoint before it stands" in result["told"]
        assert "No space left on device" in result["told"]
        assert result["there"] == ["step-00000001"]
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000001", "step-00000004"]
    assert not list(tmp_path.glob(".partial*"))


def test_a_rank_that_fails_before_the_tensors_leaves_none_waiting(ranks, tmp_path):
    for told in ranks.run(failing_random_state, str(tmp_path), world=2):
        assert "No space left on device" in told
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000002"]


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_fail_the_new_one(tmp_path):
    first, second = (step_folder(tmp_path, step) for step in (1, 2))
    begin(first)
    complete(first, {}, keep=1)
    begin(second)
    real = shutil.rmtree

    def busy(path: Path, **kwargs: bool) -> None:
        if path == first:
            raise OSError("busy")
        real(path, **kwargs)

    with patch.object(shutil, "rmtree", busy), pytest.warns(UserWarning, match="cannot be deleted: busy"):
        complete(second, {}, keep=1)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000002"]


def test_a_death_while_writing_leaves_the_checkpoint_before(ranks, tmp_path):
    ranks.run(dies_while_writing, str(tmp_path), world=1)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000001"]
    assert [p.name for p in tmp_path.glob(".partial*")] == [".partial-step-00000002"]
    check_files(tmp_path / "step-00000001", read_manifest(tmp_path / "step-00000001"))
    ranks.run(failing_write, str(tmp_path), world=2)
    assert not list(tmp_path.glob(".partial*"))
