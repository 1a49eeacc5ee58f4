"""Named runs: plain functions that return a whole run configuration, and what their data need before."""

from collections.abc import Callable
from dataclasses import dataclass

from jobs.config import RunConfig
from jobs.recipes.demo import demo
from jobs.recipes.large import flamingo_3b, flamingo_9b, flamingo_80b
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
}
