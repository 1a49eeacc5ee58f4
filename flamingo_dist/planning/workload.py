"""What a run is, as far as a plan needs it."""

from dataclasses import dataclass

from flamingo_dist.models.flamingo import FlamingoConfig
from flamingo_dist.parallel.topology import ParallelConfig


@dataclass(frozen=True, kw_only=True)
class DatasetShape:
    """The batch of one data set: every step runs one forward and one backward of each."""

    name: str
    """Name, for messages."""
    rows: int
    """Rows of a global batch."""
    tokens: int
    """T, tokens a row."""
    media: int
    """M, media a row."""
    frames: int
    """F, frames a medium."""
    pixels: bool = True
    """Whether the vision encoder runs; False where features are stored."""
    packed: bool = False
    """Whether a row holds several samples, which do not attend to one another."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A run: network, batches, precision and the settings of its parallelism that are not searched."""

    model: FlamingoConfig
    """The network."""
    datasets: tuple[DatasetShape, ...]
    """Batches of a step."""
    parallel: ParallelConfig
    """ZeRO stage and checkpointing are taken from here; the tensor degree and residency are searched."""
    bytes_per_value: int = 2
    """2 for bf16, 4 for fp32."""

    def parts(self, data: DatasetShape, dp: int) -> list[int]:
        """Return the rows of each forward and backward of a data set's batch on one of `dp` data-parallel ranks."""
        rows = data.rows // dp
        most = self.parallel.micro_rows or max(1, rows)
        return [min(most, rows - start) for start in range(0, rows, most)]

    def tokens_per_step(self) -> int:
        """Return the text tokens of a step over all ranks, padding included."""
        return sum(d.rows * d.tokens for d in self.datasets)
