"""The command `flamingo bench`, also `python -m jobs.bench`.

With argparse, unlike the other commands: a machine that is only there to measure has no tyro.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch

from jobs.bench import layers, page, roofline, rows, sweep
from jobs.bench.checking import red_ops
from jobs.bench.plot import write_plot
from jobs.bench.shapes import OPS

NETWORKS = ("3b", "9b", "80b-tp8", "3b-idefics", "9b-idefics")
"""Of `jobs.bench.networks`, which needs megatron-core; a test compares them."""
RECOMPUTE: dict[str, "bool | Literal['selective']"] = {"none": False, "selective": "selective", "all": True}
"""Activation checkpointing by its name here."""
LEVELS = (*sweep.LEVELS, "step")
NO_GPU = "No CUDA device here, so nothing is timed. Roofline (arithmetic from shapes, ceilings of an H100):"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `flamingo bench`; 0 done, 1 numbers are wrong, 2 wrong usage."""
    given = _parser().parse_args(arguments)
    try:
        code: int = given.run(given)
    except (ValueError, FileNotFoundError) as error:
        print(f"flamingo bench: {error}", file=sys.stderr)
        return 2
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flamingo bench", description="Benchmarks of the kernels: docs/benchmarks.md."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    kernels = _command(commands, "kernels", _kernels, "operations and layers against baselines")
    kernels.add_argument(
        "--budget-seconds", type=float, help="begin no shape after so long; default: no limit"
    )
    kernels.add_argument("--ops", nargs="+", choices=OPS, default=OPS, help="operations; default: all")
    kernels.add_argument("--levels", nargs="+", choices=LEVELS, default=LEVELS, help="default: all")
    kernels.add_argument(
        "--shapes", nargs="+", default=(), metavar="PART", help="shapes whose name holds a part"
    )
    kernels.add_argument("--contenders", nargs="+", default=(), metavar="PART", help="baselines, likewise")
    kernels.add_argument(
        "--tests", type=Path, help="JUnit file of the kernels' tests: red kernels get no speed"
    )
    kernels.add_argument("--page", type=Path, help="write the page here too (default: OUT/kernels.md)")
    step = _command(commands, "step", _step, "tokens/s of a whole training step")
    step.add_argument(
        "--networks", nargs="+", choices=NETWORKS, default=("3b", "3b-idefics"), help="default: 3b 3b-idefics"
    )
    step.add_argument(
        "--layers", type=int, help="blocks of a network; default: all of 3b and 9b, of 80b-tp8 one group of 7"
    )
    step.add_argument("--rows", type=int, default=32, help="samples of the batch; default: 32")
    step.add_argument("--length", type=int, default=256, help="text tokens of a sample; default: 256")
    step.add_argument("--media", type=int, default=5, help="images of a sample; default: 5")
    step.add_argument("--compiled", action="store_true", help="also with the frozen blocks compiled")
    step.add_argument(
        "--fp8", action="store_true", help="also with the frozen LM multiplied in fp8 (Hopper and later)"
    )
    step.add_argument(
        "--recompute",
        choices=RECOMPUTE,
        default="none",
        help="activation checkpointing of ours; default: none",
    )
    step.add_argument(
        "--contenders", nargs="+", default=(), metavar="PART", help="contenders whose name holds a part"
    )
    step.add_argument("--pixels", action="store_true", help="pixels through the encoder, not ready features")
    step.add_argument(
        "--fuse-encoder", action="store_true", help="with parallel.fuse_encoder; wants --pixels"
    )
    step.add_argument(
        "--profile", action="store_true", help="our steps by part and operator, into OUT/profile"
    )
    losses = _command(commands, "losses", _losses, "short training run against the CPU's references")
    losses.add_argument("--steps", type=int, default=5, help="default: 5")
    written = commands.add_parser("page", help="write the page from results")
    written.set_defaults(run=_page)
    written.add_argument(
        "results", nargs="*", type=Path, help="JSON files; none for the page without figures"
    )
    written.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"), help="where to")
    return parser


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace], int],
    says: str,
) -> argparse.ArgumentParser:
    """Add a command with the options that all that measure share."""
    parser = commands.add_parser(name, help=says)
    parser.set_defaults(run=run)
    parser.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: cuda if any"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="tiny shapes in fp32, to test the benchmark itself"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the results")
    return parser


def _device(given: argparse.Namespace) -> torch.device | None:
    """Return the device to run on; None where there is no GPU and nobody asked for the CPU.

    Raises:
        ValueError: a CPU without tiny shapes, or CUDA where there is none.
    """
    if given.device == "cpu":
        if not given.tiny:
            raise ValueError("--device cpu is for testing the benchmark: give --tiny with it.")
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if given.device == "cuda":
        raise ValueError("--device cuda, but torch sees no CUDA device.")
    return None


