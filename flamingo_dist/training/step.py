"""One optimizer step over several data sets.

One backward per data set, or per part of its rows, weighted by lambda, one clip, one update: equal to the gradient
of the summed loss in every ZeRO stage. Stages 1 and 2 of DeepSpeed drop all gradients but the last unless told which
backward closes the step, so the boundary is set by hand.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flamingo_dist.models.init import tag_of
from flamingo_dist.models.ranges import part
from flamingo_dist.parallel.topology import MegatronMPU, ParallelConfig, Topology
from flamingo_dist.parallel.zero import is_plain
from flamingo_dist.training.batch import TrainBatch
from flamingo_dist.training.config import TrainConfig
from flamingo_dist.training.optimizer import set_lr


class TrainingDivergedError(RuntimeError):
    """Too many steps in a row had a non-finite loss or gradient."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did, equal on all ranks."""

    step: int
    """Number of the step, from 0."""
    loss: Mapping[str, float]
    """Mean loss per loss token by data set, nats."""
    loss_tokens: Mapping[str, int]
    """Tokens that carried loss, by data set, over all ranks."""
    media: Mapping[str, int]
    """Media that the batches held, by data set, over all data-parallel ranks."""
    tokens: int
    """Text tokens, padding left out, over all data sets and ranks."""
    grad_norm: float
    """Global gradient norm before the clip; NaN or inf where the step was skipped."""
    lr: float
    """Learning rate."""
    applied: bool
    """False where the update was skipped, by all ranks together."""
    stop_requested: bool
    """Whether any rank asked for a stop before this step."""
    bad_samples: int = 0
    """Bad samples in the batches of all data-parallel ranks."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Lambda of each data set at this step."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds by part: forward_backward, optimizer."""


