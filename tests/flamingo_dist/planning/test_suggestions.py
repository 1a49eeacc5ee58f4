"""Numbers of GPUs that a run does not divide among, and what is suggested instead; each suggestion is true."""

import json
import re
from dataclasses import replace

import pytest

from flamingo_dist.cli import main
from flamingo_dist.planning.plan import make_plan, scale_batches, tensor_degrees
from flamingo_dist.planning.suggestions import suggestions
from jobs.plan import workload
from jobs.recipes import RECIPES
from tests.flamingo_dist.planning.shapes import machine


def work_of(name):
    return workload(RECIPES[name].config())


def gpus_in(advice):
    return [int(a.split()[0]) for a in advice if a.endswith(" GPUs")]


def factors_in(advice):
    return [float(re.search(r"--batch-scale (\S+)\)", a)[1]) for a in advice if "batch-scale" in a]


@pytest.mark.parametrize(
    ("gpus", "near", "factors"),
    [
        (3, [4], [54 / 64]),  # two GPUs are too small, and so are three for more rows
        (12, [8, 16], [63 / 64, 66 / 64]),
        (144, [128, 256], [54 / 64, 72 / 64]),
        (1000, [512], [125 / 64]),
    ],
)
def test_the_nearest_numbers_of_gpus_and_batches(gpus, near, factors):
    work = work_of("flamingo_3b")  # 64 rows of videos, multiples of it in the other batches
    plan = make_plan(work, machine(gpus))
    assert not plan.layouts + plan.too_large
    assert any("rows of a batch must divide" in reason for reason in plan.refused)
    advice = suggestions(work, machine(gpus))
    assert gpus_in(advice) == near
    assert factors_in(advice) == pytest.approx(factors)
    for other in near:
        assert make_plan(work, machine(other)).layouts
    for factor in factors_in(advice):
        assert make_plan(scale_batches(work, factor), machine(gpus)).layouts


def test_factors_that_are_no_decimal_fractions():
    """Four thirds are given in a few digits, and batches come out whole."""
    work = scale_batches(work_of("flamingo_80b"), 3.0)  # 768 rows of videos
    scaled = scale_batches(work, 1.33333)
    assert [d.rows for d in scaled.datasets] == [d.rows * 4 // 3 for d in work.datasets]
    assert scale_batches(work, 1.3333) is None
    assert scale_batches(work, 1e-4) is None


def test_tensor_parallel_groups_lie_in_one_node():
    assert tensor_degrees(machine(64)) == [1, 2, 4, 8]
    assert tensor_degrees(replace(machine(64), gpus_per_node=16)) == [1, 2, 4, 8, 16]
    assert tensor_degrees(replace(machine(24), gpus_per_node=6)) == [1, 2, 3, 6]
    assert tensor_degrees(machine(4)) == [1, 2, 4], "a part of a node"
    work = work_of("flamingo_80b")
    plan = make_plan(work, replace(machine(256), gpus_per_node=16))
    assert {x.tp for x in plan.layouts + plan.too_large} == {1, 2, 4, 8, 16}
    plan = make_plan(work, replace(machine(24), gpus_per_node=3))
    assert {x.tp for x in plan.layouts + plan.too_large} <= {1, 3}


def test_the_command_says_that_it_is_not_the_memory(capsys):
    assert main(["plan", "flamingo_3b", "--gpus", "12"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "does not divide among 12 GPUs, whatever their memory" in said
    assert "fit in" not in said
    assert "tp 4: rows of a batch must divide among 3 ranks" in said
    assert "What would run: 8 GPUs; or 16 GPUs; or batches 0.984375 times as large" in said
    assert main(["plan", "flamingo_3b", "--gpus", "12", "--markdown"]) == 1
    assert "What would run: 8 GPUs" in capsys.readouterr().out
    assert main(["plan", "flamingo_3b", "--gpus", "12", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["would_fit"][:2] == ["8 GPUs", "16 GPUs"]


@pytest.mark.parametrize("option", ["--tokens", "--memory-gib", "--batch-scale"])
@pytest.mark.parametrize("value", ["0", "-2", "nan"])
def test_amounts_are_positive(capsys, option, value):
    assert main(["plan", "flamingo_3b", f"{option}={value}"]) == 1
    said = capsys.readouterr().err
    assert f"{option} {value} means nothing" in said
    assert "above 0" in said


def test_figures_are_whole_at_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["plan", "flamingo_9b", "--gpus", "256", "--tokens", "1e13"]) == 0
    said = capsys.readouterr().out
    assert "…" not in said
    assert "partitioned" in said


def test_the_runs_own_settings_reach_the_plan(capsys):
    arguments = ["plan", "flamingo_3b", "--gpus", "8", "--json"]
    figures = []
    for more in (
        ["--weight-storage", "int8"],
        ["--model.lm.weight-storage", "int8"],
        ["--model.lm.num-layers", "12"],
    ):
        assert main([*arguments, *more]) == 0
        figures.append(json.loads(capsys.readouterr().out)["layouts"])
    assert figures[0] == figures[1]
    assert figures[2][0]["memory"]["frozen"] < figures[1][0]["memory"]["frozen"] * 2
    # 66 rows do not divide among the recipe's own 8 processes, which have no say.
    batches = [f"--data.train.{name}.batch-size=66" for name in ("m3w", "align", "ltip", "vtp")]
    assert main(["plan", "flamingo_3b", "--gpus", "6", "--json", *batches]) == 0
    assert json.loads(capsys.readouterr().out)["layouts"][0]["dp"] in (3, 6)


def test_options_before_the_recipe_are_wrong_usage(capsys):
    for command in ("plan", "dryrun", "doctor"):
        assert main([command, "--json", "flamingo_3b"]) == 2
        assert "'--json' stands where the recipe has to be" in capsys.readouterr().err
        assert main([command, "--help"]) == 0
        assert main([command]) == 2
