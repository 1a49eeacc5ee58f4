"""The SLURM job on a real two-node SLURM."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.integration.ray_nodes import below, raylets, wait_for_trainers
from tests.integration.slurm_cluster import JobResult, SlurmCluster, interrupt, lasting_port

pytestmark = [pytest.mark.integration, pytest.mark.slurm, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
JOB = "jobs/slurm/train.sbatch"
# The environment that runs this test is the one that the job uses; small object stores suit small machines.
SETTINGS = {
    "FLAMINGO_VENV": sys.prefix,
    "FLAMINGO_RAY_ARGS": "--object-store-memory=150000000",
    "FLAMINGO_START_TIMEOUT": "300",
}
STAND_IN = {"FLAMINGO_COMMAND": f"{sys.executable} {ROOT / 'tests/integration/stand_in_driver.py'}"}


def submit(slurm: SlurmCluster, folder: Path, *arguments: str, **settings: str) -> tuple[int, Path]:
    """Submit train.sbatch over both nodes; return the job and its output file."""
    output = folder / "job.log"
    own = {"FLAMINGO_RAY_PORT": str(lasting_port()), "FLAMINGO_RAY_TMP": str(slurm.folder)}
    job = slurm.submit("-N2", JOB, *arguments, output=output, cwd=ROOT, **{**SETTINGS, **own, **settings})
    return job, output


def run_job(slurm: SlurmCluster, folder: Path, *arguments: str, **settings: str) -> JobResult:
    """Run train.sbatch over both nodes and wait for its end."""
    return slurm.wait(*submit(slurm, folder, *arguments, **settings))


def wait_for_file(path: Path, seconds: float, slurm: SlurmCluster, job: int, output: Path) -> None:
    """Wait until a running job has made a file."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        log = output.read_text() if output.exists() else "no output yet"
        assert slurm.unfinished(job), f"the job ended before {path} was there: {log}"
        assert time.monotonic() < deadline, f"{path} is not there after {seconds} s: {log}"
        time.sleep(0.3)


def ray_leavings(slurm: SlurmCluster) -> list[tuple[int, str]]:
    """Return what is still there of the Ray nodes of any job."""
    return [entry for entry in below(slurm.folder) if "/ray-" in entry[1]]


def test_both_nodes_run_a_job(slurm: SlurmCluster, tmp_path: Path) -> None:
    script = tmp_path / "who.sh"
    script.write_text("#!/bin/bash\nsrun --ntasks-per-node=1 bash -c 'echo task on $SLURMD_NODENAME'\n")
    output = tmp_path / "out.log"
    result = slurm.wait(slurm.submit("-N2", str(script), output=output, cwd=tmp_path), output)
    assert (result.state, result.exit_code) == ("COMPLETED", "0:0"), result
    assert sorted(result.output.splitlines()) == ["task on n1", "task on n2"]


def test_ray_spans_both_nodes_and_leaves_nothing_behind(slurm: SlurmCluster, tmp_path: Path) -> None:
    result = run_job(slurm, tmp_path, "probe", **STAND_IN)
    assert (result.state, result.exit_code) == ("COMPLETED", "0:0"), result.output
    assert "2 nodes, 6 CPUs" in result.output, result.output
    assert "tasks ran on n1 n2" in result.output, result.output
    assert not ray_leavings(slurm)
    assert not list(slurm.folder.glob("ray-*"))


def test_exit_code_of_the_driver_is_the_job_s(slurm: SlurmCluster, tmp_path: Path) -> None:
    result = run_job(slurm, tmp_path, "fail", **STAND_IN)
    assert (result.state, result.exit_code) == ("FAILED", "3:0"), result.output
    assert not ray_leavings(slurm)


