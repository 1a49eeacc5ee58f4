"""The smoke recipe, and the doctor, on a Ray cluster that somebody else started: two Ray nodes on one machine."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.ray_nodes import below, wait_for_trainers
from tests.integration.slurm_cluster import lasting_port

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


@contextlib.contextmanager
def ray_node(folder: Path, *arguments: str, environment: dict[str, str]) -> Iterator[None]:
    """Run one Ray node with three logical CPUs in the foreground of a process of its own."""
    folder.mkdir()
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *arguments]
    command += [f"--temp-dir={folder}", "--num-cpus=3", "--object-store-memory=150000000"]
    command += ["--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats"]
    with open(folder / "start.log", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
        for pid, _ in below(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def cluster() -> Iterator[tuple[str, list[Path], dict[str, str]]]:
    """A Ray cluster of two nodes: address, the nodes' temporary folders, environment to join it."""
    base = Path(tempfile.mkdtemp(prefix="rc-", dir="/tmp"))  # short: unix sockets lie below it
    folders = [base / "1", base / "2"]
    address = f"127.0.0.1:{lasting_port()}"
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
    host, port = address.split(":")
    head = ["--head", f"--node-ip-address={host}", f"--port={port}", "--include-dashboard=false"]
    wait = [sys.executable, "jobs/slurm/wait_for_nodes.py", address]
    with ray_node(folders[0], *head, environment=environment):
        subprocess.run([*wait, "1", "180"], cwd=ROOT, env=environment, check=True)
        with ray_node(
            folders[1], f"--address={address}", f"--node-ip-address={host}", environment=environment
        ):
            subprocess.run([*wait, "2", "180"], cwd=ROOT, env=environment, check=True)
            yield address, folders, environment
    shutil.rmtree(base, ignore_errors=True)


def test_train_smoke_on_a_running_cluster(
    cluster: tuple[str, list[Path], dict[str, str]], tmp_path: Path
) -> None:
    address, folders, environment = cluster
    command = [str(BIN / "flamingo"), "train", "smoke", "--ray-address", address]
    command += ["--runs-dir", str(tmp_path / "runs"), "--name", "joined", "--train.steps", "3"]
    output = tmp_path / "out.log"
    with open(output, "wb") as log:
        driver = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        counts = wait_for_trainers(folders, 300, expected=4, running=lambda: driver.poll() is None)
        code = driver.wait(600)
    finally:
        driver.kill()
        driver.wait()
    assert code == 0, output.read_text()
    assert sum(counts) == 4, (counts, output.read_text())
    assert all(counts), f"training processes on each node: {counts}"
    summary = json.loads((tmp_path / "runs/joined/summary.json").read_text())
    assert summary["steps"] == 3


def test_the_doctor_looks_at_every_node_of_a_running_cluster(
    cluster: tuple[str, list[Path], dict[str, str]], tmp_path: Path
) -> None:
    address, _, environment = cluster
    command = [
        sys.executable,
        "-m",
        "flamingo_dist.cli",
        "doctor",
        "smoke",
        "--ray-address",
        address,
        "--json",
    ]
    command += ["--runs-dir", str(tmp_path / "runs")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    assert [node["cores"] for node in said["nodes"]] == [3, 3]
    names = {node["node"] for node in said["nodes"]}
    assert len(names) == 2
    found = said["findings"]
    assert {f["node"] for f in found if f["check"] == "shared run folder" and f["level"] == "ok"} == names
    (reached,) = [f for f in found if f["check"] == "master reachable"]
    assert reached["level"] == "ok"
    (roll,) = [f for f in found if f["check"] == "master port"]
    assert "1 of 1 other nodes called" in roll["says"]
    assert not (tmp_path / "runs").exists()
