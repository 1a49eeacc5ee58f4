"""The run against itself and against the machine: degrees, batches, processes and memory of a GPU."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

from flamingo_dist.planning.hardware import GPUS, Assumptions, gpu_of
from flamingo_dist.planning.plan import make_plan, rank_memory
from flamingo_dist.planning.seconds import Machine
from flamingo_dist.planning.suggestions import suggestions
from jobs.config import RunConfig
from jobs.doctor.findings import Finding, fail, ok, warn
from jobs.doctor.report import NodeReport
from jobs.plan import workload


def check_configuration(run: RunConfig) -> list[Finding]:
    """Check degrees, sizes and batches against one another; no machine is looked at."""
    world, tensor = run.resources.workers, run.parallel.tensor
    degrees = [t for t in range(1, world + 1) if world % t == 0]
    found = []
    if world % tensor:
        found.append(
            fail(
                "world",
                f"resources.workers={world} is no multiple of parallel.tensor={tensor}",
                f"set --resources.workers to {-(-world // tensor) * tensor}, or --parallel.tensor to one of {degrees}",
            )
        )
    else:
        found.append(ok("world", f"{world} processes = tensor {tensor} x data {world // tensor}"))
    found.append(_check_tensor_sizes(run, degrees))
    if not world % tensor:
        found += _check_batches(run, world // tensor)
    if all(finding.level == "ok" for finding in found):
        # Whatever else a run's configuration refuses.
        fields = {f.name: getattr(run, f.name) for f in dataclasses.fields(RunConfig)}
        found.append(_tried("configuration", lambda: RunConfig(**fields), "consistent"))
    return found


def _tried(check: str, call: Callable[[], object], says: str) -> Finding:
    """Return ok, or what `call` raises as a failure: its message says what is allowed."""
    try:
        with warnings.catch_warnings(action="ignore"):  # they are findings of their own
            call()
    except ValueError as error:
        return fail(check, str(error), "change the setting that the message names")
    return ok(check, says)


def _check_tensor_sizes(run: RunConfig, degrees: list[int]) -> Finding:
    """Check every size that tensor parallelism cuts; a vocabulary of published weights is padded, a random one not."""
    tensor, sizes = run.parallel.tensor, run.model.tensor_sizes()
    if run.model.lm.weights is None:
        sizes["lm.vocab_size (random weights)"] = run.model.lm.vocab_size
    bad = {name: size for name, size in sizes.items() if size % tensor}
    if not bad:
        return ok("tensor parallel", f"{tensor} divides {', '.join(f'{n}={s}' for n, s in sizes.items())}")
    fitting = [t for t in degrees if all(size % t == 0 for size in sizes.values())]
    return fail(
        "tensor parallel",
        f"parallel.tensor={tensor} does not divide {', '.join(f'{n}={s}' for n, s in bad.items())}",
        f"set --parallel.tensor to one of {fitting}, or change these sizes",
    )


def _check_batches(run: RunConfig, data: int) -> list[Finding]:
    """Check that every data set's global batch divides among the data-parallel ranks, in whole rows."""
    found = []
    for name, dataset in {**run.data.train, **run.data.held_out}.items():
        unit = data * dataset.pack
        if dataset.batch_size % unit:
            below = dataset.batch_size // unit * unit
            part = "train" if name in run.data.train else "held_out"
            near = " or ".join(str(size) for size in (below, below + unit) if size)
            found.append(
                fail(
                    f"batch of {name}",
                    f"batch_size={dataset.batch_size} does not divide among {data} data-parallel ranks"
                    + (f" in rows of {dataset.pack}" if dataset.pack > 1 else ""),
                    f"set --data.{part}.{name}.batch-size to {near}",
                )
            )
    return found or [ok("batches", f"all divide among {data} data-parallel ranks")]


def check_borders(run: RunConfig) -> list[Finding]:
    """Compare the colour of borders with what the vision encoder sees as nothing."""
    others = [warn("border colour", border.says, border.remedy) for border in run.other_borders()]
    return others or [ok("border colour", f"the mean of {run.model.vision.name} on all pictures")]


