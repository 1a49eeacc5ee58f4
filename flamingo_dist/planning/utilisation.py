"""How much of the machine a step used: useful MFU and HFU, never mixed.

Useful operations are those that any implementation must do: one forward of everything (the encoder once for all
tensor-parallel ranks), gradients of activations where something trainable stands below, gradients of weights for
trainable weights alone. HFU counts what ran: the recomputation and the encoder on every tensor-parallel rank as well.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from flamingo_dist.planning.flops import dataset_flops
from flamingo_dist.planning.hardware import GPU, gpu_of
from flamingo_dist.planning.workload import DatasetShape, Workload

Source = Literal["setting", "data sheet", "measured"]
PRODUCT = 768
"""Rows and columns of the product that measures a CPU."""


@dataclass(frozen=True, kw_only=True)
class Peak:
    """What a device could do at most."""

    flops: float
    """Operations a second."""
    source: Source
    """Where the figure comes from. "measured" is a product's speed, which no step exceeds by much, not a limit."""


@dataclass(frozen=True, kw_only=True)
class Utilisation:
    """Turns a step's counts and seconds into shares of the peak."""

    work: Workload
    """The run; its batches are global."""
    tensor: int
    """Tensor-parallel degree."""
    peak_flops: float
    """Operations a second of all ranks together."""

    def of_step(
        self, loss_tokens: Mapping[str, int], media: Mapping[str, int], seconds: float
    ) -> dict[str, float]:
        """Return `useful_mfu` and `hfu` of a step.

        Rows' padding counts as work, since the LM runs on it; empty media slots do not, and the head runs where
        tokens carry loss alone.

        Args:
            loss_tokens: tokens that carried loss, by data sets that the step ran on, over all ranks.
            media: media that were encoded, likewise.
            seconds: of the whole step.
        """
        useful = hardware = 0.0
        again = self.work.parallel.activation_checkpointing
        repeats = 0 if self.work.parallel.split_vision else self.tensor - 1
        for data in self.work.datasets:
            if data.name not in loss_tokens:
                continue
            shares = _shares(data, loss_tokens[data.name], media[data.name])
            for name, part in dataset_flops(self.work.model, data, checkpointing=again).items():
                share = shares.get(name, 1.0)
                useful += share * part.useful
                repeated = repeats if name == "vision" else 0
                hardware += share * (part.useful + part.recompute + repeated * part.forward)
        whole = seconds * self.peak_flops
        return {"useful_mfu": useful / whole, "hfu": hardware / whole}


def _shares(data: DatasetShape, loss_tokens: int, media: int) -> dict[str, float]:
    """Return which share of a part's operations on full batches a batch needed."""
    seen = media / max(1, data.rows * data.media)
    return {"vision": seen, "resampler": seen, "head": loss_tokens / (data.rows * data.tokens)}


def device_peak(device: torch.device, dtype: torch.dtype, setting: float | None = None) -> Peak:
    """Return the peak of one rank's device for matrix products of `dtype`.

    Args:
        device: what the rank computes on.
        dtype: of parameters and activations.
        setting: TFLOP/s that the run names; it comes before all else.

    Raises:
        ValueError: a GPU that `planning.hardware` does not know, and no setting.
    """
    if setting is not None:
        return Peak(flops=setting * 1e12, source="setting")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        gpu: GPU | None = gpu_of(name)
        if gpu is None:
            raise ValueError(
                f"{name} is not among the GPUs of flamingo_dist/planning/hardware.py: set resources.peak_tflops to its "
                "dense peak for the run's dtype."
            )
        teraflops = gpu.bf16_tflops if dtype == torch.bfloat16 else gpu.fp32_tflops
        return Peak(flops=teraflops * 1e12, source="data sheet")
    return Peak(flops=measured_flops(dtype), source="measured")


def measured_flops(dtype: torch.dtype, *, repeats: int = 5) -> float:
    """Return the best speed of a square product on this process's CPU threads, operations a second."""
    left, right = (torch.ones(PRODUCT, PRODUCT, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats + 1):  # the first makes threads and pages
        started = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - started)
    return 2.0 * PRODUCT**3 / best
