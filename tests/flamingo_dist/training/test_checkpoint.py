"""Contract 6: resume is all or error."""

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from flamingo_dist.parallel.topology import ParallelConfig, Topology, single_process
from flamingo_dist.training import loop as loop_module
from flamingo_dist.training.build import build_model
from flamingo_dist.training.checkpoint_folder import (
    CheckpointError,
    await_checkpoint,
    check_run,
    find_checkpoint,
    list_checkpoints,
    read_manifest,
)
from flamingo_dist.training.config import TrainConfig
from flamingo_dist.training.loop import TrainLoop
from flamingo_dist.training.stored_state import load_trainable, stored_shapes
from tests import tiny

pytestmark = pytest.mark.distributed
RUN = {"model": "tiny", "train": {"lr": 0.01}}


class Source:
    def __init__(self, topology: Topology, shards: str = "abc") -> None:
        self.topology, self.shards = topology, shards

    def next(self, step: int) -> dict[str, Any]:
        return tiny.batches(step, self.topology)

    def bad_samples(self) -> int:
        return 0

    def state(self, step: int) -> dict[str, Any]:
        return {"step": step, "shards": self.shards}

    def check_state(self, saved: Any) -> int:
        if saved["shards"] != self.shards:
            raise ValueError(f"docs.shards was {saved['shards']!r}, is {self.shards!r}")
        return int(saved["step"])


class Keep:
    def __init__(self, stop_after: int | None = None) -> None:
        self.records: list[dict[str, Any]] = []
        self.stop_after = stop_after

    def record(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def stop_requested(self) -> bool:
        return self.stop_after is not None and len(self.records) >= self.stop_after


def loop(
    topology: Topology,
    folder: str,
    parallel: ParallelConfig,
    train: TrainConfig,
    *,
    run: Any = RUN,
    shards: str = "abc",
    stop_after: int | None = None,
) -> TrainLoop:
    step = tiny.make_step(topology, parallel, train)
    return TrainLoop(
        step,
        Source(topology, shards),
        Keep(stop_after),
        config=train,
        topology=topology,
        checkpoints=Path(folder),
        run=run,
        gates=step.engine.module.gate_values,
    )


def settings(steps: int = 4, every: int = 2) -> TrainConfig:
    return replace(tiny.train_config(steps), checkpoint_every=every, keep_checkpoints=2)


def losses(records: list[dict[str, Any]]) -> dict[int, Any]:
    return {r["step"]: (r["loss"], r["grad_norm"], r["lr"]) for r in records if r["kind"] == "step"}


def straight_and_resumed(topology: Topology, folder: str, parallel: ParallelConfig) -> dict[str, Any]:
    straight = loop(topology, f"{folder}/a", parallel, settings(5))
    outcome = straight.run()
    assert (outcome.status, outcome.steps, outcome.resumed_from) == ("finished", 5, None)
    first = loop(topology, f"{folder}/b", parallel, settings(5), stop_after=2)
    stopped = first.run("auto")
    draws = torch.rand(3)
    second = loop(topology, f"{folder}/b", parallel, settings(5))
    torch.manual_seed(99)  # the checkpoint's RNG state must win
    resumed = second.run("latest")
    return {
        "stopped": (stopped.status, stopped.steps),
        "resumed": (resumed.status, resumed.steps, resumed.resumed_from),
        "straight": losses(straight.observer.records),
        "parts": {**losses(first.observer.records), **losses(second.observer.records)},
        "draws": draws.tolist() if topology.rank == 0 else None,
    }


@pytest.mark.parametrize(
    ("world", "tensor", "parallel"),
    [
        (1, 1, ParallelConfig(zero_stage=0)),
        (2, 1, ParallelConfig(zero_stage=1)),
        (2, 1, ParallelConfig(zero_stage=2)),
        (4, 2, ParallelConfig(tensor=2, zero_stage=3)),
        (4, 2, ParallelConfig(tensor=2, zero_stage=3, frozen="partitioned", activation_checkpointing=True)),
    ],
)
def test_a_resumed_run_has_the_same_losses(ranks, tmp_path, world, tensor, parallel):
    for result in ranks.run(straight_and_resumed, str(tmp_path), parallel, world=world, tensor=tensor):
        assert result["stopped"] == ("stopped", 3)
        assert result["resumed"] == ("finished", 5, 3)
        assert result["parts"] == result["straight"]  # to the last bit


def saved(topology: Topology, folder: str, tensor: int = 1) -> None:
    loop(topology, folder, ParallelConfig(tensor=tensor, zero_stage=3), settings()).run()


def refused(topology: Topology, folder: str, stage: int, run: Any, shards: str, wanted: str) -> str:
    parallel = ParallelConfig(tensor=topology.tensor, zero_stage=stage)
    try:
        loop(topology, folder, parallel, settings(), run=run, shards=shards).resume(wanted)
    except CheckpointError as error:
        return str(error)
    return "accepted"


@pytest.fixture(scope="module")
def checkpoint(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    ranks.run(saved, str(folder), world=2)
    return folder


def files_of(folder: Path) -> list[str]:
    return sorted(json.loads((folder / "manifest.json").read_text())["files"])


def test_only_the_newest_are_kept_and_all_are_whole(checkpoint):
    assert [p.name for p in list_checkpoints(checkpoint)] == ["step-00000002", "step-00000004"]
    assert not list(checkpoint.glob(".partial*"))
    names = files_of(checkpoint / "step-00000004")
    assert names == [
        "rng-00000.pt",
        "rng-00001.pt",
        "state/.metadata",
        "state/__0_0.distcp",
        "state/__1_0.distcp",
    ]


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("__1_0.distcp", "missing"),
        ("__1_0.distcp", "flipped"),
        ("__0_0.distcp", "stale"),
        (".metadata", "cut"),
        ("rng-00001", "missing"),
    ],
)
def test_a_missing_or_stale_file_is_named_on_all_ranks(ranks, checkpoint, tmp_path, kind, damage):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    newest = folder / "step-00000004"
    name = [n for n in files_of(newest) if kind in n][-1]
    file = newest / name
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "flipped":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:  # of the checkpoint before
        shutil.copy(folder / "step-00000002" / name, file)
        assert file.read_bytes() != (checkpoint / "step-00000004" / name).read_bytes()
    for told in ranks.run(refused, str(folder), 3, RUN, "abc", "latest", world=2):
        assert name in told
        assert ("is missing" if damage == "missing" else "is not the file that was saved") in told