def check_processes(run: RunConfig, nodes: Sequence[NodeReport], *, own_ray: bool) -> list[Finding]:
    """Check that the nodes have the GPUs, or the CPUs, that the training processes need.

    Args:
        run: the run.
        nodes: what the nodes have.
        own_ray: whether the run starts Ray itself: it then gets as many logical CPUs as it asks for.
    """
    found = _check_gpus(run, nodes) if run.resources.use_gpu else []
    resources, readers = run.resources, run.data.readers
    wanted = resources.workers * resources.cpus_per_worker + readers.readers * readers.cpus_per_reader
    cores = sum(node.cores for node in nodes)
    if not own_ray and wanted > cores:
        found.append(
            fail(
                "CPUs",
                f"training processes and readers reserve {wanted:g} CPUs, {_of(nodes)} {cores}: Ray would "
                "wait for the missing ones for ever",
                "lower --resources.cpus-per-worker or --data.readers.readers, or take more nodes",
            )
        )
    elif own_ray and resources.workers * resources.threads_per_worker > cores:
        found.append(
            warn(
                "CPUs",
                f"{resources.workers} training processes of {resources.threads_per_worker} threads share {cores} cores",
                "fine for a smoke run; else lower --resources.workers or --resources.threads-per-worker",
            )
        )
    else:
        found.append(ok("CPUs", f"{wanted:g} of {cores} are reserved"))
    return found


def _of(nodes: Sequence[NodeReport]) -> str:
    return "this node has" if len(nodes) == 1 else f"the {len(nodes)} nodes have"


def _check_gpus(run: RunConfig, nodes: Sequence[NodeReport]) -> list[Finding]:
    """Check the number of GPUs, and that tensor-parallel groups stay inside a node."""
    world, tensor = run.resources.workers, run.parallel.tensor
    there = sum(len(node.gpus) for node in nodes)
    if there < world:
        usable = there // tensor * tensor
        advice = f"--resources.workers {usable}" if usable else "--resources.no-use-gpu for a run on CPUs"
        return [
            fail(
                "GPUs",
                f"the run has {world} training processes, one a GPU; {_of(nodes)} {there} GPUs",
                f"take more nodes, or set {advice}",
            )
        ]
    odd = [node for node in nodes if node.gpus and len(node.gpus) % tensor]
    if odd and tensor > 1:
        most = max(len(node.gpus) for node in nodes)
        return [
            warn(
                "GPUs",
                f"{', '.join(n.node for n in odd)}: {len(odd[0].gpus)} GPUs are no multiple of "
                f"parallel.tensor={tensor}, so a tensor-parallel group may lie across nodes, its sums on the network",
                f"set --parallel.tensor to a divisor of {most}, or take whole nodes",
            )
        ]
    return [ok("GPUs", f"{there} for {world} training processes")]


def check_fp8(run: RunConfig, nodes: Sequence[NodeReport]) -> list[Finding]:
    """Check that GPUs have fp8 matrix units, where the frozen LM is to be multiplied on them."""
    names = sorted({gpu.name for node in nodes for gpu in node.gpus})
    if run.model.lm.matrix_products != "fp8" or not run.resources.use_gpu or not names:
        return []
    sheets = {name: gpu_of(name) for name in names}
    without = [name for name, sheet in sheets.items() if sheet is not None and not sheet.fp8_tflops]
    if not without:
        return [ok("fp8 products", ", ".join(names))]
    return [
        fail(
            "fp8 products",
            f"model.lm.matrix_products=fp8, but {', '.join(without)} has no fp8 matrix units",
            "set --model.lm.matrix-products same, or take H100s or later",
        )
    ]


def check_gpu_memory(run: RunConfig, nodes: Sequence[NodeReport]) -> list[Finding]:
    """Check the planner's peak of one GPU against the smallest GPU there is."""
    memory = [gpu.total_gib for node in nodes for gpu in node.gpus]
    if not run.resources.use_gpu or not memory:
        return []
    work, world, tensor = workload(run), run.resources.workers, run.parallel.tensor
    name = next(gpu.name for node in nodes for gpu in node.gpus)
    kinds, _ = rank_memory(work, Assumptions(), tp=tensor, dp=world // tensor, residency=run.parallel.frozen)
    needed = sum(kinds.values())
    largest = ", ".join(f"{k} {v:.1f}" for k, v in sorted(kinds.items(), key=lambda item: -item[1])[:3])
    says = f"{needed:.1f} GiB a GPU predicted ({largest}), the smallest {name} has {min(memory):.1f} GiB"
    if needed <= min(memory):
        return [ok("GPU memory", says)]
    machine = Machine(
        gpu=replace(gpu_of(name) or GPUS["h100"], memory_gib=min(memory)),
        gpus=world,
        gpus_per_node=max(len(node.gpus) for node in nodes),
        assumptions=Assumptions(),
    )
    fitting = make_plan(work, machine).layouts
    if fitting:
        best = fitting[0]
        advice = f"--parallel.tensor {best.tp} --parallel.frozen {best.residency} would take {best.memory_gib:.1f} GiB"
    else:
        advice = (
            "; or ".join(suggestions(work, machine))
            or "a smaller batch or network: no single change tried fits"
        )
    return [
        fail("GPU memory", says, f"{advice} (flamingo plan {run.recipe} --gpus {world} compares layouts)")
    ]
