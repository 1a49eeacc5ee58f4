"""All checks of one node: called in the doctor's own process, by srun on every node, or as a Ray task.

``python -m jobs.doctor.node NEEDS`` prints the report, in `to_lines`.
"""

import base64
import os
import socket
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from jobs.doctor.clocks import check_synchronised, synchronised
from jobs.doctor.disk import check_caches, check_paths, check_shared, check_temporary
from jobs.doctor.findings import Finding, fail, ok
from jobs.doctor.gpus import check_gpus, present
from jobs.doctor.host import check_host, offered
from jobs.doctor.meeting import Meeting, NotTheDoctorError, call, listen
from jobs.doctor.network import check_interfaces, check_master_variables, check_nccl, interfaces, port_in_use
from jobs.doctor.report import Clock, Needs, NodeReport
from jobs.doctor.versions import check_versions, installed, requirements

TAG = "doctor-report "
"""Begins the lines of a report: whatever else a node prints is not it."""
_PIECE = 600
"""Characters of a report in one line."""


def name_of(environment: Mapping[str, str]) -> str:
    """Return this node's name: SLURM's, or the host's."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def examine(
    needs: Needs, environment: Mapping[str, str], *, node: str, clock: Clock | None = None
) -> NodeReport:
    """Make all checks of this node.

    Args:
        needs: what the run asks of it.
        environment: environment variables, those that the run's processes inherit.
        node: its name.
        clock: its clock against the meeting node's.
    """
    gpus = present() if needs.use_gpu else ()
    required = requirements()
    versions = installed([each.name for each in required])
    found = check_host(needs, environment)
    found += check_versions(required, versions)
    found += check_interfaces(needs, environment, interfaces())
    found += check_nccl(needs, environment, len(gpus))
    found += check_master_variables(environment)
    found.append(check_synchronised(synchronised()))
    found.append(check_temporary(Path(environment.get("FLAMINGO_RAY_TMP") or tempfile.gettempdir())))
    found += check_paths(needs.paths)
    found += check_caches(needs.caches)
    if needs.use_gpu:
        import torch

        found += check_gpus(gpus, built_for_gpus=torch.version.cuda is not None)
    if needs.mark:
        found.append(check_shared(Path(needs.run_dir), needs.mark))
    return NodeReport(
        node=node,
        host=socket.gethostname(),
        cores=offered(environment),
        gpus=gpus,
        versions=versions,
        clock=clock,
        findings=tuple(replace(finding, node=node) for finding in found),
    )


def attend(needs: Needs, environment: Mapping[str, str], *, node: str, is_first: bool) -> NodeReport:
    """Meet the other nodes at the master's port, and make all checks of this node.

    Args:
        needs: what the run asks of it.
        environment: environment variables.
        node: its name.
        is_first: whether it is the node where the others meet.
    """
    if needs.meeting is None:
        return examine(needs, environment, node=node)
    address, port = needs.meeting
    if not is_first:
        found, clock = call_in(needs, node)
        return _with(examine(needs, environment, node=node, clock=clock), found)
    try:
        meeting = listen(address, port)
    except OSError as error:
        return _with(examine(needs, environment, node=node), port_in_use(address, port, error))
    report = examine(needs, environment, node=node)
    try:
        return _with(report, roll_call(meeting, needs))
    finally:
        meeting.close()


def call_in(needs: Needs, node: str) -> tuple[Finding, Clock | None]:
    """Call the node where all meet; return what came of it, and this clock against that node's."""
    assert needs.meeting is not None, "nodes that do not meet do not call"
    address, port = needs.meeting
    try:
        clock = call(address, port, node, needs.seconds)
    except NotTheDoctorError as error:
        remedy = "another program has the port: choose another, FLAMINGO_RAY_PORT (or --master-port)"
        return fail(
            "master reachable", f"{address}:{port} is not the first node of this run: it {error}", remedy
        ), None
    except OSError as error:
        remedy = (
            f"open TCP between the nodes (firewall), or set FLAMINGO_HEAD_IP (or --master-addr) to an address of the "
            f"first node in a network that {node} is in"
        )
        says = f"{address}:{port} was not reached within {needs.seconds:.0f} s ({error})"
        return fail("master reachable", says, remedy), None
    return ok("master reachable", f"{address}:{port} answers"), clock


def roll_call(meeting: Meeting, needs: Needs) -> Finding:
    """Wait for the other nodes; return how many came."""
    expected = needs.nodes - 1
    callers = meeting.wait_for(expected, needs.seconds)
    says = f"port {meeting.port} can be listened on; {len(callers)} of {expected} other nodes called"
    if len(callers) == expected:
        return ok("master port", says)
    remedy = "look at what the others say; one that says nothing was not started"
    return fail("master port", f"{says} ({', '.join(sorted(callers)) or 'none'})", remedy)


def _with(report: NodeReport, finding: Finding) -> NodeReport:
    """Return the report with one more finding of its node, first."""
    return replace(report, findings=(replace(finding, node=report.node), *report.findings))


def to_lines(node: str, text: str) -> list[str]:
    """Return `text` in lines that srun passes on whole: longer ones than 1,024 bytes it mixes with other tasks'."""
    coded = base64.b64encode(text.encode()).decode()
    pieces = [coded[start : start + _PIECE] for start in range(0, len(coded), _PIECE)]
    return [f"{TAG}{node} {number} {len(pieces)} {piece}" for number, piece in enumerate(pieces)]


def from_lines(printed: str) -> list[str]:
    """Return the texts of all nodes whose lines are all there, whatever stands between them."""
    pieces: dict[str, dict[int, str]] = {}
    wanted: dict[str, int] = {}
    for line in printed.splitlines():
        parts = line.partition(TAG)[2].split()
        if len(parts) == 4:
            node, number, count, piece = parts
            pieces.setdefault(node, {})[int(number)] = piece
            wanted[node] = int(count)
    whole = [found for node, found in pieces.items() if len(found) == wanted[node]]
    return [base64.b64decode("".join(found[i] for i in sorted(found))).decode() for found in whole]


def main(arguments: list[str]) -> int:
    """Run as a task of srun: print the report of this node."""
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    is_first = os.environ.get("SLURM_NODEID", "0") == "0"
    report = attend(Needs.from_json(arguments[0]), os.environ, node=name_of(os.environ), is_first=is_first)
    print("\n".join(to_lines(report.node, report.to_json())), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
