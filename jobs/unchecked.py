"""A run whose parts may contradict one another, for commands that say more about it than its first contradiction."""

import dataclasses
from dataclasses import dataclass

from jobs.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class UncheckedRun(RunConfig):
    """A run whose parts may contradict one another: the doctor lists all contradictions, the plan tries all layouts."""

    def __post_init__(self) -> None:
        """Check nothing."""


def unchecked(run: RunConfig) -> UncheckedRun:
    """Return the same run, to be overridden without being refused."""
    return UncheckedRun(**{f.name: getattr(run, f.name) for f in dataclasses.fields(run)})
