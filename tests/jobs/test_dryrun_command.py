"""`flamingo dryrun`: what it prints, and what it refuses."""

import json

import pytest

from flamingo_dist.cli import main
from flamingo_dist.parallel.topology import single_process
from flamingo_dist.planning import agreement
from jobs.recipes import RECIPES

PUBLIC = [name for name in RECIPES if name.startswith(("llama", "qwen", "mpt", "opt", "gpt2"))]
pytestmark = pytest.mark.distributed  # seconds of a whole core, and torch.distributed's state


def test_json_has_memory_collectives_and_the_planner(capsys):
    assert main(["dryrun", "smoke", "--world", "8", "--tp", "2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["tp"], said["dp"], said["residency"]) == (2, 4, "partitioned")
    assert said["peak_bytes"] == sum(said["peak"].values()) > said["peak"]["frozen"] > 0
    assert said["disagreements"] == []
    assert set(said["planner"]["totals"]) == {"memory", "tensor", "data"}
    assert all(abs(pair["off"]) <= 0.1 for pair in said["planner"]["totals"].values())
    assert all(abs(pair["off"]) <= 0.1 for pair in said["planner"]["traffic"].values())
    groups = {(c["group"], c["ranks"]) for c in said["collectives"]}
    assert groups == {("tensor", 2), ("data", 4), ("world", 8)}
    for collective in said["collectives"]:
        rounds = 2 if collective["operation"] == "all_reduce" else 1
        share = rounds * (collective["ranks"] - 1) / collective["ranks"]
        assert collective["wire_bytes"] == pytest.approx(share * collective["payload_bytes"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "world", "tp", "frozen"),
    [
        ("flamingo_3b", 8, 1, "resident"),
        ("flamingo_9b", 32, 2, "resident"),
        ("flamingo_80b", 256, 8, "resident"),
        ("flamingo_80b", 256, 4, "resident"),
    ],
)
def test_the_large_recipes_agree_with_the_planner_at_full_size(capsys, recipe, world, tp, frozen):
    arguments = [
        "dryrun",
        recipe,
        "--world",
        str(world),
        "--tp",
        str(tp),
        "--parallel.frozen",
        frozen,
        "--json",
    ]
    assert main(arguments) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["disagreements"] == []
    assert said["residency"] == frozen
    kinds = said["planner"]["memory"]
    known = {"vision", "frozen", "trainable", "gradients", "optimizer", "activations"}
    for kind in known | ({"reduce_buckets"} & set(kinds)):  # ZeRO 1, of the 80B, has none
        assert abs(kinds[kind]["off"]) <= 0.1, kind
    assert all(abs(pair["off"]) <= 0.1 for pair in said["planner"]["traffic"].values())


@pytest.mark.slow
@pytest.mark.parametrize("recipe", PUBLIC)
def test_recipes_of_public_language_models_agree_with_the_planner(capsys, recipe):
    assert main(["dryrun", recipe, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["disagreements"] == []


def test_overrides_and_a_planner_that_is_off(capsys, monkeypatch):
    monkeypatch.setattr(agreement, "TOLERANCE", 0.0)
    arguments = ["dryrun", "smoke", "--world", "4", "--tp", "1", "--parallel.frozen", "resident"]
    assert main(arguments) == 1
    said = capsys.readouterr().out
    assert "ZeRO 3, resident" in said
    assert "frozen_gather" not in said
    assert "The planner is off by more than a tenth: memory" in said


def test_what_cannot_run_is_said(capsys):
    assert main(["dryrun", "smoke", "--world", "4", "--rank", "4"]) == 1
    assert "--rank 4 is not in a world of 4" in capsys.readouterr().err
    assert main(["dryrun", "nonsense"]) == 1
    assert main(["dryrun", "smoke", "--tp", "8", "--world", "8"]) == 1
    assert "parallel.tensor=8" in capsys.readouterr().err
    with single_process(), pytest.raises(RuntimeError, match="a dry run needs its own"):
        main(["dryrun", "smoke"])
