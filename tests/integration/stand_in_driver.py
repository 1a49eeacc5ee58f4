"""Stands in for ``flamingo train`` where a test is about the job around it and not about training.

``probe`` runs one task on every Ray node and prints the SLURM node that it ran on. ``until-saved
FOLDER`` behaves like a run that takes long: it works until it is asked to end, saves its state through
the cluster's workers, and finishes when it is started again. ``fail`` ends with exit code 3.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@ray.remote(num_cpus=1)
def slurm_node() -> str:
    """Return the SLURM node that this task's Ray node was started on; "none" without SLURM."""
    return os.environ.get("SLURMD_NODENAME", "none")


def run_on_every_node() -> list[str]:
    """Run one task on each Ray node."""
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    assert len(nodes) == 2, ray.nodes()
    pinned = [
        slurm_node.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
        for node in nodes
    ]
    names: list[str] = ray.get(pinned, timeout=120)
    return sorted(names)


def work_until_saved(folder: Path) -> None:
    """Work until SIGTERM, then save through the workers; finish at once where a state was saved before."""
    state = folder / "state"
    if state.exists():
        print(f"resumed from {state.read_text()}", flush=True)
        (folder / "finished").touch()
        return
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    (folder / "working").touch()
    while not asked:
        time.sleep(0.1)
    # The point of the exercise: the workers are still there to take part in saving.
    state.write_text(" and ".join(run_on_every_node()))
    print(f"saved to {state}", flush=True)


def main() -> None:
    """Run from the command line, with the options that the job adds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=["probe", "until-saved", "fail"])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--ray-address", required=True)
    parser.add_argument("--resume")
    arguments = parser.parse_args()
    ray.init(address=arguments.ray_address, logging_level="ERROR")
    if arguments.mode == "fail":
        sys.exit(3)
    if arguments.mode == "until-saved":
        work_until_saved(arguments.folder)
    else:
        print("tasks ran on", *run_on_every_node(), flush=True)


if __name__ == "__main__":
    main()
