"""Weights of data sets that change while a run trains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, kw_only=True)
class WeightSchedule:
    """A lambda by step: straight lines between points, constant before the first and after the last.

    A function of the step alone, so a resumed run goes on with it whatever the layout.
    """

    points: tuple[tuple[int, float], ...] = ()
    """(step, weight), with rising steps; two of the same weight hold it between them. () is no schedule."""

    def __post_init__(self) -> None:
        steps = [-1, *(step for step, _ in self.points)]
        if any(after <= before for before, after in pairwise(steps)):
            raise ValueError(f"points {self.points}: steps must rise and begin at 0 or later")
        if not all(math.isfinite(weight) and weight >= 0 for _, weight in self.points):
            raise ValueError(f"points {self.points}: weights must be finite and not negative")

    def at(self, step: int) -> float:
        """Return the weight of a step.

        Raises:
            ValueError: for no schedule.
        """
        if not self.points:
            raise ValueError("points (): no schedule, so no weight; ask DatasetConfig.weight_at")
        first_step, first = self.points[0]
        if step <= first_step:
            return first
        for (start, low), (stop, high) in pairwise(self.points):
            if step <= stop:
                return low + (high - low) * (step - start) / (stop - start)
        return self.points[-1][1]