class TrainStep:
    """Runs steps on a DeepSpeed engine."""

    def __init__(
        self,
        engine: Any,
        config: TrainConfig,
        topology: Topology,
        weights: Mapping[str, float | Callable[[int], float]],
        parallel: ParallelConfig,
    ) -> None:
        """Prepare.

        Args:
            engine: the DeepSpeed engine around `Flamingo`.
            config: training settings.
            topology: the run's degrees.
            weights: lambda by data set, or a function that gives it by step; in the order of the backward passes.
            parallel: how the engine was built; says whether the norm, the clip and the check are ours
                (`parallel.zero.is_plain`), and how many rows go through at once.
        """
        self.engine = engine
        self.config = config
        self.topology = topology
        self.weights = dict(weights)
        self.plain_optimizer = is_plain(parallel, config.torch_dtype)
        self.micro_rows = parallel.micro_rows
        self.bad_in_a_row = 0
        self.skipped = 0

    def run(
        self, step: int, batches: Mapping[str, TrainBatch], *, stop: bool = False, bad_samples: int = 0
    ) -> StepResult:
        """Run one step.

        Args:
            step: number of the step, from 0; sets the learning rate.
            batches: this rank's batch of every data set.
            stop: whether this rank wants the run to stop; any rank's wish reaches all.
            bad_samples: bad samples in this rank's batches; tensor-parallel peers say the same number.

        Returns:
            The step's figures, equal on all ranks.

        Raises:
            TrainingDivergedError: `max_bad_steps` skipped steps in a row.
        """
        names = list(self.weights)
        if self.config.mixing == "round_robin":
            names = [names[step % len(names)]]
        totals = self._global_counts([batches[name] for name in names], stop, bad_samples)
        lr = set_lr(self.engine.optimizer.param_groups, self.config.optimizer, step)
        weights = {name: self.weight(name, step) for name in names}
        started = time.perf_counter()
        parts = [(i, piece) for i, name in enumerate(names) for piece in batches[name].split(self.micro_rows)]
        summed = torch.zeros(len(names), device=parts[0][1].tokens_BT.device)
        for number, (i, piece) in enumerate(parts):
            is_last = number == len(parts) - 1
            summed[i] += self._backward(piece, weights[names[i]], totals, i, is_last=is_last)
        dist.all_reduce(summed, group=MegatronMPU().get_data_parallel_group())
        backward_done = time.perf_counter()
        with part("optimizer"):
            grad_norm, applied = self._update()
        self._count_skips(step, applied)
        return StepResult(
            step=step,
            loss={n: float(s) / max(1, t) for n, s, t in zip(names, summed, totals.loss_tokens, strict=True)},
            loss_tokens=dict(zip(names, totals.loss_tokens, strict=True)),
            media=dict(zip(names, totals.media, strict=True)),
            tokens=totals.tokens,
            grad_norm=grad_norm,
            lr=lr,
            applied=applied,
            stop_requested=totals.stop,
            bad_samples=totals.bad_samples,
            weights=weights,
            seconds={
                "forward_backward": backward_done - started,
                "optimizer": time.perf_counter() - backward_done,
            },
        )

    def weight(self, name: str, step: int) -> float:
        """Return the lambda of a data set at a step."""
        weight = self.weights[name]
        return weight(step) if callable(weight) else weight

    def _global_counts(self, batches: Sequence[TrainBatch], stop: bool, bad_samples: int) -> "_Totals":
        """Sum token, media and bad-sample counts over the data-parallel ranks, and the wish to stop with them.

        The wish is summed over the whole world: tensor-parallel peers may get a signal at different times.
        """
        local = [b.num_loss_tokens() for b in batches] + [b.num_media() for b in batches]
        local += [sum(b.num_tokens() for b in batches), bad_samples]
        if self.topology.tensor_rank != 0:
            local = [0] * len(local)
        counts = torch.tensor([*local, int(stop)], dtype=torch.int64, device=batches[0].tokens_BT.device)
        dist.all_reduce(counts)
        values = counts.tolist()
        return _Totals(
            loss_tokens=values[: len(batches)],
            media=values[len(batches) : -3],
            tokens=values[-3],
            sequences=[b.num_sequences() * self.topology.data for b in batches],
            bad_samples=values[-2],
            stop=values[-1] > 0,
        )

    def _backward(
        self, batch: TrainBatch, weight: float, totals: "_Totals", index: int, *, is_last: bool
    ) -> Tensor:
        """Run forward and backward of one data set, or a part; return its summed loss on this rank, fp32 0-dim."""
        self.engine.set_gradient_accumulation_boundary(is_last)
        output = self.engine(
            batch.tokens_BT,
            batch.media_index_BT,
            batch.media,
            batch.media_mask_BM,
            targets_BT=batch.targets(),
            segments_BT=batch.segments_BT,
            num_media=batch.num_media(),
            num_targets=batch.num_loss_tokens(),
        )
        summed = output.nll_BT.sum()
        by_mean = self.config.reduction == "mean"
        divisor = max(1, totals.loss_tokens[index] if by_mean else totals.sequences[index])
        # DeepSpeed averages gradients over the data-parallel ranks; the divisor already counts all of them.
        loss = summed * (weight * self.topology.data / divisor)
        # A non-finite loss can have finite gradients; make sure that it reaches the norm, which all ranks share. Times
        # one or NaN, not by a question that the device would have to answer first.
        self.engine.backward(loss * torch.where(loss.detach().isfinite(), 1.0, math.nan))
        return summed.detach().float()

    def _update(self) -> tuple[float, bool]:
        """Clip and update, or skip on all ranks together; return the gradient norm and whether it was applied."""
        if self.plain_optimizer:
            return self._plain_update()
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm), not self.engine.optimizer.overflow

    def _plain_update(self) -> tuple[float, bool]:
        grads = [
            (p, p.grad)
            for group in self.engine.optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        norm = global_norm(grads, self.topology)
        clip = self.config.optimizer.clip_norm
        if not math.isfinite(norm):
            self.engine.optimizer.zero_grad(set_to_none=True)
            return norm, False
        if clip > 0 and norm > clip:
            for _, grad in grads:
                grad.mul_(clip / (norm + 1e-6))
        self.engine.step()
        return norm, True

    def _count_skips(self, step: int, applied: bool) -> None:
        self.bad_in_a_row = 0 if applied else self.bad_in_a_row + 1
        self.skipped += not applied
        if self.bad_in_a_row >= self.config.max_bad_steps:
            raise TrainingDivergedError(
                f"{self.bad_in_a_row} steps in a row, up to step {step}, had a non-finite loss or gradient "
                f"(train.max_bad_steps={self.config.max_bad_steps}). Resume from an earlier checkpoint with a lower "
                "rate (--resume STEP --allow-change train.optimizer.lr --train.optimizer.lr RATE), or look at the data "
                "of these steps."
            )


@dataclass(frozen=True, kw_only=True)
class _Totals:
    loss_tokens: list[int]
    media: list[int]
    tokens: int
    sequences: list[int]
    bad_samples: int
    stop: bool


def global_norm(grads: Sequence[tuple[nn.Parameter, Tensor]], topology: Topology) -> float:
    """Return the norm of the whole gradient from a data-parallel rank's averaged gradients.

    Sharded parameters count on every tensor-parallel rank, replicated ones once.

    Args:
        grads: parameters with their gradients, of any shape.
        topology: the run's degrees.
    """
    counted = [
        g.float().pow(2).sum()
        for p, g in grads
        if tag_of(p).partition_dim is not None or topology.tensor_rank == 0
    ]
    total = torch.stack(counted).sum() if counted else grads[0][1].new_zeros(())
    if topology.tensor > 1:
        dist.all_reduce(total, group=MegatronMPU().get_model_parallel_group())
    return float(total.sqrt())
