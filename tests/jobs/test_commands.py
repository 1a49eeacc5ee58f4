"""The command line as a whole."""

import os
import subprocess
import sys

import pytest
import torch

from flamingo_dist import cli
from flamingo_dist.models.weights import ranges
from jobs.commands import checkpoint_setting


def test_help_says_nothing_but_help():
    """DeepSpeed warned of its accelerator wherever it was imported before it was told."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("DS_ACCELERATOR", None)
    arguments = [sys.executable, "-m", "flamingo_dist.cli", "train", "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: flamingo train")
    assert "WARNING" not in done.stdout + done.stderr


def test_what_a_storage_refuses_is_one_line(tmp_path, monkeypatch, capsys):
    """A server that is not there, a protocol without a package, a file in the place of a folder, a damaged file."""
    monkeypatch.setattr(ranges, "ATTEMPTS", 1)
    (tmp_path / "file").write_text("")
    torch.save({}, tmp_path / "checkpoint.pt")
    (tmp_path / "config.json").write_text("")
    for arguments, says in {
        (
            "import",
            "http://127.0.0.1:9/checkpoint.pt",
            f"{tmp_path}/out",
        ): "http://127.0.0.1:9/checkpoint.pt, 1 attempts",
        (
            "import",
            "nonsense://x/checkpoint.pt",
            f"{tmp_path}/out",
        ): "nonsense://x/checkpoint.pt cannot be read here",
        ("import", f"{tmp_path}/checkpoint.pt", f"{tmp_path}/file/out"): f"Not a directory: '{tmp_path}/file",
        (
            "import",
            f"{tmp_path}",
            f"{tmp_path}/out",
        ): f"{tmp_path}/config.json cannot be read as JSON (0 bytes)",
        (
            "export",
            f"{tmp_path}",
            f"{tmp_path}/out",
        ): f"{tmp_path}/config.json cannot be read as JSON (0 bytes)",
    }.items():
        assert cli.main(arguments) == 1
        told = capsys.readouterr().err
        assert told.startswith(f"flamingo {arguments[0]}: ")
        assert says in told
        assert told.count("\n") == 1


def test_an_error_of_ours_keeps_its_traceback(monkeypatch):
    def broken(_: list[str]) -> int:
        raise KeyError("ours")

    monkeypatch.setattr(cli, "_commands", lambda: {"train": (broken, "")})
    with pytest.raises(KeyError, match="ours"):
        cli.main(["train"])


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("weights.my-pairs", "weights.my-pairs"),
        ("data.train.pairs.weight", "weights.pairs"),
        ("--data.train.my-pairs.weight", "weights.my-pairs"),
        ("data.train.pairs.weight_schedule.points", "weights.pairs"),
        ("data.train.pairs.weight-schedule", "weights.pairs"),
        ("train.optimizer.lr", "train.optimizer.lr"),
        ("--train.optimizer.warmup-steps", "train.optimizer.warmup_steps"),
        ("data.train.pairs.seq_len", "data.train.pairs.seq_len"),
    ],
)
def test_settings_that_may_change_are_named_as_on_the_command_line(given, stored):
    assert checkpoint_setting(given) == stored
