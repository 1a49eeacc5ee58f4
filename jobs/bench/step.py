"""`flamingo bench step`: forward, backward and optimizer of a whole network, reference against Triton.

Everything in one process without DeepSpeed: what ZeRO moves between GPUs is not what kernels change.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from jobs.bench.contender import LeftOutError
from jobs.bench.networks import (
    BatchConfig,
    build,
    make_batch,
    network_3b,
    one_process,
    smoke_network,
    with_implementation,
)
from jobs.bench.rows import Results, Row, environment
from jobs.bench.timing import Clock
from kernels.config import can_launch

AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest relative difference of the first loss between implementations; beyond it nothing is timed."""


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """A step benchmark."""

    device: torch.device
    """Where."""
    tiny: bool = False
    """The smoke network in fp32 with a handful of tokens, for a machine without a GPU."""
    layers: int = 4
    """Blocks of the 3B-shaped network, a gated block before each."""
    rows: int = 32
    """Samples of the batch."""
    length: int = 256
    """Text tokens of a sample."""
    media: int = 5
    """Images of a sample, 100 features each."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of parameters and activations."""
        return torch.float32 if self.tiny else torch.bfloat16

    @property
    def size(self) -> BatchConfig:
        """Size of the batch."""
        if self.tiny:
            return BatchConfig(rows=1, length=6, media=1)
        return BatchConfig(rows=self.rows, length=self.length, media=self.media, features=100)


def run_step(config: StepConfig) -> Results:
    """Return one row for each implementation, with tokens a second."""
    rows: list[Row] = []
    first: float | None = None
    with one_process(config.device):
        for implementation in ("reference", "triton"):
            blank = _blank(config, implementation)
            try:
                step, loss, peak = _prepare(config, implementation)
            except LeftOutError as reason:
                rows.append(replace(blank, reason=str(reason)))
                continue
            except torch.cuda.OutOfMemoryError:
                rows.append(replace(blank, reason="out of memory: fewer --layers or --rows"))
                continue
            first = loss if first is None else first
            difference = abs(loss - first) / abs(first)
            if not difference <= AGREEMENT[config.dtype]:
                why = f"first loss {loss:.5f}, the reference's {first:.5f}"
                rows.append(replace(blank, status="refused", reason=why, worst_error=difference))
                continue
            rows.append(_timed(replace(blank, worst_error=difference), config, step, peak))
            del step
            if config.device.type == "cuda":
                torch.cuda.empty_cache()
    return Results(environment=environment(config.device), rows=rows)


def _blank(config: StepConfig, implementation: str) -> Row:
    size = config.size
    layers = smoke_network().lm.num_layers if config.tiny else config.layers
    sizes = f"layers={layers} batch={size.rows} rows={size.length} images={size.media}"
    return Row(
        level="step", op="Flamingo", shape="tiny" if config.tiny else f"3B width, {config.layers} blocks",
        sizes=sizes, contender=implementation, ours=implementation == "triton", mode="step",
        dtype=str(config.dtype).removeprefix("torch."), status="left out",
    )  # fmt: skip


def _prepare(config: StepConfig, implementation: str) -> tuple[Any, float, Any]:
    """Return the step as a function of nothing, its first loss, and what tells the peak of memory in MB."""
    from flamingo_dist.training.config import OptimizerConfig
    from flamingo_dist.training.optimizer import make_optimizer

    if implementation == "triton" and not can_launch(torch.empty(1, device=config.device)):
        raise LeftOutError("Triton kernels need CUDA, or a CPU with TRITON_INTERPRET=1 set before the start")
    network = smoke_network() if config.tiny else network_3b(config.layers)
    network = with_implementation(network, implementation, gate_init=0.5)
    model = build(network, config.dtype, config.device, seed=0)
    # The encoder is not part of the comparison: features come ready.
    batch = make_batch(network, config.size, seed=0).to(config.device)
    optimizer = make_optimizer(model.named_parameters(), OptimizerConfig(lr=1e-4))
    targets, tokens = batch.targets(), batch.num_loss_tokens()

    def step() -> torch.Tensor:
        out = model(
            batch.tokens_BT, batch.media_index_BT, batch.media, batch.media_mask_BM, targets_BT=targets
        )
        assert out.nll_BT is not None, "targets were given"
        loss = out.nll_BT.sum() / tokens
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def peak() -> float | None:
        if config.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 1e6

    return step, float(step()), peak


def _timed(row: Row, config: StepConfig, step: Any, peak: Any) -> Row:
    clock = Clock(config.device, budget_ms=5_000.0, min_repeats=3, max_repeats=30)
    if config.tiny:
        clock = Clock(config.device, budget_ms=1.0, min_repeats=2, max_repeats=2)
    times = clock.measure(step)
    tokens = config.size.rows * config.size.length
    return replace(
        row, status="timed", median_ms=times.median, q20_ms=times.low, q80_ms=times.high, repeats=times.repeats,
        clock=times.how, tokens_per_s=tokens / (1e-3 * times.median), peak_mb=peak(),
    )  # fmt: skip


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """Yield what the terminal says about the rows of a step benchmark."""
    for row in rows:
        if row.median_ms is None or row.tokens_per_s is None:
            yield f"{row.contender}: {row.status}: {row.reason}"
        else:
            yield (
                f"{row.contender}: {row.tokens_per_s:,.0f} tokens/s, median {row.median_ms:.1f} ms "
                f"({row.q20_ms:.1f} to {row.q80_ms:.1f}), {row.shape}, {row.sizes}"
            )
