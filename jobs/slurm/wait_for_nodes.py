"""Waits until a Ray cluster has the expected number of living nodes, and prints what they offer.

Asks the head's table of nodes without joining as a driver: a driver dies with a node that fails to start and
is started again.

Usage: ``python wait_for_nodes.py HOST:PORT NODES SECONDS``
"""

import socket
import sys
import time
from typing import Any

from ray._raylet import GcsClient
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from ray.exceptions import RpcError


def living_nodes(address: str) -> list[Any]:
    """Return the head's records of the nodes that are alive; none while the head does not answer."""
    host, port = address.rsplit(":", 1)
    try:
        # The client itself would wait a minute for a head that is not there yet.
        socket.create_connection((host, int(port)), timeout=2).close()
        nodes = GcsClient(address=address).get_all_node_info(timeout=10).values()
    except (OSError, RpcError):
        return []
    return [node for node in nodes if node.state == GcsNodeInfo.GcsNodeState.ALIVE]


def wait_for_nodes(address: str, expected: int, seconds: float) -> str:
    """Wait for the nodes and return a line on what they offer.

    Raises:
        TimeoutError: fewer joined in time; the message names those that did.
    """
    deadline = time.monotonic() + seconds
    while len(nodes := living_nodes(address)) < expected:
        if time.monotonic() > deadline:
            present = ", ".join(node.node_manager_hostname for node in nodes) or "none"
            raise TimeoutError(
                f"{len(nodes)} of {expected} Ray nodes joined {address} within {seconds:.0f} s: {present}"
            )
        time.sleep(1)
    cpus, gpus = (sum(node.resources_total.get(name, 0) for node in nodes) for name in ("CPU", "GPU"))
    return f"Ray cluster is complete: {len(nodes)} nodes, {cpus:.0f} CPUs, {gpus:.0f} GPUs"


def main() -> int:
    """Run from the command line."""
    if len(sys.argv) != 4:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        print(wait_for_nodes(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])), flush=True)
    except TimeoutError as error:
        print(f"wait_for_nodes: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