def test_what_does_not_match_is_refused_and_named(ranks, checkpoint):
    other = {"model": "tiny", "train": {"lr": 0.02}}
    cases = [
        ((str(checkpoint), 3, other, "abc", "latest"), "run.train.lr: checkpoint 0.01, this run 0.02"),
        ((str(checkpoint), 3, RUN, "xyz", "latest"), "docs.shards was 'abc', is 'xyz'"),
        (
            (str(checkpoint), 3, RUN, "abc", "3"),
            "complete checkpoints here: ['step-00000002', 'step-00000004']",
        ),
    ]
    for arguments, expected in cases:
        for told in ranks.run(refused, *arguments, world=2):
            assert expected in told
    for told in ranks.run(refused, str(checkpoint), 2, RUN, "abc", "latest", world=2):
        assert told == "accepted"


def test_a_setting_that_may_change_changes_and_no_other(checkpoint):
    manifest = read_manifest(checkpoint / "step-00000004")
    run = {"weights": {"docs": 1.0}, "train": {"optimizer": {"lr": 0.1}, "seed": 0}, "frozen": {"lm": "abc"}}
    manifest["run"] = {**run, "frozen": {}}
    lower = {**run, "train": {"optimizer": {"lr": 0.05}, "seed": 0}}
    assert check_run(manifest, run) == {}, "a checkpoint from before weights were told"
    with pytest.raises(
        CheckpointError, match=r"--allow-change NAME:\n  run.train.optimizer.lr: checkpoint 0.1, this"
    ):
        check_run(manifest, lower)
    assert check_run(manifest, lower, ["train.optimizer.lr"]) == {"train.optimizer.lr": (0.1, 0.05)}
    with pytest.raises(CheckpointError, match="run.train.seed: checkpoint 0, this run 1"):
        check_run(
            manifest, {**lower, "train": {"optimizer": {"lr": 0.05}, "seed": 1}}, ["train.optimizer.lr"]
        )
    with pytest.raises(
        CheckpointError, match=r"--allow-change train.seed: .* train.optimizer. or weights. alone"
    ):
        check_run(manifest, run, ["train.seed"])
    manifest["run"] = run
    newer = {**run, "train": {"optimizer": {"lr": 0.1, "decay": None}, "seed": 0}}
    assert check_run(manifest, newer) == {}, "a checkpoint from before a setting that is off"
    with pytest.raises(CheckpointError, match="run.frozen.lm: checkpoint 'abc', this run 'random'"):
        check_run(manifest, {**run, "frozen": {"lm": "random"}})


