"""What a node is asked, and what it answers: plain values, because they travel as JSON through srun and Ray."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field

from jobs.doctor.findings import Finding


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a run asks of every node."""

    nodes: int = 1
    """Nodes of the run."""
    processes: int
    """Training processes of a node, rounded up."""
    threads: int
    """Threads of a training process."""
    use_gpu: bool
    """Whether the processes compute on GPUs and speak through NCCL."""
    host_bytes: int
    """Host memory that the run's processes of a node need."""
    object_bytes: int
    """Batches that wait in Ray's object store of a node."""
    run_dir: str
    """Run folder."""
    mark: str = ""
    """Text of the file in the run folder that every node has to see; "" where there is one node."""
    paths: tuple[str, ...] = ()
    """Local files and folders that every node reads."""
    caches: dict[str, int] = field(default_factory=dict)
    """Folders on a node's own disk that data sets cache in, and how many bytes each may grow to."""
    meeting: tuple[str, int] | None = None
    """Address and port where the nodes meet; None where there is one node."""
    seconds: float = 60.0
    """How long a node waits for the others."""

    def to_json(self) -> str:
        """Return the needs as JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Needs:
        """Read what `to_json` wrote."""
        values = json.loads(text)
        meeting = values.pop("meeting")
        paths = tuple(values.pop("paths"))
        return cls(**values, paths=paths, meeting=None if meeting is None else (meeting[0], meeting[1]))


@dataclass(frozen=True, kw_only=True)
class GPUFacts:
    """One GPU that this node's processes may use."""

    name: str
    total_gib: float
    free_gib: float


@dataclass(frozen=True, kw_only=True)
class Clock:
    """A node's clock against that of the node where the others meet."""

    ahead: float
    """Seconds that it is ahead."""
    error: float
    """Half of the time that the question and the answer took: the offset is no better known."""


@dataclass(frozen=True, kw_only=True)
class NodeReport:
    """What a node says of itself."""

    node: str
    """Its name: SLURM's or the host's."""
    host: str
    """The machine's own name; nodes of a test may share one."""
    cores: int
    """Logical CPUs that Ray offers, or would offer, here."""
    gpus: tuple[GPUFacts, ...] = ()
    """GPUs that a process may use here."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the packages that have to be the same everywhere."""
    clock: Clock | None = None
    """Its clock against the meeting node's; None on that node itself, or where it was not reached."""
    findings: tuple[Finding, ...] = ()
    """Outcomes of the checks that it made."""

    def to_json(self) -> str:
        """Return the report as JSON on one line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> NodeReport:
        """Read what `to_json` wrote."""
        values = json.loads(text)
        clock = values.pop("clock")
        return cls(
            **{name: values[name] for name in ("node", "host", "cores", "versions")},
            gpus=tuple(GPUFacts(**gpu) for gpu in values["gpus"]),
            clock=None if clock is None else Clock(**clock),
            findings=tuple(Finding(**finding) for finding in values["findings"]),
        )
