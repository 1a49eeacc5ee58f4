"""The command line as a whole."""

import os
import subprocess
import sys


def test_help_says_nothing_but_help():
    """DeepSpeed warned of its accelerator wherever it was imported before it was told."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("DS_ACCELERATOR", None)
    arguments = [sys.executable, "-m", "flamingo_dist.cli", "train", "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: flamingo train")
    assert "WARNING" not in done.stdout + done.stderr
