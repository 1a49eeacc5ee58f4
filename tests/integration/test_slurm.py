"""The SLURM job on a real two-node SLURM."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.slurm_cluster import JobResult, SlurmCluster, interrupt

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
JOB = "jobs/slurm/train.sbatch"
# The environment that runs this test is the one that the job uses; small object stores suit small machines.
SETTINGS = {
    "FLAMINGO_VENV": sys.prefix,
    "FLAMINGO_RAY_ARGS": "--object-store-memory=150000000",
    "FLAMINGO_START_TIMEOUT": "120",
}
STAND_IN = {"FLAMINGO_COMMAND": f"{sys.executable} {ROOT / 'tests/integration/stand_in_driver.py'}"}


def run_job(
    slurm: SlurmCluster, folder: Path, *arguments: str, seconds: float = 240, **settings: str
) -> JobResult:
    """Run train.sbatch over both nodes and wait for its end."""
    output = folder / "job.log"
    job = slurm.submit("-N2", JOB, *arguments, output=output, cwd=ROOT, **{**SETTINGS, **settings})
    return slurm.wait(job, output, seconds)


def wait_for_file(path: Path, seconds: float, output: Path) -> None:
    """Wait until a job has made a file."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        log = output.read_text() if output.exists() else "no output yet"
        assert time.monotonic() < deadline, f"{path} is not there after {seconds} s: {log}"
        time.sleep(0.2)


def ray_processes(job: int) -> list[str]:
    """Return the command lines of processes that belong to a job's Ray nodes."""
    lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in lines.splitlines() if f"/ray-{job}-" in line]


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
    assert not ray_processes(result.job_id)
    assert not list(Path("/tmp").glob(f"ray-{result.job_id}-*"))


def test_exit_code_of_the_driver_is_the_job_s(slurm: SlurmCluster, tmp_path: Path) -> None:
    result = run_job(slurm, tmp_path, "fail", **STAND_IN)
    assert (result.state, result.exit_code) == ("FAILED", "3:0"), result.output
    assert not ray_processes(result.job_id)


def test_time_limit_saves_requeues_and_resumes(slurm: SlurmCluster, tmp_path: Path) -> None:
    output = tmp_path / "job.log"
    settings = {**SETTINGS, **STAND_IN}
    job = slurm.submit("-N2", JOB, "until-saved", str(tmp_path), output=output, cwd=ROOT, **settings)
    wait_for_file(tmp_path / "working", 120, output)
    interrupt(slurm, job, signal.SIGUSR1)
    result = slurm.wait(job, output)
    assert (result.state, result.exit_code, result.restarts) == ("COMPLETED", "0:0", 1), result.output
    assert (tmp_path / "state").read_text() == "n1 and n2"
    assert (tmp_path / "finished").exists()
    assert "resumed from n1 and n2" in result.output, result.output


def test_missing_environment_is_one_clear_error(slurm: SlurmCluster, tmp_path: Path) -> None:
    result = run_job(slurm, tmp_path, "smoke", FLAMINGO_VENV=str(tmp_path / "nothing"))
    assert result.state == "FAILED"
    assert f"{tmp_path / 'nothing'}/bin/python not found. Run make install" in result.output, result.output
    assert "preflight failed, nothing was started" in result.output
    assert "starting Ray" not in result.output
