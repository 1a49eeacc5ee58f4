"""`flamingo plan RECIPE`: what a run needs and takes, predicted before it is started."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.table import Table

from flamingo_dist.models.lm_config import WeightStorage
from flamingo_dist.models.recompute import Recompute
from flamingo_dist.planning.hardware import GPUS, Assumptions
from flamingo_dist.planning.picture import draw_plan
from flamingo_dist.planning.plan import Layout, Plan, make_plan, scale_batches
from flamingo_dist.planning.seconds import Machine
from flamingo_dist.planning.suggestions import suggestions
from flamingo_dist.planning.workload import DatasetShape, Workload
from jobs.config import RunConfig
from jobs.recipes import find_recipe, usage
from jobs.tables import table_console
from jobs.unchecked import UncheckedRun, unchecked


@dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """Arguments of `flamingo plan RECIPE` beside the run's own settings.

    All figures are predictions from data sheets; nothing is run.
    """

    gpus: int = 8
    """GPUs in all."""
    gpu: Literal["a100-40", "a100-80", "h100", "h200", "b200"] = "h100"
    """GPU model."""
    gpus_per_node: int = 8
    """GPUs that NVLink joins; tensor-parallel degrees are its divisors."""
    memory_gib: float | None = None
    """Memory of a GPU in GiB, in place of the data sheet's."""
    tokens: float | None = None
    """Text tokens of the whole training, for days and GPU-hours."""
    batch_scale: float = 1.0
    """Factor of all batch sizes."""
    checkpointing: Recompute | None = None
    """Activation checkpointing (True, False or selective), in place of the recipe's."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """ZeRO stage, in place of the recipe's."""
    weight_storage: WeightStorage | None = None
    """What the frozen LM's matrices are kept in, in place of the recipe's."""
    fp8_products: bool = False
    """Multiply them in fp8 (model.lm.matrix_products), and keep them so."""
    assume: Assumptions = field(default_factory=Assumptions)
    """Efficiencies that seconds are computed from."""
    picture: Path | None = None
    """Write stacked bars of memory and time to this file, such as plan.svg."""
    markdown: bool = False
    """Print the layouts as a Markdown table."""
    json: bool = False
    """Print the plan as JSON."""
    run: Annotated[UncheckedRun, tyro.conf.arg(name="")]
    """The run. Its own degrees and number of processes have no say: every layout of the GPUs is tried."""


def workload(run: RunConfig) -> Workload:
    """Return what a plan needs of a run's configuration."""
    datasets = tuple(
        DatasetShape(
            name=d.name,
            rows=d.batch_size // d.pack,
            tokens=d.tokens_per_row,
            media=d.max_media * d.pack,
            frames=d.frames,
            pixels=d.media == "pixels",
            packed=d.pack > 1,
        )
        for d in run.data.train.values()
    )
    return Workload(
        model=run.model,
        datasets=datasets,
        parallel=run.parallel,
        bytes_per_value=run.train.torch_dtype.itemsize,
    )


def plan(arguments: Sequence[str]) -> int:
    """Print the layouts of a recipe on given GPUs; 1 if none fits."""
    code = usage("plan", arguments)
    if code is not None:
        return code
    name, recipe = find_recipe(arguments[0])
    default = PlanArguments(run=unchecked(recipe.config()))
    given = tyro.cli(PlanArguments, default=default, args=list(arguments[1:]), prog=f"flamingo plan {name}")
    work, machine = resolve(workload(given.run), given)
    result = make_plan(work, machine, budget_tokens=given.tokens)
    advice = [] if result.layouts else suggestions(work, machine)
    if given.json:
        print(json.dumps(result.to_json() | {"would_fit": advice}, indent=1))
    elif given.markdown:
        print("\n".join(markdown(result, machine, advice)))
    else:
        show(result, machine, advice, title=f"{name} on {given.gpus} {given.gpu}")
    if given.picture is not None and (result.layouts or result.too_large):
        draw_plan(result.layouts or result.too_large, given.picture, memory_gib=machine.gpu.memory_gib)
    return 0 if result.layouts else 1


