"""`flamingo doctor` on two nodes: in a SLURM allocation, and in a Ray cluster that somebody else started."""

import json
import socket
import sys
from pathlib import Path

import pytest

from tests.integration.slurm_cluster import JobResult, SlurmCluster, lasting_port

pytestmark = [pytest.mark.integration, pytest.mark.slurm, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]


def run_job(slurm: SlurmCluster, folder: Path, *arguments: str, **environment: str) -> JobResult:
    """Run the doctor in a job of two nodes and wait for its end."""
    script = folder / "doctor.sh"
    command = [
        sys.executable,
        "-m",
        "flamingo_dist.cli",
        "doctor",
        "smoke",
        "--runs-dir",
        str(folder / "runs"),
    ]
    script.write_text(f"#!/bin/bash\ncd {ROOT}\nexec {' '.join([*command, *arguments])}\n")
    output = folder / "doctor.log"
    own = {"FLAMINGO_RAY_PORT": str(lasting_port()), "FLAMINGO_HEAD_IP": "127.0.0.1", **environment}
    return slurm.wait(slurm.submit("-N2", str(script), output=output, cwd=folder, **own), output, 400)


def test_every_node_of_an_allocation_is_checked(slurm: SlurmCluster, tmp_path: Path) -> None:
    result = run_job(
        slurm, tmp_path, "--json", "--data.readers.cpus-per-reader", "0.25", PYTHONUNBUFFERED="1"
    )
    assert "{" in result.output, (result.state, result.exit_code, result.output)
    said = json.loads(result.output[result.output.index("{") :])
    assert (result.state, said["ok"]) == ("COMPLETED", True), result.output
    assert [node["node"] for node in said["nodes"]] == ["n1", "n2"]
    found = {(finding["check"], finding["node"]): finding for finding in said["findings"]}
    for check, node in (
        *(("shared run folder", name) for name in ("n1", "n2")),
        *(("log output", name) for name in ("n1", "n2")),
        ("master port", "n1"),
        ("master reachable", "n2"),
        ("clock skew", ""),
        ("same versions", ""),
    ):
        assert found[check, node]["level"] == "ok", (check, node, result.output)
    assert "1 of 1 other nodes called" in found["master port", "n1"]["says"]
    assert "clocks of 2 nodes are 0.0" in found["clock skew", ""]["says"]
    assert not (tmp_path / "runs").exists(), "the doctor leaves nothing behind"


def test_an_occupied_port_and_a_hint_of_slurm_are_told_of_their_nodes(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", lasting_port())) as occupied:
        port = str(occupied.getsockname()[1])
        given = {"FLAMINGO_RAY_PORT": port, "SLURM_HINT": "nomultithread", "PYTHONUNBUFFERED": ""}
        result = run_job(slurm, tmp_path, "--quiet", "--seconds", "5", **given)
    assert (result.state, result.exit_code) == ("FAILED", "1:0"), result.output
    assert f"fail  master port [n1]: 127.0.0.1:{port} cannot be listened on" in result.output, result.output
    assert "fail  master reachable [n2]" in result.output, result.output
    assert "warn  SLURM hints [n1, n2]: SLURM_HINT=nomultithread" in result.output, result.output
    assert "warn  log output [n1, n2]" in result.output, result.output
