"""Running the checks of a node on every node: here, by srun in a SLURM allocation, or as tasks of a Ray cluster."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from jobs.doctor.findings import Finding, fail
from jobs.doctor.meeting import listen
from jobs.doctor.network import check_address, check_port
from jobs.doctor.node import attend, examine, from_lines, name_of, roll_call
from jobs.doctor.report import Needs, NodeReport

ROOT = Path(__file__).resolve().parents[2]
_STARTING_SECONDS = 120
"""What srun may take to start Python on every node, beyond the time that nodes wait for one another."""

Answer = tuple[list[NodeReport], list[Finding]]
"""Reports of the nodes, and findings on what is between them."""


def slurm_nodes(environment: Mapping[str, str]) -> int:
    """Return the nodes of the allocation that this process may start steps on; 0 outside of one, or in a step."""
    if "SLURM_JOB_ID" not in environment or "SLURM_STEP_ID" in environment:
        return 0
    return int(environment.get("SLURM_JOB_NUM_NODES") or environment.get("SLURM_NNODES") or 1)


def slurm_master(environment: Mapping[str, str]) -> tuple[str, int]:
    """Return address and port of the Ray head, as train.sbatch will choose them."""
    port = int(environment.get("FLAMINGO_RAY_PORT") or 20000 + int(environment["SLURM_JOB_ID"]) % 10000)
    given = environment.get("FLAMINGO_HEAD_IP")
    if given:
        return given, port
    shown = subprocess.run(
        ["scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]],
        capture_output=True,
        text=True,
        timeout=60,
    )
    head = (shown.stdout.split() or [""])[0]
    if head and not check_address(head, hosts=2).remedy:
        return head, port
    return own_address(), port


def own_address() -> str:
    """Return the first IPv4 address of this host that is no loopback, or the loopback."""
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            if each.family.name == "AF_INET" and not each.address.startswith("127.") and name != "lo":
                return str(each.address)
    return "127.0.0.1"


def here(needs: Needs, environment: Mapping[str, str], master: tuple[str, int] | None) -> Answer:
    """Examine this node alone; `master` is an address and a port that the run will listen on, if it is known."""
    found = [] if master is None else [check_address(master[0], 1), check_port(*master)]
    return [examine(needs, environment, node=name_of(environment))], found


def by_srun(needs: Needs, environment: Mapping[str, str], master: tuple[str, int]) -> Answer:
    """Examine every node of the SLURM allocation, which meet at the master's port."""
    needs = replace(needs, meeting=master)
    one_a_node = [f"--nodes={needs.nodes}", f"--ntasks={needs.nodes}", "--ntasks-per-node=1"]
    command = ["srun", *one_a_node, "--cpu-bind=none", "--export=ALL", "--overlap"]
    command += [sys.executable, "-m", "jobs.doctor.node", needs.to_json()]
    paths = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH", "")]))
    try:
        done = subprocess.run(
            command,
            env={**environment, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            timeout=needs.seconds + _STARTING_SECONDS,
        )
        printed, errors = done.stdout, done.stderr
    except (OSError, subprocess.TimeoutExpired) as error:
        printed, errors = "", str(error)
    reports = [NodeReport.from_json(text) for text in from_lines(printed)]
    found = []
    if len(reports) < needs.nodes:
        last = " | ".join(errors.strip().splitlines()[-3:]) or "no error was printed"
        remedy = "run srun hostname in the allocation; python and the checkout must be there on every node"
        found.append(fail("nodes", f"{len(reports)} of {needs.nodes} nodes answered: {last}", remedy))
    found.append(check_address(master[0], len({report.host for report in reports})))
    return sorted(reports, key=lambda report: report.node), found


def by_ray(needs: Needs, address: str) -> Answer:
    """Examine every node of a running Ray cluster, which call this driver."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address=address, log_to_driver=False)
    try:
        own = ray.get_runtime_context().get_node_id()
        alive = [node for node in ray.nodes() if node["Alive"]]
        meeting = listen(ray.util.get_node_ip_address(), 0)
        needs = replace(
            needs,
            nodes=len(alive),
            meeting=(ray.util.get_node_ip_address(), meeting.port) if len(alive) > 1 else None,
        )
        asked = [
            ray.remote(_examine_ray_node)
            .options(
                num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            )
            .remote(
                needs.to_json(),
                f"{node['NodeManagerHostname']}:{number}",
                node["NodeID"] == own,
                _amounts(node),
            )
            for number, node in enumerate(alive)
        ]
        found = [roll_call(meeting, needs)] if len(alive) > 1 else []
        reports = [
            NodeReport.from_json(text) for text in ray.get(asked, timeout=needs.seconds + _STARTING_SECONDS)
        ]
        meeting.close()
        return reports, found
    except ray.exceptions.GetTimeoutError:
        remedy = "ray status and ray list nodes show what the cluster thinks of its nodes"
        return [], [fail("nodes", "not all nodes of the Ray cluster answered in time", remedy)]
    finally:
        ray.shutdown()


def _amounts(node: Mapping[str, Any]) -> int:
    """Return the CPUs that a Ray node offers, which may be others than it has."""
    return int(node["Resources"].get("CPU", 0))


def _examine_ray_node(needs: str, node: str, is_first: bool, cores: int) -> str:
    """Run on a Ray node: examine it and return the report as JSON."""
    wanted = Needs.from_json(needs)
    if is_first:  # the driver, on the same node, listens already
        wanted = replace(wanted, meeting=None)
    report = attend(wanted, os.environ, node=node, is_first=False)
    return replace(report, cores=cores).to_json()
