"""The phases of the test runner: their environments, and what happens where the older Triton cannot be had."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools import run_tests


def environment(phase: str) -> dict[str, str]:
    """The environment of a phase that can run."""
    found = run_tests.environment_of(run_tests.PHASES[phase])
    assert found is not None
    return found


@pytest.mark.parametrize("ci", [False, True])
def test_a_triton_that_cannot_be_had_is_told_and_fails_under_ci(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], ci: bool
) -> None:
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="no matching distribution")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("tools.run_tests.subprocess.run", lambda *args, **kwargs: failed)
    monkeypatch.setattr(
        "tools.run_tests.subprocess.Popen", lambda *args, **kwargs: pytest.fail("pytest started")
    )
    monkeypatch.setenv("CI", "true" if ci else "")
    result = run_tests.run_phase("dry-older", [])
    assert result.ok is not ci
    assert result.counts == {"error" if ci else "skipped": 1}
    assert "no matching distribution" in capsys.readouterr().out
    shown = run_tests.summary([result], 1.0)
    assert ("1 error" if ci else "1 skipped") in shown
    assert [path.name for path in tmp_path.rglob("*")] == ["flamingo-dist"], "nothing half-installed"


def test_the_older_triton_comes_first_on_the_path_and_is_installed_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    installs: list[list[str]] = []

    def install(command: list[str], **kwargs: Any) -> "subprocess.CompletedProcess[str]":
        installs.append(command)
        Path(command[command.index("--target") + 1], "triton").mkdir(parents=True)
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr("tools.run_tests.subprocess.run", install)
    for _ in range(2):
        found = environment("dry-older")
        first, second = found["PYTHONPATH"].split(":")
        assert Path(first, "triton").is_dir()
        assert second == "/elsewhere"
        assert found["KMODE"] == "dry"
    (command,) = installs
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert command[-1] == f"triton=={run_tests.OLDER_TRITON}"
    assert "--no-deps" in command


def test_ordinary_phases_stay_in_reference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KMODE", "dry")
    assert environment("light")["KMODE"] == "reference"


@pytest.mark.parametrize(("extra", "paths"), [(["-k", "x"], ["tests/kernels"]), (["tests/jobs"], [])])
def test_paths_of_the_caller_replace_a_phases_own(
    monkeypatch: pytest.MonkeyPatch, extra: list[str], paths: list[str]
) -> None:
    started: list[list[str]] = []

    class Process:
        def __init__(self, command: list[str], **kwargs: Any) -> None:
            started.append(command)

        def wait(self) -> int:
            return run_tests.NO_TESTS_COLLECTED

    monkeypatch.setattr("tools.run_tests.subprocess.Popen", Process)
    assert run_tests.run_phase("dry", extra).ok
    assert started[0][-len(extra + paths) :] == extra + paths
