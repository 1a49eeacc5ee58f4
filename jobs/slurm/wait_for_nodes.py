"""Waits until a Ray cluster has the expected number of living nodes, and prints what they offer.

Usage: ``python wait_for_nodes.py HOST:PORT NODES SECONDS``
"""

import socket
import sys
import time

import ray


def wait_for_head(address: str, deadline: float) -> bool:
    """Wait until something listens at the address of the Ray head; say whether it does."""
    host, port = address.rsplit(":", 1)
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host, int(port)), timeout=2).close()
            return True
        except OSError:
            time.sleep(0.5)
    return False


def wait_for_nodes(address: str, expected: int, seconds: float) -> str | None:
    """Wait for the nodes; return what is wrong, or None when all have joined."""
    deadline = time.monotonic() + seconds
    if not wait_for_head(address, deadline):
        return f"no Ray head at {address} within {seconds:.0f} s"
    # The head listens a moment before its own node can be connected to.
    while True:
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            break
        except (ConnectionError, RuntimeError) as error:
            if time.monotonic() > deadline:
                return f"the Ray head at {address} takes no driver within {seconds:.0f} s: {error}"
            time.sleep(1)
    try:
        while True:
            nodes = [node for node in ray.nodes() if node["Alive"]]
            if len(nodes) >= expected:
                break
            if time.monotonic() > deadline:
                present = ", ".join(node["NodeManagerHostname"] for node in nodes)
                return f"{len(nodes)} of {expected} nodes joined within {seconds:.0f} s: {present}"
            time.sleep(1)
        total = ray.cluster_resources()
        print(
            f"Ray cluster is complete: {len(nodes)} nodes, {total.get('CPU', 0):.0f} CPUs, "
            f"{total.get('GPU', 0):.0f} GPUs",
            flush=True,
        )
        return None
    finally:
        ray.shutdown()


def main() -> int:
    """Run from the command line."""
    if len(sys.argv) != 4:
        print(__doc__, file=sys.stderr)
        return 2
    problem = wait_for_nodes(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
    if problem:
        print(f"wait_for_nodes: error: {problem}", file=sys.stderr)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
