import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "tools" / "gpu_check.py"
spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
gpu_check = importlib.util.module_from_spec(spec)
sys.modules["gpu_check"] = gpu_check
spec.loader.exec_module(gpu_check)


@pytest.mark.integration
def test_dry_run_goes_through_all_stages(tmp_path):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (it exists for Linux alone)")
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path, "--dry"], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [stage["name"] for stage in summary["stages"]] == ["tests", "losses", "step", "profile", "kernels"]
    assert summary["ok"]
    assert len(list(tmp_path.iterdir())) <= gpu_check.MOST_FILES
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert losses["agree"]
    assert len(losses["engine"]) == 4
    assert not losses["engine_left_out"]
    differences = losses["worst_loss_difference"], losses["worst_norm_difference"]
    assert 0 < max(differences) < 1e-5, "0 would mean that nothing was compared"
    ours = [r for r in json.loads((tmp_path / "kernels.json").read_text())["rows"] if r["ours"]]
    assert {r["op"] for r in ours if r["status"] == "timed"} == {
        "gated_xattn", "perceiver_attn", "add_layernorm", "gated_relu2"
    }  # fmt: skip
    step = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert {r["status"] for r in step} == {"timed"}
    ours = ["reference", "triton"]
    assert [r["contender"] for r in step] == [*ours, *ours, "IDEFICS (transformers)"]
    with tarfile.open(tmp_path / "rest.tar.gz") as archive:
        names = archive.getnames()
    assert {"kernels.csv", "profile/step-pixels.json", "profile/profile.md"} <= set(names)
    assert "profile/trace-smoke-triton.json.gz" in names


def stage(code: str) -> "gpu_check.Stage":
    return gpu_check.Stage(name="s", command=[sys.executable, "-c", code], share=1.0)


def test_a_stage_that_hangs_is_interrupted_and_may_still_write(tmp_path):
    code = (
        "import pathlib, time\n"
        "print('begun', flush=True)\n"
        "try:\n    time.sleep(60)\n"
        f"except KeyboardInterrupt:\n    pathlib.Path({str(tmp_path / 'left')!r}).write_text('x')"
    )
    # As a job that a shell has put in the background: what it starts would not hear the interrupt.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        outcome = gpu_check.run_stage(stage(code), 1.5)
    finally:
        signal.signal(signal.SIGINT, before)
    assert outcome.timed_out
    assert not outcome.ok
    assert outcome.seconds < 10
    assert (tmp_path / "left").exists()


def test_a_stage_that_fails_is_told_with_its_last_lines():
    outcome = gpu_check.run_stage(stage("print('why'); raise SystemExit(3)"), 20)
    assert (outcome.exit_code, outcome.tail, outcome.ok) == (3, ["why"], False)


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "_has_gpu", lambda: False)
    assert gpu_check.main([str(tmp_path)]) == 2
    assert "--dry" in capsys.readouterr().out


def test_the_shares_leave_the_benchmark_most_of_the_time(tmp_path):
    planned = {stage.name: stage for stage in gpu_check.stages(tmp_path, dry=False, limit=520)}
    before = sum(stage.share for stage in planned.values() if stage.name != "kernels")
    assert 520 - before - 75 > 100
    assert "--tests" in planned["kernels"].command


def test_the_benchmark_alone_needs_the_verdict_of_newer_tests(tmp_path, capsys):
    only = [str(tmp_path), "--dry", "--only", "kernels"]
    verdict = tmp_path / "tests.xml"
    for age in (None, 0):
        if age is not None:
            verdict.write_text("<testsuites/>")
            os.utime(verdict, (age, age))
        with pytest.raises(SystemExit) as ended:
            gpu_check.main(only)
        assert ended.value.code == 2
        assert "missing or older than kernels/" in capsys.readouterr().err
    assert verdict.exists(), "only what a stage writes is removed"


def test_half_a_verdict_is_none(tmp_path, monkeypatch):
    slow = (
        f"import pathlib, time; pathlib.Path({str(tmp_path / 'tests.xml')!r}).write_text('x'); time.sleep(60)"
    )
    half = gpu_check.Stage(name="tests", command=[sys.executable, "-c", slow], share=3.0)
    monkeypatch.setattr(gpu_check, "stages", lambda *_, **__: [half])
    assert gpu_check.main([str(tmp_path), "--dry"]) == 1
    assert not (tmp_path / "tests.xml").exists()
    assert (tmp_path / "tests-cut-off.xml").exists()