def _kernels(given: argparse.Namespace) -> int:
    device = _device(given)
    if device is None:
        print(NO_GPU)
        print(roofline.table())
        return 0
    config = sweep.SweepConfig(
        device=device,
        tiny=given.tiny,
        budget_seconds=given.budget_seconds,
        ops=given.ops,
        levels=[level for level in sweep.LEVELS if level in given.levels],
        contenders=given.contenders,
        shapes=given.shapes,
        red=red_ops(given.tests) if given.tests else {},
    )
    for op, why in config.red.items():
        print(f"{op}: no speed for our kernel: {why}", flush=True)

    def after_task(results: rows.Results, line: str) -> None:
        # Written each time: a time limit from outside then costs the last shape alone.
        rows.write(results, given.out, "kernels")
        print(line, flush=True)

    results = sweep.run(config, after_task)
    if "step" in given.levels:
        _add_step(results, config)
    table = rows.write(results, given.out, "kernels")
    text = page.write_page(results)
    for path in filter(None, (given.out / "kernels.md", given.page)):
        path.write_text(text, encoding="utf-8")
    drawn = write_plot(results, given.out / "kernels.png")
    refused = sorted({f"{r.contender} ({r.op})" for r in results.rows if r.ours and r.status == "refused"})
    left = results.environment["not_reached"]
    print(f"{len(results.rows)} rows in {table}{'' if drawn else ', no picture'}; {left} shapes not reached")
    if refused:
        print(f"NO SPEED, numbers or tests are red: {', '.join(refused)}")
    return 1 if refused else 0


def _add_step(results: rows.Results, config: sweep.SweepConfig) -> None:
    """Run a whole training step after a sweep that its budget did not cut off."""
    missing = "the budget is spent" if results.environment["not_reached"] else layers.missing()
    if missing:
        print(f"step: left out: {missing}")
        return
    from jobs.bench.step import StepConfig, lines, run_step

    found = run_step(StepConfig(device=config.device, tiny=config.tiny))
    for line in lines(found.rows):
        print(f"step: {line}", flush=True)
    results.rows.extend(found.rows)


def _step(given: argparse.Namespace) -> int:
    device = _device(given)
    if device is None:
        print("No CUDA device here, so no step is timed.")
        return 0
    _need_megatron()
    from jobs.bench.step import StepConfig, lines, run_step

    config = StepConfig(
        device=device,
        networks=given.networks,
        tiny=given.tiny,
        layers=given.layers,
        rows=given.rows,
        length=given.length,
        media=given.media,
        pixels=given.pixels,
        recompute=RECOMPUTE[given.recompute],
        compiled=given.compiled,
        fp8=given.fp8,
        contenders=given.contenders,
        fuse_encoder=given.fuse_encoder,
        profile=given.out if given.profile else None,
    )
    path = given.out / ("step-pixels.json" if given.pixels else "step.json")

    def after_row(results: rows.Results) -> None:
        rows.write_json(results, path)
        for line in lines(results.rows[-1:]):
            print(line, flush=True)

    results = run_step(config, after_row)
    return 1 if any(row.status == "refused" for row in results.rows) else 0


def _losses(given: argparse.Namespace) -> int:
    device = _device(given)
    if device is None:
        print("No CUDA device here, so there is no run to compare.")
        return 0
    _need_megatron()
    from jobs.bench.losses import LossesConfig, run_losses

    found = run_losses(LossesConfig(device=device, tiny=given.tiny, steps=given.steps))
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "losses.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, worst in found["engine"].items():
        print(f"training engine, {name}: losses within {worst['loss']:.1e}, norms within {worst['norm']:.1e}")
    if found["engine_left_out"]:
        print(f"training engine: left out: {found['engine_left_out']}")
    print(
        f"{len(found['steps'])} steps in fp32, losses differ by at most {found['worst_loss_difference']:.1e} "
        f"(allowed {found['loss_tolerance']:.0e}), gradient norms by {found['worst_norm_difference']:.1e} "
        f"(allowed {found['norm_tolerance']:.0e}): {'agree' if found['agree'] else 'DO NOT AGREE'}"
    )
    return 0 if found["agree"] else 1


def _need_megatron() -> None:
    """Raise `ValueError` where whole networks cannot be built."""
    why = layers.missing()
    if why:
        raise ValueError(f"{why}: install megatron-core 0.16.1, or put its unpacked wheel on PYTHONPATH.")


def _page(given: argparse.Namespace) -> int:
    results = rows.read(given.results) if given.results else None
    if results is not None and not results.measured:
        raise ValueError("these results come from a machine without a GPU: they are no figures to publish.")
    given.page.write_text(page.write_page(results), encoding="utf-8")
    print(given.page)
    return 0
