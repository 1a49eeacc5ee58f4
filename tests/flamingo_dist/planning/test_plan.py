"""Plans: golden ones of the large recipes, what must hold of any, and the command."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from flamingo_dist.cli import main
from flamingo_dist.parallel.topology import ParallelConfig
from flamingo_dist.planning.hardware import GPUS
from flamingo_dist.planning.plan import make_plan, scale_batches
from flamingo_dist.planning.seconds import link_bytes
from flamingo_dist.planning.suggestions import suggestions
from flamingo_dist.planning.traffic import Traffic, step_traffic
from flamingo_dist.planning.workload import Workload
from jobs.plan import workload
from jobs.recipes import RECIPES
from tests.flamingo_dist.planning.shapes import GPU_COUNTS, LARGE, machine

GOLDEN = Path(__file__).parent / "golden"


def work_of(name):
    return workload(RECIPES[name].config())


def at_once(recompute="selective"):
    """The 80B with all rows at once: ZeRO 3, which may partition frozen weights, and recomputation."""
    work = work_of("flamingo_80b")
    parallel = replace(work.parallel, zero_stage=3, micro_rows=0, activation_checkpointing=recompute)
    return replace(work, parallel=parallel)


def rounded(value):
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


def golden_plan(name, gpus):
    work = work_of(name)
    plan = make_plan(work, machine(gpus), budget_tokens=1e12)
    advice = [] if plan.layouts else suggestions(work, machine(gpus))
    return rounded(plan.to_json() | {"would_fit": advice})


@pytest.mark.parametrize("gpus", GPU_COUNTS)
@pytest.mark.parametrize("name", LARGE)
def test_plan_equals_its_golden_one(name, gpus):
    """A changed plan shows in review: `python -m tests.flamingo_dist.planning.write_golden` writes new ones."""
    assert golden_plan(name, gpus) == json.loads((GOLDEN / f"{name}-{gpus}-h100.json").read_text())


def test_layouts_add_up_and_are_ranked():
    plan = make_plan(at_once(), machine(256), budget_tokens=1e12)
    assert plan.layouts
    assert [x.step_seconds for x in plan.layouts] == sorted(x.step_seconds for x in plan.layouts)
    for x in plan.layouts + plan.too_large:
        assert sum(x.memory.values()) == pytest.approx(x.memory_gib)
        assert sum(x.seconds.values()) == pytest.approx(x.step_seconds)
        assert 0 < x.useful_mfu < x.hfu < 0.8
        assert x.tp * x.dp == 256
        assert x.fits == (x.memory_gib <= 79.1)
        assert x.gpu_hours == pytest.approx(x.days * 24 * 256)
        assert x.days == pytest.approx(1e12 / x.tokens_per_second / 86_400)
        assert x.memory["transient"] in x.transient.values()


def test_resident_weights_move_no_byte():
    work = at_once()
    assert "frozen_gather" not in step_traffic(work, tp=8, dp=32, residency="resident")
    kinds = step_traffic(work, tp=8, dp=32, residency="partitioned")
    # Four data sets; blocks in bf16 for the forward and the backward. Those within the last 1e9 elements of the forward
    # are still there for the backward, and so is the second forward of each.
    blocks = 2 * (13 * 8192**2 // 8 * 80)
    assert kinds["frozen_gather"].wire_bytes == pytest.approx(4 * 31 / 32 * 2 * blocks, rel=0.08)
    assert kinds["frozen_gather"].wire_bytes < 4 * 31 / 32 * 2 * blocks


def test_links_of_a_ring():
    sent = Traffic(group="data", wire_bytes=80.0, calls=1)
    assert link_bytes(sent, machine(8), tp=2) == {"nvlink": 80.0, "network": 0.0}
    assert link_bytes(sent, machine(64), tp=2) == {"nvlink": 60.0, "network": 20.0}
    assert link_bytes(sent, machine(64), tp=8) == {"nvlink": 0.0, "network": 80.0}
    assert link_bytes(replace(sent, group="tensor"), machine(64), tp=8)["network"] == 0.0


def test_checkpointing_trades_memory_for_time():
    without = work_of("flamingo_9b")
    assert not without.parallel.activation_checkpointing
    work = replace(without, parallel=replace(without.parallel, activation_checkpointing=True))

    def of(work):
        plan = make_plan(work, machine(64))
        return {(x.tp, x.residency): x for x in plan.layouts + plan.too_large}

    for key, kept in of(without).items():
        again = of(work)[key]
        assert again.memory["activations"] < kept.memory["activations"] / 1.5
        assert again.step_seconds > kept.step_seconds
        assert kept.hfu >= kept.useful_mfu


@pytest.mark.parametrize("name", LARGE)
def test_selective_checkpointing_lies_between_the_two(name):
    work = work_of(name)
    plans = {}
    for value in (False, "selective", True):
        parallel = replace(work.parallel, activation_checkpointing=value)
        plan = make_plan(replace(work, parallel=parallel), machine(64))
        plans[value] = {(x.tp, x.residency): x for x in plan.layouts + plan.too_large}
    for key, selective in plans["selective"].items():
        kept, again = plans[False][key], plans[True][key]
        assert again.memory["activations"] < selective.memory["activations"] < kept.memory["activations"]
        # Layouts whose traffic hides all computation take equally long.
        assert again.step_seconds >= selective.step_seconds >= kept.step_seconds
        assert again.seconds["gated"] > selective.seconds["gated"] == kept.seconds["gated"]
        assert again.seconds["lm"] == selective.seconds["lm"] > kept.seconds["lm"]
        assert again.hfu - again.useful_mfu > selective.hfu - selective.useful_mfu


def test_parts_of_rows_cost_gathers_and_save_activations():
    whole, key = at_once(False), (4, "resident")
    found = []
    for rows in (0, 8):
        work = replace(whole, parallel=replace(whole.parallel, micro_rows=rows))
        plan = make_plan(work, machine(64))
        found.append(next(x for x in plan.layouts + plan.too_large if (x.tp, x.residency) == key))
    all_rows, parts = found
    assert parts.memory["activations"] < all_rows.memory["activations"] / 7
    # 64, 128, 128 and 16 rows a rank, in parts of 8.
    for kind in ("gradient_reduce", "trainable_gather"):
        sent = (sum(x.traffic[kind].values()) for x in (parts, all_rows))
        assert next(sent) == pytest.approx((8 + 16 + 16 + 2) / 4 * next(sent))
    assert parts.traffic["tensor_all_reduce"] == all_rows.traffic["tensor_all_reduce"]


def test_what_is_sent_when_the_backward_is_over_hides_behind_nothing():
    work = work_of("flamingo_80b")
    assert work.parallel.zero_stage == 1
    layout = make_plan(work, machine(256)).layouts[0]
    assert layout.seconds["data_traffic_exposed"] > 0.3
    below = replace(machine(256), assumptions=replace(machine(256).assumptions, overlap=0.0))
    assert make_plan(work, below).layouts[0].step_seconds == layout.step_seconds


def test_what_would_fit_is_true():
    work = at_once(True)
    assert not make_plan(work, machine(8)).layouts
    advice = suggestions(work, machine(8))
    rows = int(next(a for a in advice if "micro_rows" in a).split("=")[1])
    for more, fits in ((1, True), (2, False)):
        parallel = replace(work.parallel, micro_rows=more * rows)
        assert bool(make_plan(replace(work, parallel=parallel), machine(8)).layouts) == fits
    assert any(a.endswith(" GPUs") for a in advice)
    gpus = int(next(a for a in advice if a.endswith(" GPUs")).split()[0])
    assert make_plan(work, machine(gpus)).layouts
    assert not make_plan(work, machine(gpus // 2)).layouts
    scale = float(next(a for a in advice if "batch-scale" in a).split()[-1].rstrip(")"))
    assert make_plan(scale_batches(work, scale), machine(8)).layouts
    assert not make_plan(scale_batches(work, 2 * scale), machine(8)).layouts


def test_suggestions_name_checkpointing_and_zero_3():
    plain = work_of("flamingo_9b")
    plain = replace(plain, parallel=ParallelConfig(zero_stage=3, activation_checkpointing=False))
    small = replace(machine(8), gpu=replace(machine(8).gpu, memory_gib=60.0))
    assert not make_plan(plain, small).layouts
    assert "parallel.activation_checkpointing=selective" in suggestions(plain, small)
    stage = replace(work_of("flamingo_9b"), parallel=ParallelConfig(zero_stage=0))
    small = replace(machine(64), gpu=replace(machine(64).gpu, memory_gib=24.0))
    assert not make_plan(stage, small).layouts
    assert any(found.startswith("parallel.zero_stage=3") for found in suggestions(stage, small))


def test_quantised_weights_take_half_and_cost_time():
    work = work_of("flamingo_80b")
    lm = replace(work.model.lm, weight_storage="int8")
    stored = make_plan(replace(work, model=replace(work.model, lm=lm)), machine(256))
    plain = {x.tp: x for x in make_plan(work, machine(256)).layouts if x.residency == "resident"}
    assert {x.residency for x in stored.layouts + stored.too_large} == {"resident"}
    found = [x for x in stored.layouts if x.tp in plain]
    assert found
    for x in found:
        assert 0.5 < x.memory["frozen"] / plain[x.tp].memory["frozen"] < 0.51
        assert x.memory_gib < plain[x.tp].memory_gib
        assert x.step_seconds == pytest.approx(plain[x.tp].step_seconds + x.seconds["dequantise"], rel=0.02)
        assert x.traffic == plain[x.tp].traffic
        # The same work in more time.
        useful = (y.useful_mfu * y.step_seconds for y in (x, plain[x.tp]))
        assert next(useful) == pytest.approx(next(useful))


def fp8_of(work: Workload) -> Workload:
    lm = replace(work.model.lm, weight_storage="fp8", matrix_products="fp8")
    return replace(work, model=replace(work.model, lm=lm))


def test_fp8_products_take_the_memory_of_bf16_and_less_time():
    work = work_of("flamingo_80b")
    plain = {x.tp: x for x in make_plan(work, machine(256)).layouts if x.residency == "resident"}
    found = [x for x in make_plan(fp8_of(work), machine(256)).layouts if x.tp in plain]
    assert found
    for x in found:
        other = plain[x.tp]
        assert x.residency == "resident"
        assert x.memory["frozen"] == pytest.approx(other.memory["frozen"], rel=2e-3)
        assert x.seconds["lm"] < 0.75 * other.seconds["lm"]  # scores and attention stay in bf16
        assert 0 < x.seconds["quantise"] < 0.3 * (other.seconds["lm"] - x.seconds["lm"])
        assert "dequantise" not in x.seconds
        unchanged = set(other.seconds) - {"lm", "data_traffic_exposed"}
        assert {n: x.seconds[n] for n in unchanged} == {n: other.seconds[n] for n in unchanged}
        assert x.useful_mfu * x.step_seconds == pytest.approx(other.useful_mfu * other.step_seconds)


def test_fp8_products_are_refused_where_no_gpu_has_them():
    work = fp8_of(work_of("flamingo_80b"))
    old = replace(machine(256), gpu=GPUS["a100-80"])
    plan = make_plan(work, old)
    assert not plan.layouts
    assert not plan.too_large
    assert all("needs a GPU with fp8 matrix units" in x or "does not divide" in x for x in plan.refused)
    narrow = replace(work.model.lm, ffn_width=32_704)  # 8 * 4088, which is 8 * 511
    plan = make_plan(replace(work, model=replace(work.model, lm=narrow)), machine(256))
    assert [x for x in plan.refused if x.startswith("tp 8: a frozen matrix is [4088, 8192] on this rank")]


def test_suggestions_name_the_storage_that_fits():
    work, small = work_of("llama_70b"), machine(64)
    work = replace(work, parallel=replace(work.parallel, zero_stage=2))
    kinds = make_plan(work, small)
    sizes = sorted(x.memory_gib for x in kinds.layouts + kinds.too_large)
    small = replace(small, gpu=replace(small.gpu, memory_gib=sizes[0] - 2))
    assert not make_plan(work, small).layouts
    advice = [a for a in suggestions(work, small) if "weight_storage='int8'" in a]
    assert len(advice) == 1


def test_degrees_that_cannot_run_are_explained():
    plan = make_plan(work_of("smoke"), machine(4))
    assert [x for x in plan.refused if x.startswith("tp 4") and "num_kv_heads" in x]
    plan = make_plan(work_of("flamingo_3b"), machine(1024))
    assert not plan.layouts
    assert "vtp has 64" in plan.refused[0]


def test_the_command_prints_json_and_draws(capsys, tmp_path):
    picture = tmp_path / "plan.svg"
    code = main(["plan", "flamingo-80b", "--gpus", "256", "--json", "--picture", str(picture)])
    assert code == 0
    printed = json.loads(capsys.readouterr().out)
    wanted = {"tp", "dp", "residency", "memory_gib", "step_seconds", "tokens_per_second", "useful_mfu", "hfu"}
    assert wanted <= set(printed["layouts"][0])
    assert picture.read_text().count("<svg") == 1


def test_the_command_says_that_nothing_fits(capsys):
    assert (
        main(
            [
                "plan",
                "flamingo_80b",
                "--gpus",
                "8",
                "--parallel.zero-stage",
                "3",
                "--parallel.micro-rows",
                "0",
            ]
        )
        == 1
    )
    said = " ".join(capsys.readouterr().out.split())
    assert "no layout fits in 79.1 GiB" in said
    assert "What would fit:" in said
    assert main(["plan", "flamingo_80b", "--gpus", "8", "--batch-scale", "0.001"]) == 1
    assert "not whole numbers" in capsys.readouterr().err


def test_the_page_holds_what_its_commands_print(capsys):
    page = (Path(__file__).parents[3] / "docs" / "scale.md").read_text()
    commands = re.findall(r"^    flamingo (plan .*--markdown)$", page, re.MULTILINE)
    assert len(commands) == 10
    for command in commands:
        main(command.split())
        assert capsys.readouterr().out in page, f"run `flamingo {command}` and paste what it prints"


def test_the_page_on_speed_holds_what_is_predicted():
    """The table of activation checkpointing, and the sentence on split encoders."""
    page = (Path(__file__).parents[3] / "docs" / "speed.md").read_text()
    row = re.compile(r"^\| (?:(\d+)B, (\d+) GPUs, TP (\d+) )?\| (all|selective|none) \|(.*)\|$", re.MULTILINE)
    rows = row.findall(page)
    assert [kind for *_, kind, _ in rows] == 2 * ["all", "selective", "none"]
    values = {"all": True, "selective": "selective", "none": False}
    run = ("", "", "")
    for *named, kind, figures in rows:
        run = named if named[0] else run
        x = resident(*run, activation_checkpointing=values[kind])
        expected = f" {x.memory_gib:.1f} | {x.step_seconds:.2f} | {x.useful_mfu:.1%} "
        assert figures == expected, f"{run} {kind}: write |{expected}|"
    split = re.compile(r"(\d+)B on (\d+)(?: GPUs)? at TP (\d) from\s([\d.]+) to\s([\d.]+) s")
    found = split.findall(page)
    assert len(found) == 2
    for *run, whole, shared in found:
        seconds = [resident(*run, split_vision=s).step_seconds for s in (False, True)]
        assert [whole, shared] == [f"{s:.2f}" for s in seconds], run


def resident(billions, gpus, tp, **parallel):
    """The layout with resident frozen weights of a large recipe, as it is but for `parallel`."""
    work = work_of(f"flamingo_{billions}b")
    plan = make_plan(replace(work, parallel=replace(work.parallel, **parallel)), machine(int(gpus)))
    every = plan.layouts + plan.too_large
    return next(x for x in every if (x.tp, x.residency) == (int(tp), "resident"))


def test_overrides_reach_the_plan(capsys):
    arguments = ["plan", "flamingo_80b", "--gpus", "256", "--json", "--memory-gib"]
    main([*arguments, "60"])
    below = json.loads(capsys.readouterr().out)["layouts"]
    assert below
    assert all(x["memory_gib"] <= 60 for x in below)
    main([*arguments, "300", "--assume.matmul", "0.3"])
    slower = json.loads(capsys.readouterr().out)["layouts"]
    by_key = {(x["tp"], x["residency"]): x for x in slower}
    resident = [x for x in below if x["residency"] == "resident"]
    assert resident
    # Where traffic decides, more computation only hides more of it.
    assert all(by_key[x["tp"], "resident"]["step_seconds"] > x["step_seconds"] for x in resident)