def test_time_limit_saves_requeues_and_resumes(slurm: SlurmCluster, tmp_path: Path) -> None:
    """A checkpoint that the arguments name is for the first start alone."""
    job, output = submit(slurm, tmp_path, "until-saved", str(tmp_path), "--resume", "80", **STAND_IN)
    wait_for_file(tmp_path / "working", 120, slurm, job, output)
    interrupt(slurm, job, signal.SIGUSR1)
    result = slurm.wait(job, output)
    assert (result.state, result.exit_code, result.restarts) == ("COMPLETED", "0:0", 1), result.output
    assert (tmp_path / "state").read_text() == "n1 and n2"
    assert (tmp_path / "finished").exists()
    assert "resumed from n1 and n2" in result.output, result.output
    first, second = [line for line in result.output.splitlines() if "running: " in line]
    assert "--resume 80 --ray-address" in first
    assert "--resume auto" not in first
    assert second.endswith("--resume auto")


def test_asked_to_end_it_saves_and_does_not_requeue(slurm: SlurmCluster, tmp_path: Path) -> None:
    job, output = submit(slurm, tmp_path, "until-saved", str(tmp_path), **STAND_IN)
    wait_for_file(tmp_path / "working", 120, slurm, job, output)
    interrupt(slurm, job, signal.SIGTERM)
    result = slurm.wait(job, output)
    assert (result.state, result.exit_code, result.restarts) == ("COMPLETED", "0:0", 0), result.output
    assert (tmp_path / "state").exists()
    assert not (tmp_path / "finished").exists()


def test_a_lost_node_ends_the_job(slurm: SlurmCluster, tmp_path: Path) -> None:
    job, output = submit(slurm, tmp_path, "until-saved", str(tmp_path), **STAND_IN)
    wait_for_file(tmp_path / "working", 120, slurm, job, output)
    (raylet,) = raylets(slurm.folder / f"ray-{job}-1")
    os.kill(raylet, signal.SIGKILL)
    result = slurm.wait(job, output)
    assert result.state == "FAILED", result.output
    assert "Ray ended on node n2" in result.output, result.output
    assert "a Ray node has ended; ending the driver" in result.output, result.output
    assert not ray_leavings(slurm)


def test_missing_environment_is_one_clear_error(slurm: SlurmCluster, tmp_path: Path) -> None:
    result = run_job(slurm, tmp_path, "smoke", FLAMINGO_VENV=str(tmp_path / "nothing"))
    assert result.state == "FAILED"
    for node in ("n1", "n2"):  # each says what it lacks, whichever is the first to end
        says = f"node {node}: {tmp_path / 'nothing'}/bin/python not found. Run make install"
        assert says in result.output, result.output
    assert "preflight failed, nothing was started" in result.output
    assert "starting Ray" not in result.output


@pytest.mark.timeout(1200)
def test_train_smoke_across_two_nodes(slurm: SlurmCluster, tmp_path: Path) -> None:
    """Trains on both nodes, is interrupted as by a time limit, requeued, and goes on where it was."""
    run = tmp_path / "runs/wide"
    arguments = ["smoke", "--runs-dir", str(run.parent), "--name", run.name, "--train.steps", "8"]
    job, output = submit(slurm, tmp_path, *arguments)
    folders = [slurm.folder / f"ray-{job}-{node}" for node in (0, 1)]
    counts = wait_for_trainers(folders, 500, expected=4, running=lambda: slurm.unfinished(job))
    wait_for_file(run / "metrics.jsonl", 500, slurm, job, output)
    interrupt(slurm, job, signal.SIGUSR1)
    result = slurm.wait(job, output, 900)
    assert (result.state, result.exit_code, result.restarts) == ("COMPLETED", "0:0", 1), result.output
    assert sum(counts) == 4, (counts, result.output)
    assert all(counts), f"training processes on each node: {counts}"
    assert "stopped at step" in result.output, result.output
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "step"] == list(range(8))
    assert json.loads((run / "summary.json").read_text())["steps"] == 8
    assert not ray_leavings(slurm)