def resolve(work: Workload, given: PlanArguments) -> tuple[Workload, Machine]:
    """Apply the command line to a run and return it with its GPUs.

    Raises:
        ValueError: an amount that is not positive, or a scale that leaves a batch which is not whole.
    """
    for name in ("tokens", "memory_gib", "batch_scale"):
        value = getattr(given, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {value:g} means nothing: give a number above 0.")
    scaled = scale_batches(work, given.batch_scale)
    if scaled is None:
        sizes = ", ".join(f"{d.name} {d.rows}" for d in work.datasets)
        raise ValueError(
            f"batch_scale={given.batch_scale:g} leaves batches that are not whole numbers of rows ({sizes})."
        )
    parallel = work.parallel
    if given.checkpointing is not None:
        parallel = replace(parallel, activation_checkpointing=given.checkpointing)
    if given.zero_stage is not None:
        parallel = replace(parallel, zero_stage=given.zero_stage, frozen="resident")
    model = scaled.model
    if given.fp8_products:
        if given.weight_storage not in (None, "fp8"):
            raise ValueError(
                f"--fp8-products keeps matrices in fp8, not in {given.weight_storage}: leave one out."
            )
        model = replace(model, lm=replace(model.lm, weight_storage="fp8", matrix_products="fp8"))
    elif given.weight_storage is not None:
        model = replace(model, lm=replace(model.lm, weight_storage=given.weight_storage))
    gpu = GPUS[given.gpu]
    if given.memory_gib is not None:
        gpu = replace(gpu, memory_gib=given.memory_gib)
    machine = Machine(gpu=gpu, gpus=given.gpus, gpus_per_node=given.gpus_per_node, assumptions=given.assume)
    return replace(scaled, model=model, parallel=parallel), machine


def show(result: Plan, machine: Machine, advice: list[str], *, title: str) -> None:
    """Print the plan as tables."""
    console = table_console()
    left_out = [f"Left out: {reason}" for reason in result.refused]
    if result.layouts:
        console.print(_layout_table(result.layouts, f"{title}: predicted, not measured"))
        console.print(_parts_table(result, result.layouts[0]))
    elif result.too_large:
        console.print(f"{title}: no layout fits in {machine.gpu.memory_gib:.1f} GiB a GPU.", highlight=False)
        console.print(_layout_table(result.too_large, "Too large, smallest first"))
        console.print(
            f"What would fit: {_listed(advice)}." if advice else "No single change tried would fit.",
            highlight=False,
        )
    else:
        left_out = [f"{title}: {_undivided(result, machine, advice)}"]
    for line in left_out:
        console.print(line, highlight=False)


def _listed(advice: list[str]) -> str:
    return "; or ".join(advice)


def _undivided(result: Plan, machine: Machine, advice: list[str]) -> str:
    """Say why no layout can run at all, and what could."""
    reasons = "\n".join(f"- {reason}" for reason in result.refused)
    remedy = (
        f"What would run: {_listed(advice)}." if advice else "No other number of GPUs or batch tried would."
    )
    return (
        f"no layout can run: the run does not divide among {machine.gpus} GPUs, whatever their memory.\n"
        f"{reasons}\n{remedy}"
    )


def markdown(result: Plan, machine: Machine, advice: list[str]) -> list[str]:
    """Return the lines of a Markdown table of the layouts that fit, or else of the too large ones."""
    if not result.layouts and not result.too_large:
        said = _undivided(result, machine, advice)
        return [said[0].upper() + said[1:]]
    lines = ["| TP | DP | frozen weights | GiB a GPU | s a step | tokens/s | useful MFU | HFU |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for x in result.layouts or result.too_large:
        size = f"{x.memory_gib:.1f}" + ("" if x.fits else " (too large)")
        line = f"| {x.tp} | {x.dp} | {x.residency} | {size} | {x.step_seconds:.2f} "
        lines.append(f"{line}| {x.tokens_per_second:,.0f} | {x.useful_mfu:.1%} | {x.hfu:.1%} |")
    if not result.layouts:
        lines += ["", f"No layout fits; what would: {_listed(advice) or 'no single change tried'}."]
    return lines


def _layout_table(layouts: list[Layout], title: str) -> Table:
    table = Table(title=title)
    columns = ["TP", "DP", "frozen", "GiB", "s/step", "tokens/s", "useful MFU", "HFU", "sent GB NVLink"]
    columns += ["network", "days", "GPU-hours"]
    for column in columns:
        table.add_column(column, justify="right")
    for x in layouts:
        nvlink, network = (sum(kind[link] for kind in x.traffic.values()) for link in ("nvlink", "network"))
        row = [str(x.tp), str(x.dp), x.residency, f"{x.memory_gib:.1f}", f"{x.step_seconds:.2f}"]
        row += [f"{x.tokens_per_second:,.0f}", f"{x.useful_mfu:.1%}", f"{x.hfu:.1%}"]
        row += [f"{nvlink:.1f}", f"{network:.1f}"]
        row += ["" if x.days is None else f"{x.days:.1f}"]
        row += ["" if x.gpu_hours is None else f"{x.gpu_hours:,.0f}"]
        table.add_row(*row)
    return table


def _parts_table(result: Plan, best: Layout) -> Table:
    """Return the breakdown of the best layout: memory, time and operations side by side."""
    table = Table(title=f"Best layout: TP {best.tp} x DP {best.dp}, {best.residency}")
    for column in ("memory", "GiB", "time", "s", "operations of a step", "PFLOP fwd / bwd / again"):
        table.add_column(column)
    memory, seconds = list(best.memory.items()), list(best.seconds.items())
    flops = [(k, " / ".join(f"{v / 1e15:.2f}" for v in p.values())) for k, p in result.flops.items()]
    for i in range(max(len(memory), len(seconds), len(flops))):
        row = [*_cells(memory, i), *_cells(seconds, i)]
        row += list(flops[i]) if i < len(flops) else ["", ""]
        table.add_row(*row)
    return table


def _cells(items: list[tuple[str, float]], i: int) -> list[str]:
    return [items[i][0], f"{items[i][1]:.3f}"] if i < len(items) else ["", ""]
