"""What the commands of `flamingo` do."""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from jobs.config import RunConfig
from jobs.driver import LaunchConfig, Phases, run
from jobs.recipes import RECIPES, Recipe, find_recipe


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """Arguments of `flamingo train` beside the run's own settings."""

    ray_address: str | None = None
    """Address of a running Ray cluster, or "auto"; by default Ray is started on this machine for the run. A cluster
    that has fewer CPUs or GPUs than the run asks for is given five minutes to grow."""
    resume: str | None = None
    """Resume: "auto" (newest checkpoint, if any), "latest", a step, or the path of a checkpoint."""
    allow_change: tuple[str, ...] = ()
    """With --resume: settings that may differ from the checkpoint's, such as train.optimizer.lr or
    data.train.NAME.weight."""
    print_config: bool = False
    """Print the resolved configuration as JSON and exit."""
    verbose: bool = False
    """Show the logs of all processes."""
    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    """The run."""


def _recipe(arguments: Sequence[str], command: str) -> tuple[Recipe, list[str]]:
    if not arguments or arguments[0].startswith("-"):
        raise ValueError(
            f"name a recipe: flamingo {command} RECIPE [options]; recipes are {', '.join(RECIPES)}."
        )
    return find_recipe(arguments[0])[1], list(arguments[1:])


def parse_run(recipe: Recipe, arguments: Sequence[str], program: str) -> TrainArguments:
    """Return the recipe's configuration with the command line's overrides.

    An unknown override ends the process with exit code 2 and says which options come close.
    """
    return tyro.cli(
        TrainArguments, default=TrainArguments(run=recipe.config()), args=list(arguments), prog=program
    )


def train(arguments: Sequence[str]) -> int:
    """Train a recipe: `flamingo train RECIPE [options]`."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: flamingo train RECIPE [options]; recipes are {', '.join(RECIPES)}.")
        print("flamingo train RECIPE --help lists every setting of the recipe.")
        return 0
    recipe, rest = _recipe(arguments, "train")
    given = parse_run(recipe, rest, f"flamingo train {arguments[0]}")
    if given.print_config:
        print(json.dumps(given.run.to_json(), indent=1))
        return 0
    if recipe.prepare is not None:
        recipe.prepare()
    return _run(given)


def checkpoint_setting(name: str) -> str:
    """Return what a checkpoint calls the setting `name`, which may be written as on the command line.

    A data set's weight, constant or by schedule, is "weights.NAME" there.
    """
    name = name.removeprefix("--")
    found = re.fullmatch(r"data\.train\.(.+)\.weight([_-]schedule(\.points)?)?", name)
    if found:
        return f"weights.{found[1]}"
    return name if name.startswith("weights.") else name.replace("-", "_")


def _run(given: TrainArguments) -> int:
    launch = LaunchConfig(
        ray_address=given.ray_address,
        resume=given.resume,
        allow_change=tuple(map(checkpoint_setting, given.allow_change)),
        verbose=given.verbose,
    )
    outcome = run(given.run, launch)
    folder = Path(given.run.runs_dir) / given.run.name
    if outcome.status == "stopped":
        print(
            f"stopped at step {outcome.steps}; resume with --resume latest. Run folder: {folder}", flush=True
        )
    else:
        print(f"finished {outcome.steps} steps. Report: {folder / 'report.html'}", flush=True)
    return 0


def demo(arguments: Sequence[str]) -> int:
    """Fetch real data, pack and encode them, train, caption, report: `flamingo demo [options]`."""
    # Fetching comes first: the recipe reads what is there.
    from jobs.demo.corpora import build_corpora
    from jobs.demo.fetch import fetch_parts

    console = Console()
    started = time.monotonic()
    parts = fetch_parts(console=console)
    fetched = time.monotonic()
    build_corpora(parts, console=console)
    packed = time.monotonic()
    given = parse_run(RECIPES["demo"], arguments, "flamingo demo")
    folder = Path(given.run.runs_dir) / given.run.name
    folder.mkdir(parents=True, exist_ok=True)
    phases = Phases(folder)
    phases.add("fetch", fetched - started)
    phases.add("pack", packed - fetched)
    return _run(given)


def generate(arguments: Sequence[str]) -> int:
    """Caption images from a few-shot prompt: `flamingo generate RUN_FOLDER --image FILE [--shot FILE=CAPTION]`."""
    from jobs.generate import GenerateArguments, generate_captions

    given = tyro.cli(GenerateArguments, args=list(arguments), prog="flamingo generate")
    for path, caption in generate_captions(given):
        print(f"{path}: {caption}")
    return 0


def recipes(arguments: Sequence[str]) -> int:
    """List the recipes with the first line of what they are."""
    del arguments
    for name, recipe in RECIPES.items():
        print(f"{name:14} {(recipe.config.__doc__ or '').splitlines()[0]}")
    return 0
