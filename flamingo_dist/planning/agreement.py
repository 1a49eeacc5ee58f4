"""A dry run beside the planner's figures: bytes held and bytes sent, by kind."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flamingo_dist.planning.collectives import by_purpose
from flamingo_dist.planning.dry_run import Followed
from flamingo_dist.planning.hardware import GIB, Assumptions
from flamingo_dist.planning.plan import rank_memory
from flamingo_dist.planning.traffic import step_traffic
from flamingo_dist.planning.workload import Workload

TOLERANCE = 0.10
"""Share by which a planned total may differ from a dry run's."""
TRANSIENT = ("logits", "vision_work", "backward", "update")
"""Kinds of a ledger that the planner counts as `transient`: they follow one another."""
UNPLANNED = ("control",)
"""Purposes that the planner leaves out."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One figure of a dry run and of a plan, bytes."""

    dry: float
    """Of the dry run."""
    planned: float
    """Of the planner."""

    @property
    def off(self) -> float:
        """By what share of the dry run's figure the plan differs; 0 where both are 0."""
        if self.dry == self.planned:
            return 0.0
        return (self.planned - self.dry) / self.dry if self.dry else float("inf")


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """A dry run and a plan side by side."""

    memory: dict[str, Pair]
    """Bytes of one rank at its peak, by kind."""
    traffic: dict[str, Pair]
    """Bytes that one rank sends in a step, by purpose."""
    totals: dict[str, Pair]
    """Sums: "memory", and "tensor" and "data" for the groups that traffic runs in."""

    def disagreements(self) -> list[str]:
        """Return the totals that differ by more than `TOLERANCE`, in words."""
        return [
            f"{name}: planned {pair.planned:,.0f} bytes, dry run {pair.dry:,.0f} ({pair.off:+.1%})"
            for name, pair in self.totals.items()
            if abs(pair.off) > TOLERANCE
        ]


def compare(followed: Followed, work: Workload, *, tp: int, dp: int) -> Agreement:
    """Set what a rank held and sent beside what the planner says.

    Args:
        followed: from a dry run or a real one.
        work: the run.
        tp: tensor-parallel degree.
        dp: data-parallel degree.
    """
    held = _as_planned(followed.peak)
    nothing = Assumptions(reserve_gib=0.0, fragmentation=0.0)
    residency = work.parallel.frozen
    planned, _ = rank_memory(work, nothing, tp=tp, dp=dp, residency=residency)
    planned = {kind: size * GIB for kind, size in planned.items() if kind != "reserve"}
    memory = _pairs(held, planned)
    sent = {k: v.wire_bytes for k, v in by_purpose(followed.sent).items() if k not in UNPLANNED}
    kinds = step_traffic(work, tp=tp, dp=dp, residency=residency)
    traffic = _pairs(sent, {kind: t.wire_bytes for kind, t in kinds.items()})
    totals = {"memory": _sum(memory.values())}
    for group in ("tensor", "data"):
        totals[group] = _sum(
            p for kind, p in traffic.items() if (kind.startswith("tensor")) == (group == "tensor")
        )
    return Agreement(memory=memory, traffic=traffic, totals=totals)


def _as_planned(peak: Mapping[str, int]) -> dict[str, float]:
    """Return a ledger's peak under the planner's kinds."""
    held = {kind: float(size) for kind, size in peak.items() if kind not in TRANSIENT}
    held["transient"] = float(sum(peak.get(kind, 0) for kind in TRANSIENT))
    return held


def _pairs(dry: Mapping[str, float], planned: Mapping[str, float]) -> dict[str, Pair]:
    names = dict.fromkeys((*planned, *dry))
    pairs = {name: Pair(dry=dry.get(name, 0.0), planned=planned.get(name, 0.0)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair.dry or pair.planned}


def _sum(pairs: Iterable[Pair]) -> Pair:
    listed = list(pairs)
    return Pair(dry=sum(p.dry for p in listed), planned=sum(p.planned for p in listed))
