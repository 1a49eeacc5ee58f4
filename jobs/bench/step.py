"""`flamingo bench step`: forward, backward and optimizer of a whole network: reference, Triton, transformers' IDEFICS.

Everything in one process without DeepSpeed: what ZeRO moves between GPUs is not what kernels change.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from flamingo_dist.models.flamingo import Flamingo, FlamingoConfig
from flamingo_dist.models.fp8_product import check_fp8_device
from flamingo_dist.models.linear import quantise_
from flamingo_dist.models.ranges import part
from flamingo_dist.models.recompute import Recompute
from flamingo_dist.parallel.topology import single_process
from flamingo_dist.planning.flops import dataset_flops
from flamingo_dist.planning.workload import DatasetShape
from flamingo_dist.training.batch import TrainBatch
from flamingo_dist.training.config import OptimizerConfig
from flamingo_dist.training.optimizer import make_optimizer
from jobs.bench import idefics
from jobs.bench.contender import LeftOutError
from jobs.bench.networks import (
    IDEFICS,
    BatchConfig,
    build,
    make_batch,
    network,
    nll_sum,
    with_encoder,
    with_implementation,
)
from jobs.bench.profiling import Line, profile_step, write_profile
from jobs.bench.rows import Results, Row, environment
from jobs.bench.timing import Clock, matmul_rate
from jobs.console import first_line
from kernels.config import can_launch

AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest relative difference of the first loss between implementations; beyond it nothing is timed."""
TINY = ("smoke", "smoke-idefics")
"""Networks of a machine without a GPU."""
COMPILED = "frozen blocks compiled"
"""With Triton where it can run, and torch.compile for what is frozen."""
FP8 = "frozen products in fp8"
"""With Triton where it can run, and the frozen LM's matrices multiplied in fp8 (`LMConfig.matrix_products`)."""
FP8_AGREEMENT = 2e-2
"""As `AGREEMENT`, for its first loss: other numbers are multiplied."""
_OURS = ("reference", "triton")


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """A step benchmark."""

    device: torch.device
    """Where."""
    networks: Sequence[str] = ("3b", "3b-idefics")
    """Names of `jobs.bench.networks.NETWORKS`."""
    tiny: bool = False
    """The smoke networks in fp32 with a handful of tokens, for a machine without a GPU."""
    layers: int | None = None
    """Blocks of each network; None for all of 3B and 9B, and of the 80B one group of a gated block."""
    rows: int = 32
    """Samples of the batch."""
    length: int = 256
    """Text tokens of a sample."""
    media: int = 5
    """Images of a sample, 100 features each."""
    pixels: bool = False
    """Images go through the paper's encoder, instead of ready features; not with IDEFICS' networks."""
    recompute: Recompute = False
    """Activation checkpointing of our network; IDEFICS' keeps everything."""
    compiled: bool = False
    """Run a contender with compiled frozen blocks, too."""
    fp8: bool = False
    """Run a contender with the frozen LM's products in fp8, too; with `compiled` also one with both."""
    contenders: Sequence[str] = ()
    """Contenders whose name holds one of these; all if empty. The others must agree with the first that runs."""
    fuse_encoder: bool = False
    """Run the encoder with `parallel.fuse_encoder`; only with `pixels`."""
    profile: Path | None = None
    """Folder for the profile of each of our steps; None makes none."""

    def __post_init__(self) -> None:
        """Reject networks that have no encoder, and settings of one that does not run."""
        if self.fuse_encoder and not self.pixels:
            raise ValueError("--fuse-encoder, but no encoder runs on ready features: add --pixels.")
        without = [name for name in self.networks if name in IDEFICS]
        if self.pixels and not self.tiny and without:
            raise ValueError(
                f"--pixels, but {', '.join(without)} takes ready features: name other --networks."
            )

    @property
    def chosen(self) -> Sequence[str]:
        """Return the names of the networks that run."""
        if not self.tiny:
            return self.networks
        return [name for name in TINY if not (self.pixels and name in IDEFICS)]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of parameters and activations."""
        return torch.float32 if self.tiny else torch.bfloat16

    def size(self, model: FlamingoConfig) -> BatchConfig:
        """Return the size of the batch for a network."""
        if self.tiny:
            features = 0 if self.pixels else model.vision.num_features
            return BatchConfig(rows=1, length=6, media=1, features=features)
        features = 0 if self.pixels else 100
        return BatchConfig(rows=self.rows, length=self.length, media=self.media, features=features)

    def model(self, name: str) -> FlamingoConfig:
        """Return the network `name`, gates open so that what is behind them decides the loss."""
        found = with_implementation(network(name, self.layers), "reference", gate_init=0.5)
        return with_encoder(found) if self.pixels and not self.tiny else found


def run_step(config: StepConfig, after_row: Callable[[Results], None] = lambda _: None) -> Results:
    """Return one row for each network and contender, with tokens a second and useful MFU.

    Args:
        config: what to measure.
        after_row: called with all rows so far after each, so that a time limit from outside costs the last alone.
    """
    clock = Clock(config.device, budget_ms=5_000.0, min_repeats=3, max_repeats=30)
    if config.tiny:
        clock = Clock(config.device, budget_ms=1.0, min_repeats=2, max_repeats=2)
    peak = matmul_rate(clock, config.dtype)
    about = environment(
        config.device,
        matmul_tflop_per_s=peak / 1e12,
        dtype=str(config.dtype).removeprefix("torch."),
    )
    results = Results(environment=about, rows=[])
    lines: list[Line] = []
    with single_process(config.device.type):
        for name in config.chosen:
            for row in _compare(config, name, _contenders(config, name), clock, peak, lines):
                results.rows.append(row)
                after_row(results)
    return results


def _contenders(config: StepConfig, name: str) -> list[str]:
    """Return the names of those that run the network `name`."""
    found = [*_OURS, *((idefics.NAME,) if name in IDEFICS else ())]
    found += [COMPILED] * config.compiled + [FP8] * config.fp8
    found += [f"{COMPILED}, {FP8}"] * (config.compiled and config.fp8)
    return [c for c in found if not config.contenders or any(some in c for some in config.contenders)]


def _compare(
    config: StepConfig, name: str, contenders: Sequence[str], clock: Clock, peak: float, lines: list[Line]
) -> Iterator[Row]:
    """Yield a network's rows; whose first loss is not the first contender's gets no speed. Profiles go into `lines`."""
    first: float | None = None
    for contender in contenders:
        blank = _blank(config, name, contender)
        try:
            step = _Step(config, name, contender)
            loss = float(step())
        except LeftOutError as reason:
            yield replace(blank, reason=str(reason))
            continue
        except torch.cuda.OutOfMemoryError:
            yield replace(blank, reason="out of memory: fewer --layers or --rows")
            continue
        except Exception as error:  # whatever another's classes raise: it is a result, not an end
            yield replace(blank, reason=first_line(error, kind=True))
            continue
        finally:
            _release(config.device)
        first = loss if first is None else first
        difference = abs(loss - first) / abs(first)
        bound = FP8_AGREEMENT if FP8 in contender else AGREEMENT[config.dtype]
        if difference <= bound:
            yield _timed(replace(blank, worst_error=difference), config, step, clock, peak)
            if config.profile is not None and contender != idefics.NAME:
                lines += profile_step(
                    step.fetch_and_run,
                    network=name,
                    contender=contender,
                    device=config.device,
                    folder=config.profile,
                )
                write_profile(lines, config.profile)
        else:
            why = f"first loss {loss:.5f}, the reference's {first:.5f}"
            yield replace(blank, status="refused", reason=why, worst_error=difference)
        del step


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _blank(config: StepConfig, name: str, contender: str) -> Row:
    model = config.model(name)
    size = config.size(model)
    sizes = f"layers={model.lm.num_layers} batch={size.rows} rows={size.length} images={size.media}"
    if config.recompute and contender != idefics.NAME:
        sizes += f" recompute={config.recompute}"
    if config.fuse_encoder:
        sizes += " fused_encoder"
    return Row(
        level="step", op="Flamingo", shape=name, sizes=sizes, contender=contender,
        ours=contender not in ("reference", idefics.NAME),
        mode="step", dtype=str(config.dtype).removeprefix("torch."), status="left out",
    )  # fmt: skip


def update(loss: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """Go backward from a loss, shape [], and update the weights; return it without its graph."""
    loss.backward()
    with part("optimizer"):
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.detach()


class _Step:
    """One optimizer step of a network on a batch that stays; a call returns the loss, 0-dim."""

    def __init__(self, config: StepConfig, name: str, contender: str) -> None:
        launches = can_launch(torch.empty(1, device=config.device))
        if contender == "triton" and not launches:
            raise LeftOutError(
                "Triton kernels need CUDA, or a CPU with TRITON_INTERPRET=1 set before the start"
            )
        self.config = config.model(name)
        if contender in _OURS:
            self.config = with_implementation(self.config, contender, gate_init=0.5)
        elif contender != idefics.NAME and launches:
            self.config = with_implementation(self.config, "triton", gate_init=0.5)
        self.size = config.size(self.config)
        ours = build(
            self.config, config.dtype, config.device, seed=0, recompute=config.recompute, draw_there=True
        )
        if config.fuse_encoder:
            ours.vision.fuse()
        self.network: nn.Module = idefics.IdeficsNetwork(ours) if contender == idefics.NAME else ours
        if FP8 in contender:
            try:
                check_fp8_device(config.device)
            except ValueError as error:
                raise LeftOutError(str(error)) from error
            for module in ours.lm.modules():
                quantise_(module, "fp8", config.device, products="fp8")
        if COMPILED in contender:
            ours.compile_frozen("inductor" if config.device.type == "cuda" else "aot_eager")
        batch = make_batch(self.config, self.size, seed=0)
        if self.size.features:
            batch = replace(batch, media=batch.media.to(config.dtype))
        self.device = config.device
        self.on_host = batch.pinned() if config.device.type == "cuda" else batch
        self.batch: TrainBatch = batch.to(config.device)
        self.targets_BT, self.tokens = self.batch.targets(), batch.num_loss_tokens()
        # The same optimizer on the same numbers of weights; which of them decay costs nothing.
        self.optimizer = make_optimizer(self.network.named_parameters(), OptimizerConfig(lr=1e-4))

    def __call__(self) -> Tensor:
        return update(self._loss_sum() / self.tokens, self.optimizer)

    def fetch_and_run(self) -> Tensor:
        """Copy the batch from the host and run a step on it, as training does."""
        with part("data"):
            self.batch = self.on_host.to(self.device)
        return self()

    def _loss_sum(self) -> Tensor:
        if isinstance(self.network, Flamingo):
            return nll_sum(self.network, self.batch, self.targets_BT)
        total: Tensor = self.network(self.batch, self.targets_BT)
        return total

    def useful_flops(self) -> float:
        """Return the operations that a step needs: forward and backward, nothing computed twice."""
        size = self.size
        shape = DatasetShape(
            name="bench", rows=size.rows, tokens=size.length, media=size.media, frames=1,
            pixels=size.features == 0,
        )  # fmt: skip
        parts = dataset_flops(self.config, shape, checkpointing=False)
        return sum(part.useful for part in parts.values())


def _timed(row: Row, config: StepConfig, step: _Step, clock: Clock, peak: float) -> Row:
    times = clock.measure(step)
    seconds = 1e-3 * times.median
    rate = step.useful_flops() / seconds
    return replace(
        row, status="timed", median_ms=times.median, q20_ms=times.low, q80_ms=times.high, repeats=times.repeats,
        clock=times.how, tokens_per_s=step.size.rows * step.size.length / seconds, tflop_per_s=rate / 1e12,
        useful_mfu=rate / peak, peak_mb=_peak_mb(config.device, step),
    )  # fmt: skip


def _peak_mb(device: torch.device, step: Callable[[], object]) -> float | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 1e6


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """Yield what the terminal says about the rows of a step benchmark."""
    for row in rows:
        if row.median_ms is None or row.tokens_per_s is None:
            yield f"{row.shape}, {row.contender}: {row.status}: {row.reason}"
        else:
            yield (
                f"{row.contender}: {row.tokens_per_s:,.0f} tokens/s, median {row.median_ms:.1f} ms "
                f"({row.q20_ms:.1f} to {row.q80_ms:.1f}), useful MFU {row.useful_mfu:.1%} of the measured "
                f"matrix rate, {row.shape}, {row.sizes}"
            )
