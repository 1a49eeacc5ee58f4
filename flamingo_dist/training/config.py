"""Settings of a training run; defaults are the paper's where it gives them (section 7 of the appendix)."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from flamingo_dist.choices import check_choices

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_LEAST = {
    "steps": 1,
    "max_bad_steps": 1,
    "checkpoint_every": 0,
    "keep_checkpoints": 1,
    "probe_every": 0,
    "probe_batches": 1,
}
"""Smallest value of the settings that count something."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = 1e-4
    """Peak learning rate, reached after the warm-up."""
    warmup_steps: int = 5000
    """Steps of linear warm-up from 0."""
    decay: Literal["linear", "cosine", "exponential"] | None = None
    """How the rate falls after the warm-up; None keeps it (paper: decay did not help, but for fine-tuning, where it
    is exponential by a factor of 10)."""
    decay_steps: int | None = None
    """Steps that the fall takes, whatever the length of the run; the rate then stays."""
    decay_to: float | None = None
    """Share of `lr` that is left after it; None is 0.1."""
    weight_decay: float = 0.1
    """Weight decay, on everything but the resampler and the gates."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas (not disclosed in the paper; IDEFICS' values)."""
    eps: float = 1e-8
    """AdamW's epsilon (not disclosed in the paper)."""
    clip_norm: float = 1.0
    """One clip of the global gradient norm over all data sets together; 0 turns it off."""
    gate_lr_scale: float = 1.0
    """Multiplies the learning rate of the gates (1 in the paper; 20 opens them faster in short runs)."""

    def __post_init__(self) -> None:
        """Reject values that train nothing, or train wrongly without a word."""
        check_choices(self, "train.optimizer.")
        if not 0 < self.lr < math.inf or self.warmup_steps < 0:
            raise ValueError(
                f"lr={self.lr} must be positive and warmup_steps={self.warmup_steps} not negative."
            )
        self._check_decay()
        if not 0 < self.eps < math.inf:
            raise ValueError(f"eps={self.eps} must be positive; AdamW's usual one is 1e-8.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas} must lie in [0, 1); AdamW's usual ones are 0.9 and 0.999.")
        for name in ("weight_decay", "clip_norm", "gate_lr_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be finite and not negative; 0 turns it off."
                )

    def _check_decay(self) -> None:
        if self.decay is None:
            if self.decay_steps is not None or self.decay_to is not None:
                raise ValueError(
                    f"decay_steps={self.decay_steps} and decay_to={self.decay_to} mean nothing without decay: set "
                    'decay to "linear", "cosine" or "exponential", or leave them out.'
                )
            return
        if self.decay_steps is None or self.decay_steps < 1:
            raise ValueError(
                f"decay={self.decay!r} needs decay_steps of at least 1, not {self.decay_steps}: often the run's steps "
                "less its warm-up."
            )
        least_open = self.decay == "exponential"
        if self.decay_to is not None and not (
            0 < self.decay_to <= 1 or (self.decay_to == 0 and not least_open)
        ):
            raise ValueError(
                f"decay_to={self.decay_to} must be a share of lr in {'(0, 1]' if least_open else '[0, 1]'}."
            )

    def lr_at(self, step: int) -> float:
        """Return the learning rate of step number `step`, counted from 0."""
        if step < self.warmup_steps or self.decay is None:
            return self.lr * min(1.0, (step + 1) / max(1, self.warmup_steps))
        assert self.decay_steps is not None, "checked when it was made"
        left = 0.1 if self.decay_to is None else self.decay_to
        gone = min(1.0, (step + 1 - self.warmup_steps) / self.decay_steps)
        if self.decay == "exponential":
            return self.lr * left**gone
        share = 1 - gone if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * gone))
        return self.lr * (left + (1 - left) * share)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a run trains."""

    steps: int
    """Optimizer steps of the whole run."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Parameters' and activations' dtype; the optimizer keeps fp32 copies either way."""
    seed: int = 0
    """Seed of the initialisation and of the data order."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and schedule."""
    mixing: Literal["accumulate", "round_robin"] = "accumulate"
    """One update from all data sets' gradients (paper's choice), or from one data set in turn."""
    reduction: Literal["mean", "sum"] = "mean"
    """Loss of a data set's global batch: mean over its loss tokens, or their sum (the paper's equation 2)."""
    max_bad_steps: int = 10
    """Steps in a row with a non-finite loss or gradient after which the run stops; each is skipped."""
    checkpoint_every: int = 500
    """Steps between checkpoints; 0 saves at the end alone."""
    keep_checkpoints: int = 3
    """Newest checkpoints kept."""
    probe_every: int = 0
    """Steps between grounding probes, the first before training; 0 probes at the end alone."""
    probe_batches: int = 2
    """Held-out batches per data set and probe."""

    def __post_init__(self) -> None:
        """Reject values that mean nothing."""
        check_choices(self, "train.")
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"train.{name}={getattr(self, name)} must be at least {least}.")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's."""
        return DTYPES[self.dtype]
