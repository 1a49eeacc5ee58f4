import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from flamingo_dist.cli import main as flamingo
from jobs.bench import command, plot
from jobs.bench.checking import red_ops
from jobs.bench.page import duels, write_page
from jobs.bench.rows import Results, Row, read, write
from jobs.bench.shapes import OPS

PAGE = Path(__file__).parents[3] / "docs" / "benchmarks.md"
ABOUT = {
    "gpu": "NVIDIA Test", "device": "cuda", "torch": "2.13.0", "triton": "3.7.1", "cuda": "13.0", "python": "3.12",
    "commit": "abc", "copy_gb_per_s": 3000.0, "not_reached": 7,
}  # fmt: skip


def row(contender: str, ms: float, *, shape: str = "9B train", mode: str = "fwd+bwd", **changes) -> Row:
    timed = Row(
        level="core", op="gated_xattn", shape=shape, sizes="batch=1", contender=contender, ours=contender == "triton",
        mode=mode, dtype="bfloat16", status="timed", median_ms=ms, q20_ms=0.99 * ms, q80_ms=1.01 * ms, repeats=20,
        clock="events", gb_per_s=2500.0, copy_share=0.83, worst_error=3e-3,
    )  # fmt: skip
    return replace(timed, **changes)


ROWS = [
    row("triton", 1.0),
    row("B3 SDPA mask", 1.6),
    row("B5 varlen FA2", 1.4),
    row("B0 eager", 0.1, status="refused", reason="wrong: dq 3.0e-01 (allowed 2e-02)", median_ms=None),
    row("triton", 0.4, mode="fwd", copy_share=0.7),
    row("B3 SDPA mask", 0.3, mode="fwd"),
    row("triton", 2.0, shape="B1 L256 N1 even K128"),
    row("B6 padded SDPA", 1.0, shape="B1 L256 N1 even K128"),
]


def test_rows_survive_writing_and_every_line_says_where_it_ran(tmp_path):
    results = Results(environment=ABOUT, rows=[*ROWS, row("x", 1.0, worst_error=float("inf"))])
    table = write(results, tmp_path, "kernels")
    with table.open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(results.rows)
    assert {(line["gpu"], line["torch"], line["triton"], line["commit"]) for line in lines} == {
        ("NVIDIA Test", "2.13.0", "3.7.1", "abc")
    }
    assert lines[3]["median_ms"] == ""
    assert read([tmp_path / "kernels.json"]).rows[: len(ROWS)] == ROWS
    assert "Infinity" not in (tmp_path / "kernels.json").read_text()


def test_results_of_two_gpus_do_not_mix(tmp_path):
    write(Results(environment=ABOUT, rows=ROWS), tmp_path, "a")
    write(Results(environment={**ABOUT, "gpu": "Other"}, rows=ROWS), tmp_path, "b")
    with pytest.raises(ValueError, match="do not belong on one page"):
        read([tmp_path / "a.json", tmp_path / "b.json"])


def test_the_best_baseline_is_the_quickest_that_is_right():
    found = {(duel.shape, duel.mode): duel for duel in duels(ROWS)}
    both = found["9B train", "fwd+bwd"]
    assert (both.best.contender, both.ratio) == ("B5 varlen FA2", pytest.approx(1.4))
    assert found["9B train", "fwd"].ratio == pytest.approx(0.75)
    assert not both.tie
    assert duels([row("triton", 1.0), row("B3 SDPA mask", 1.005)])[0].tie


def test_the_page_says_where_we_lose_and_who_was_refused():
    text = write_page(Results(environment=ABOUT, rows=ROWS))
    lost = text.split("## Where we lose")[1].split("##")[0]
    assert "faster in 2 of 3" in lost
    assert lost.index("B1 L256 N1") < lost.index("9B train")
    assert "wrong: dq 3.0e-01" in text
    assert "7 shapes of the sweep were not reached" in text
    goals = text.split("## Goals")[1].split("##")[0]
    assert "| fwd: 80% of a copy | 9B train | 70% | no |" in goals
    assert "| fwd+bwd: 1.5 times the best baseline† | 9B train | 1.40 | no |" in goals
    assert "NVIDIA Test" in text
    assert "None yet" not in text


def test_what_no_compiled_baseline_was_timed_against_is_marked_and_not_decided():
    layer = [row("triton", 1.0, level="layer"), row("reference", 1.5, level="layer")]
    for extra, mark, met in (([], "†", "not decided: 1 without"), (["compiled reference"], "", "yes |")):
        rows = [*layer, *(row(name, 1.4, level="layer") for name in extra)]
        text = write_page(Results(environment=ABOUT, rows=rows))
        assert [duel.mark for duel in duels(rows)] == [mark]
        assert ("no baseline of torch.compile was timed" in text) == bool(mark)
        assert met in text.split("| layer never slower |")[1].split("\n")[0]


def test_the_committed_page_is_up_to_date():
    results = sorted((PAGE.parents[1] / "benchmarks" / "results").glob("*.json"))
    assert PAGE.read_text() == write_page(read(results) if results else None), (
        "run `flamingo bench page [benchmarks/results/*.json]`"
    )


