"""The benchmark of tiles, at tiny shapes under Triton's interpreter in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

from tests.jobs.bench.test_gpu_check import ROOT

pytest.importorskip("triton")


def test_tiles_are_timed_and_compared_with_the_tables(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "jobs.bench.tune", "--tiny", "--out", tmp_path],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "tune.json").read_text())
    rows = found["rows"]
    assert found["not_reached"] == 0
    assert [row["tile"] == "table" for row in rows] == [True, False] * 4
    assert {(row["op"], row["backward"]) for row in rows} == {
        (op, backward) for op in ("gated_xattn", "perceiver_attn") for backward in (False, True)
    }
    assert all(row["ms"] > 0 and row["difference"] < 1e-5 for row in rows)
    assert done.stdout.count("of a copy") == 8


def test_without_a_gpu_it_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "jobs.bench.tune", "--out", tmp_path],
        cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "No CUDA device here" in done.stdout
    assert not list(tmp_path.iterdir())
