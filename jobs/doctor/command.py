"""`flamingo doctor RECIPE`: all checks, one line a finding."""

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jobs.doctor.clocks import check_skew
from jobs.doctor.data import check_data
from jobs.doctor.disk import bytes_below, check_run_folder, marked
from jobs.doctor.findings import Finding, count, fail, lines, to_json
from jobs.doctor.layout import (
    check_borders,
    check_configuration,
    check_fp8,
    check_gpu_memory,
    check_processes,
)
from jobs.doctor.needs import checkpoint_bytes, needs_of
from jobs.doctor.reach import Answer, by_ray, by_srun, here, slurm_master, slurm_nodes
from jobs.doctor.report import NodeReport
from jobs.doctor.versions import check_same_versions
from jobs.recipes import Recipe, find_recipe, usage
from jobs.unchecked import UncheckedRun, unchecked

Group = Literal["data", "disk", "nodes"]


@dataclass(frozen=True, kw_only=True)
class DoctorArguments:
    """Arguments of `flamingo doctor` beside the run's own settings."""

    ray_address: str | None = None
    """Address of a running Ray cluster, or "auto": its nodes are checked. In a SLURM allocation its nodes are, by
    srun; else this machine."""
    master_addr: str = ""
    """Address of the first node; by default what train.sbatch will choose."""
    master_port: int = 0
    """Port of the first node; by default what train.sbatch will choose, and none outside of SLURM."""
    skip: tuple[Group, ...] = ()
    """Groups of checks to leave out: `data` opens every index, `disk` writes to the run folder, `nodes` looks at
    machines."""
    seconds: float = 60.0
    """How long nodes wait for one another."""
    quiet: bool = False
    """Show only what is wrong."""
    json: bool = False
    """Print the findings as JSON."""
    run: Annotated[UncheckedRun, tyro.conf.arg(name="")]
    """The run."""


def doctor(arguments: Sequence[str]) -> int:
    """Check a recipe on this machine or allocation: `flamingo doctor RECIPE [options]`; 1 if it would fail."""
    code = usage("doctor", arguments)
    if code is not None:
        return code
    name, recipe = find_recipe(arguments[0])
    default = DoctorArguments(run=unchecked(recipe.config()))
    given = tyro.cli(
        DoctorArguments, default=default, args=list(arguments[1:]), prog=f"flamingo doctor {name}"
    )
    found, reports = examine_run(recipe, given)
    show(given, found, reports)
    return 1 if any(finding.level == "fail" for finding in found) else 0


def show(given: DoctorArguments, found: list[Finding], reports: list[NodeReport]) -> None:
    """Print the findings."""
    counts = count(found)
    if given.json:
        nodes = [{"node": r.node, "cores": r.cores, "gpus": [vars(gpu) for gpu in r.gpus]} for r in reports]
        whole = {"recipe": given.run.recipe, "ok": not counts["fail"], "counts": counts, "nodes": nodes}
        print(json.dumps(whole | {"findings": to_json(found)}, indent=1))
        return
    shown = [finding for finding in found if not given.quiet or finding.level != "ok"]
    print("\n".join(lines(shown)), flush=True)
    print(f"{counts['ok']} ok, {counts['warn']} warnings, {counts['fail']} failures", flush=True)


def examine_run(recipe: Recipe, given: DoctorArguments) -> tuple[list[Finding], list[NodeReport]]:
    """Make all checks.

    Args:
        recipe: where the run comes from: its data are made first, as `flamingo train` does.
        given: the command line.

    Returns:
        The findings, and what the nodes said.
    """
    run = given.run
    found = check_configuration(run)
    fits = all(finding.level == "ok" for finding in found)
    found += check_borders(run)
    if "data" not in given.skip:
        if recipe.prepare is not None:
            recipe.prepare()
        found += check_data(run)
    if not fits:
        remedy = "correct the configuration first, then ask again"
        found.append(
            fail("machine", "not looked at: what the run needs follows from its configuration", remedy)
        )
        return found, []
    folder = (Path(run.runs_dir) / run.name).resolve()
    can_mark = "disk" not in given.skip
    if can_mark:
        present = bytes_below(folder / "checkpoints")
        of_folder = check_run_folder(folder, checkpoint_bytes(run), run.train.keep_checkpoints, present)
        can_mark = all(finding.check != "run folder" for finding in of_folder)
        found += of_folder
    if "nodes" in given.skip:
        return found, []
    reports, between = ask_nodes(given, folder, can_mark=can_mark)
    own_ray = given.ray_address is None and not slurm_nodes(os.environ)
    found += between + [finding for report in reports for finding in report.findings]
    found += check_skew(reports) + check_same_versions(reports)
    if reports:
        found += check_processes(run, reports, own_ray=own_ray) + check_gpu_memory(run, reports)
        found += check_fp8(run, reports)
    return found, reports


def ask_nodes(given: DoctorArguments, folder: Path, *, can_mark: bool) -> Answer:
    """Have the checks of a node made on every node: in a Ray cluster, in a SLURM allocation, or here.

    Args:
        given: the command line.
        folder: the run folder.
        can_mark: whether a file may be left there for a while, that all nodes have to see.
    """
    slurm, run = slurm_nodes(os.environ), given.run
    master = slurm_master(os.environ) if slurm and not given.ray_address else None
    if given.master_addr or given.master_port:
        address, port = master or ("127.0.0.1", 0)
        master = (given.master_addr or address, given.master_port or port)
    with ExitStack() as stack:
        needs = replace(needs_of(run, max(1, slurm), str(folder)), seconds=given.seconds)
        if (given.ray_address or slurm > 1) and can_mark:
            needs = replace(needs, mark=stack.enter_context(marked(folder)))
        if given.ray_address:
            return by_ray(needs, given.ray_address)
        if slurm:
            assert master is not None, "an allocation has a first node"
            return by_srun(needs, os.environ, master)
        return here(needs, os.environ, master)