def test_a_torn_checkpoint_is_not_one(checkpoint, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    (folder / "step-00000004" / "manifest.json").unlink()
    (folder / ".partial-step-00000006").mkdir()
    found = find_checkpoint(folder, "auto")
    assert found is not None
    assert found.name == "step-00000002"
    with pytest.raises(CheckpointError, match=r"step-00000004 has no manifest.json; .*\['step-00000002'\]"):
        find_checkpoint(folder, "4")
    assert find_checkpoint(tmp_path / "empty", "auto") is None
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        find_checkpoint(tmp_path / "empty", "latest")


def next_loss(model: Any) -> float:
    whole = tiny.batch("docs", 9)
    with torch.no_grad():
        out = model(
            whole.tokens_BT,
            whole.media_index_BT,
            whole.media,
            whole.media_mask_BM,
            targets_BT=whole.targets(),
        )
    return float(out.nll_BT.sum())


def saved_loss(topology: Topology, folder: str) -> float:
    parallel = ParallelConfig(tensor=topology.tensor, zero_stage=3)
    trained = loop(topology, folder, parallel, settings(2, 0))
    trained.run()
    return next_loss(trained.step.engine.module)


def test_trainable_weights_load_on_another_layout(ranks, tmp_path):
    expected = ranks.run(saved_loss, str(tmp_path), world=4, tensor=2)[0]
    with single_process() as topology:
        model = build_model(
            tiny.network(), ParallelConfig(zero_stage=0), topology, dtype=torch.float32, seed=7
        )
        before = next_loss(model)
        load_trainable(model, tmp_path / "step-00000002")
        assert next_loss(model) == pytest.approx(expected, rel=1e-5)
        assert abs(before - expected) > 1e-2
        other = build_model(
            tiny.network(every=1), ParallelConfig(zero_stage=0), topology, dtype=torch.float32, seed=7
        )
        with pytest.raises(ValueError, match=r"missing \['weight/gated.1"):
            load_trainable(other, tmp_path / "step-00000002")


def resumed_with_a_stale_listing(topology: Topology, folder: str) -> int | None:
    """The second rank's client of a shared file system has not seen the newest checkpoint yet."""
    resuming = loop(topology, folder, ParallelConfig(zero_stage=3), settings())

    def stale(path: Path, wanted: str) -> Path | None:
        return find_checkpoint(path, wanted) if topology.rank == 0 else None

    with patch.object(loop_module, "find_checkpoint", stale):
        return resuming.resume("auto")


def test_the_first_rank_chooses_the_checkpoint_for_all(ranks, checkpoint):
    assert ranks.run(resumed_with_a_stale_listing, str(checkpoint), world=2) == [4, 4]


def test_a_checkpoint_that_another_rank_has_found_is_awaited(tmp_path):
    with pytest.raises(CheckpointError, match="not seen here 0 s after the first rank found it"):
        await_checkpoint(tmp_path / "step-00000002", seconds=0)


def rolled_back(topology: Topology, folder: str) -> tuple[int | None, list[str]]:
    parallel = ParallelConfig(zero_stage=3)
    again = loop(topology, folder, parallel, settings(3, 1))
    outcome = again.run("2")
    assert outcome.resumed_from == 2
    return loop(topology, folder, parallel, settings(3, 1)).resume("auto"), [
        p.name for p in list_checkpoints(Path(folder))
    ]


def test_a_run_that_goes_back_abandons_what_came_after(ranks, checkpoint, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    for step, names in ranks.run(rolled_back, str(folder), world=2):
        assert (step, names) == (3, ["step-00000002", "step-00000003"])
    assert read_manifest(folder / "abandoned-step-00000004")["step"] == 4, "it can be put back by hand"


def test_a_description_that_names_a_function_is_not_run(checkpoint, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint / "step-00000004", folder)
    sign = tmp_path / "run"
    (folder / "state" / ".metadata").write_bytes(pickle.dumps(Touch(str(sign))))
    with pytest.raises(
        CheckpointError, match=r"it names pathlib.*, which describes no tensor|it names posix"
    ):
        stored_shapes(folder)
    assert not sign.exists()


class Touch:
    """Pickled, a call that makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)