def test_a_page_without_results_holds_no_measured_figure():
    text = write_page(None)
    assert "holds no measured figure" in text
    assert "34 / 172" in text
    assert "## Where we lose" not in text


def test_a_picture_is_drawn(tmp_path):
    assert plot.write_plot(Results(environment=ABOUT, rows=ROWS), tmp_path / "k.png")
    assert (tmp_path / "k.png").stat().st_size > 5000
    assert not plot.write_plot(Results(environment=ABOUT, rows=[]), tmp_path / "none.png")


def junit(path: Path, outcomes: dict[str, str]) -> Path:
    cases = "".join(
        f'<testcase classname="tests.kernels.test_triton_{op}" name="t">'
        f"{'' if outcome == 'passed' else f'<{outcome}/>'}</testcase>"
        for op, outcome in outcomes.items()
    )
    path.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    return path


def test_tests_that_failed_were_skipped_or_never_ran_are_red(tmp_path):
    some = {"gated_xattn": "passed", "perceiver_attn": "failure", "add_layernorm": "skipped"}
    red = red_ops(junit(tmp_path / "t.xml", some))
    assert set(red) == set(OPS) - {"gated_xattn"}
    assert "1 of its tests failed" in red["perceiver_attn"]
    assert red_ops(junit(tmp_path / "all.xml", dict.fromkeys(OPS, "passed"))) == {}
    with pytest.raises(ValueError, match="no such file"):
        red_ops(tmp_path / "missing.xml")


@pytest.mark.parametrize(
    ("where", "name", "red"),
    [
        ("test_triton_operators", "test_rules[gated_xattn-True]", {"gated_xattn"}),
        ("test_triton_model", "test_whole_network", set(OPS)),
        ("test_triton_conv_epilogue_nfnet", "test_nfnet[float32]", set()),  # not timed here, and not to blame
    ],
)
def test_a_red_test_of_all_kernels_counts_for_those_it_names_or_for_all(where, name, red, tmp_path):
    path = junit(tmp_path / "t.xml", dict.fromkeys(OPS, "passed"))
    case = f'<testcase classname="tests.kernels.{where}" name="{name}"><failure/></testcase></testsuite>'
    path.write_text(path.read_text().replace("</testsuite>", case))
    assert set(red_ops(path)) == red


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)


def test_without_a_gpu_the_roofline_is_printed(no_gpu, capsys):
    assert flamingo(["bench", "kernels"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("No CUDA device here")
    assert "34 / 172" in said
    assert flamingo(["bench", "step"]) == 0


def test_the_cpu_is_for_tiny_shapes_alone(no_gpu, capsys):
    assert command.main(["kernels", "--device", "cpu"]) == 2
    assert "--tiny" in capsys.readouterr().err
    assert command.main(["kernels", "--device", "cuda"]) == 2


def test_tiny_run_goes_the_whole_way(no_gpu, tmp_path, capsys):
    given = ["kernels", "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    assert command.main([*given, "--ops", "gated_xattn", "gated_relu2"]) == 0
    data = json.loads((tmp_path / "kernels.json").read_text())
    status = {(r["level"], r["op"], r["contender"], r["mode"]): r for r in data["rows"]}
    for name in ("B0 eager", "B1 eager additive", "B2 compiled B0", "B3 SDPA mask", "B6 padded SDPA"):
        assert status["core", "gated_xattn", name, "fwd+bwd"]["status"] == "timed", name
    assert status["core", "gated_xattn", "B4 Flex 64", "fwd"]["status"] == "timed"
    assert "no backward on a CPU" in status["core", "gated_xattn", "B4 Flex 64", "bwd"]["reason"]
    assert "needs CUDA" in status["core", "gated_xattn", "B5 varlen FA2", "fwd"]["reason"]
    assert status["layer", "gated_xattn", "reference", "fwd+bwd"]["status"] == "timed"
    steps = {(r["shape"], r["contender"]): r for r in data["rows"] if r["level"] == "step"}
    assert len(steps) == 5
    for name in (
        ("smoke", "reference"),
        ("smoke-idefics", "reference"),
        ("smoke-idefics", "IDEFICS (transformers)"),
    ):
        assert steps[name]["status"] == "timed", steps[name]["reason"]
        assert steps[name]["tokens_per_s"] > 0
        assert steps[name]["useful_mfu"] > 0
        assert steps[name]["worst_error"] < 1e-5, "the same network, the same weights"
    assert "need CUDA" in steps["smoke", "triton"]["reason"]
    text = (tmp_path / "kernels.md").read_text()
    assert "WITHOUT a GPU" in text
    assert "## Whole step" in text
    assert "needs CUDA" in text
    assert (tmp_path / "kernels.csv").exists()
    assert command.main(["page", str(tmp_path / "kernels.json"), "--page", str(tmp_path / "p.md")]) == 2
    assert "no figures to publish" in capsys.readouterr().err


def test_no_budget_reaches_nothing_and_says_so(no_gpu, tmp_path):
    given = ["kernels", "--device", "cpu", "--tiny", "--budget-seconds", "0", "--out", str(tmp_path)]
    assert command.main(given) == 0
    data = json.loads((tmp_path / "kernels.json").read_text())
    assert data["rows"] == []
    assert data["environment"]["not_reached"] == 12
