"""Named runs: plain functions that return a whole run configuration, and what their data need before."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jobs.config import RunConfig
from jobs.recipes.demo import demo
from jobs.recipes.large import flamingo_3b, flamingo_9b, flamingo_80b
from jobs.recipes.public import (
    gpt2_1b,
    llama_1b,
    llama_7b,
    llama_70b,
    mpt_1b,
    mpt_7b,
    opt_1b,
    qwen_1b,
    qwen_7b,
    qwen_70b,
)
from jobs.recipes.smoke import prepare_smoke, smoke


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named run."""

    config: Callable[[], RunConfig]
    """Returns the run's configuration; overrides are applied to it."""
    prepare: Callable[[], None] | None = None
    """Makes the data that `config` names; None where they must be there."""


RECIPES = {
    "smoke": Recipe(config=smoke, prepare=prepare_smoke),
    "demo": Recipe(config=demo),
    "flamingo_3b": Recipe(config=flamingo_3b),
    "flamingo_9b": Recipe(config=flamingo_9b),
    "flamingo_80b": Recipe(config=flamingo_80b),
    "llama_1b": Recipe(config=llama_1b),
    "llama_7b": Recipe(config=llama_7b),
    "llama_70b": Recipe(config=llama_70b),
    "qwen_1b": Recipe(config=qwen_1b),
    "qwen_7b": Recipe(config=qwen_7b),
    "qwen_70b": Recipe(config=qwen_70b),
    "mpt_1b": Recipe(config=mpt_1b),
    "mpt_7b": Recipe(config=mpt_7b),
    "opt_1b": Recipe(config=opt_1b),
    "gpt2_1b": Recipe(config=gpt2_1b),
}


def find_recipe(given: str) -> tuple[str, Recipe]:
    """Return name and recipe of what a command line calls `given`, dashes or underscores.

    Raises:
        ValueError: there is none of that name.
    """
    name = given.replace("-", "_")
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {given!r}; recipes are {', '.join(RECIPES)}.")
    return name, RECIPES[name]


def usage(command: str, arguments: Sequence[str]) -> int | None:
    """Say how a command is used where its first argument is no recipe; return its exit code, None if it is to go on.

    Args:
        command: of `flamingo`, which takes a recipe and then options.
        arguments: what follows it.
    """
    if arguments and not arguments[0].startswith("-"):
        return None
    line = f"usage: flamingo {command} RECIPE [options]; recipes are {', '.join(RECIPES)}."
    if arguments and arguments[0] in ("-h", "--help"):
        print(line)
        return 0
    if arguments:
        line = f"flamingo {command}: {arguments[0]!r} stands where the recipe has to be; options follow it.\n{line}"
    print(line, file=sys.stderr)
    return 2
