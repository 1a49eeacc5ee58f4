"""`flamingo dryrun RECIPE`: build and step one rank of a run of any size on this machine, with fake tensors."""

import json
import logging
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import tyro
from rich.table import Table

from flamingo_dist.parallel.topology import Topology
from flamingo_dist.planning.agreement import Agreement, Pair, compare
from flamingo_dist.planning.collectives import Collective, Volume
from flamingo_dist.planning.dry_run import Followed, dry_run
from flamingo_dist.planning.hardware import GIB
from jobs.config import RunConfig
from jobs.plan import workload
from jobs.recipes import find_recipe, usage
from jobs.tables import table_console


@dataclass(frozen=True, kw_only=True)
class DryRunArguments:
    """Arguments of `flamingo dryrun RECIPE` beside the run's own settings."""

    world: int | None = None
    """Processes in all, in place of the recipe's `resources.workers`."""
    tp: int | None = None
    """Tensor-parallel degree, in place of the recipe's `parallel.tensor`."""
    rank: int = 0
    """The rank that is run."""
    json: bool = False
    """Print the figures as JSON."""
    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    """The run."""


def dryrun(arguments: Sequence[str]) -> int:
    """Run one rank dry and print what it holds and sends; 1 if the planner is off by more than a tenth."""
    code = usage("dryrun", arguments)
    if code is not None:
        return code
    name, recipe = find_recipe(arguments[0])
    default = DryRunArguments(run=recipe.config())
    given = tyro.cli(
        DryRunArguments, default=default, args=list(arguments[1:]), prog=f"flamingo dryrun {name}"
    )
    run, topology = resolve(given)
    work = workload(run)
    _hush()
    started = time.perf_counter()
    with redirect_stdout(sys.stderr):  # DeepSpeed prints
        followed = dry_run(work, run.train, topology)
    seconds = time.perf_counter() - started
    agreement = compare(followed, work, tp=topology.tensor, dp=topology.data)
    if given.json:
        print(json.dumps(as_json(run, topology, followed, agreement, seconds), indent=1))
    else:
        _show(run, topology, followed, agreement, seconds)
    return 1 if agreement.disagreements() else 0


def resolve(given: DryRunArguments) -> tuple[RunConfig, Topology]:
    """Apply `--world` and `--tp` to the run.

    Raises:
        ValueError: degrees that do not fit the run, or a rank that the world does not have.
    """
    run = given.run
    world = run.resources.workers if given.world is None else given.world
    tensor = run.parallel.tensor if given.tp is None else given.tp
    if not 0 <= given.rank < world:
        raise ValueError(f"--rank {given.rank} is not in a world of {world}; give one from 0 to {world - 1}.")
    run = replace(
        run,
        resources=replace(run.resources, workers=world),
        parallel=replace(run.parallel, tensor=tensor),
    )
    return run, Topology(world=world, rank=given.rank, tensor=tensor)


def as_json(
    run: RunConfig, topology: Topology, followed: Followed, agreement: Agreement, seconds: float
) -> dict[str, Any]:
    """Return the figures as plain data; bytes throughout."""
    return {
        "recipe": run.recipe,
        "world": topology.world,
        "tp": topology.tensor,
        "dp": topology.data,
        "rank": topology.rank,
        "zero_stage": run.parallel.zero_stage,
        "residency": run.parallel.frozen,
        "peak_bytes": sum(followed.peak.values()),
        "peak": followed.peak,
        "between_steps": followed.standing,
        "build_peak_bytes": followed.build_peak,
        "collectives": [asdict(kind) | asdict(volume) for kind, volume in _ordered(followed)],
        "planner": {
            part: {name: asdict(pair) | {"off": pair.off} for name, pair in getattr(agreement, part).items()}
            for part in ("memory", "traffic", "totals")
        },
        "disagreements": agreement.disagreements(),
        "seconds": seconds,
    }


def _ordered(followed: Followed) -> list[tuple[Collective, Volume]]:
    return sorted(followed.sent.items(), key=lambda item: (item[0].group, -item[1].wire_bytes))


def _hush() -> None:
    """Keep torch's and DeepSpeed's notices out of the figures."""
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def _show(
    run: RunConfig, topology: Topology, followed: Followed, agreement: Agreement, seconds: float
) -> None:
    console = table_console()
    peak = agreement.totals["memory"].dry
    unit, name = (GIB, "GiB") if peak > GIB else (1 << 20, "MiB")
    layout = (
        f"TP {topology.tensor} x DP {topology.data}, ZeRO {run.parallel.zero_stage}, {run.parallel.frozen}"
    )
    title = f"{run.recipe}, rank {topology.rank} of {topology.world} ({layout}): run dry, nothing measured"
    memory = _pairs_table(f"{title}\n{name} at the peak of a step", agreement.memory, unit)
    _row(memory, "sum", agreement.totals["memory"], unit)
    console.print(memory)
    console.print(_pairs_table("GB that the rank sends in a step", agreement.traffic, 1e9))
    console.print(_collectives_table(followed))
    for line in agreement.disagreements():
        console.print(f"The planner is off by more than a tenth: {line}", highlight=False)
    console.print(f"Took {seconds:.0f} s here; building peaked at {followed.build_peak / GIB:.2f} GiB.")


def _pairs_table(title: str, pairs: dict[str, Pair], unit: float) -> Table:
    table = Table(title=title)
    for column in ("kind", "dry run", "planner", "planner off by"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for name, pair in pairs.items():
        _row(table, name, pair, unit)
    return table


def _row(table: Table, name: str, pair: Pair, unit: float) -> None:
    off = f"{pair.off:+.1%}" if pair.dry else "-"
    table.add_row(name, f"{pair.dry / unit:.3f}", f"{pair.planned / unit:.3f}", off)


def _collectives_table(followed: Followed) -> Table:
    table = Table(title="Collectives of a step")
    for column in ("group", "ranks", "operation", "for", "dtype", "calls", "GB whole", "GB sent"):
        table.add_column(column, justify="right" if column in ("ranks", "calls") else "left")
    for kind, volume in _ordered(followed):
        row = [kind.group, str(kind.ranks), kind.operation, kind.purpose, kind.dtype, f"{volume.calls:.0f}"]
        table.add_row(*row, f"{volume.payload_bytes / 1e9:.3f}", f"{volume.wire_bytes / 1e9:.3f}")
    return table
