"""What the doctor says: one finding a line, and what to do about it."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Level = Literal["ok", "warn", "fail"]
"""`warn` runs, but slower, less safely or otherwise than one may think; `fail` does not run to its end."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The outcome of one check on one node."""

    check: str
    """What was looked at, such as "master port"."""
    level: Level
    """How it is."""
    says: str
    """What was found, and what is wanted."""
    remedy: str = ""
    """What to do; never empty where something is wrong."""
    node: str = ""
    """Node that it was found on; "" for what concerns the run as a whole."""

    def __post_init__(self) -> None:
        """Hold the doctor to its promise."""
        assert self.level in get_args(Level), f"level {self.level!r} is none of {get_args(Level)}"
        assert (self.level == "ok") != bool(self.remedy), (
            f"{self.check}: a remedy for what is wrong, else none"
        )


def ok(check: str, says: str) -> Finding:
    """Return a finding that all is well."""
    return Finding(check=check, level="ok", says=says)


def warn(check: str, says: str, remedy: str) -> Finding:
    """Return a finding that the run survives."""
    return Finding(check=check, level="warn", says=says, remedy=remedy)


def fail(check: str, says: str, remedy: str) -> Finding:
    """Return a finding that the run does not survive."""
    return Finding(check=check, level="fail", says=says, remedy=remedy)


def count(findings: Iterable[Finding]) -> dict[str, int]:
    """Return how many findings there are of each level."""
    levels = [finding.level for finding in findings]
    return {level: levels.count(level) for level in get_args(Level)}


def to_json(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """Return the findings as plain values."""
    return [asdict(finding) for finding in findings]


def lines(findings: Iterable[Finding]) -> list[str]:
    """Return one line a finding; nodes that say the same share a line."""
    nodes: dict[tuple[str, str, str, str], list[str]] = {}
    for each in findings:
        nodes.setdefault((each.level, each.check, each.says, each.remedy), []).append(each.node)
    written = []
    for (level, check, says, remedy), where in nodes.items():
        named = sorted({node for node in where if node})
        place = f" [{', '.join(named)}]" if named else ""
        written.append(f"{level:4}  {check}{place}: {says}" + (f" -> {remedy}" if remedy else ""))
    return written
