"""Training settings that would train nothing, or wrongly without a word, are refused."""

import math

import pytest
import torch
from torch.optim import lr_scheduler

from flamingo_dist.parallel.topology import ParallelConfig
from flamingo_dist.training.config import OptimizerConfig, TrainConfig


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("lr", 0.0, "must be positive"),
        ("lr", math.nan, "must be positive"),
        ("eps", 0.0, "must be positive"),
        ("eps", math.nan, "must be positive"),
        ("clip_norm", -1.0, "must be finite and not negative; 0 turns it off"),
        ("clip_norm", math.nan, "must be finite and not negative"),
        ("weight_decay", -0.1, "must be finite and not negative"),
        ("gate_lr_scale", math.inf, "must be finite and not negative"),
        ("betas", (0.9, 1.0), r"must lie in \[0, 1\)"),
        ("betas", (-0.1, 0.9), r"must lie in \[0, 1\)"),
        ("betas", (math.nan, 0.9), r"must lie in \[0, 1\)"),
    ],
)
def test_optimizer_settings_out_of_range(name, value, says):
    with pytest.raises(ValueError, match=f"{name}=.* {says}"):
        OptimizerConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("steps", 0, 1),
        ("max_bad_steps", 0, 1),
        ("checkpoint_every", -1, 0),
        ("keep_checkpoints", 0, 1),
        ("probe_every", -5, 0),
        ("probe_batches", 0, 1),
    ],
)
def test_counts_out_of_range(name, value, least):
    with pytest.raises(ValueError, match=f"train.{name}={value} must be at least {least}"):
        TrainConfig(**{"steps": 3, name: value})
    TrainConfig(**{"steps": 3, name: least})


@pytest.mark.parametrize("decay", ["linear", "cosine", "exponential"])
@pytest.mark.parametrize("left", [None, 0.25])
def test_the_rate_falls_as_torchs_schedules_do(decay, left):
    config = OptimizerConfig(lr=2e-3, warmup_steps=3, decay=decay, decay_steps=8, decay_to=left)
    assert [config.lr_at(step) for step in range(3)] == pytest.approx([2e-3 / 3, 4e-3 / 3, 2e-3])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-3)
    end = 0.1 if left is None else left
    schedule = {
        "linear": lambda: lr_scheduler.LinearLR(optimizer, 1.0, end, total_iters=8),
        "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, T_max=8, eta_min=2e-3 * end),
        "exponential": lambda: lr_scheduler.ExponentialLR(optimizer, gamma=end ** (1 / 8)),
    }[decay]()
    for step in range(2, 11):
        assert config.lr_at(step) == pytest.approx(schedule.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        schedule.step()
    assert config.lr_at(10) == config.lr_at(10_000) == pytest.approx(2e-3 * end)


def test_a_fall_may_end_at_nothing_and_start_at_once():
    config = OptimizerConfig(lr=1.0, warmup_steps=0, decay="cosine", decay_steps=4, decay_to=0.0)
    assert [config.lr_at(step) for step in (0, 1, 3, 4)] == pytest.approx([0.853553, 0.5, 0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"decay_steps": 5}, "mean nothing without decay"),
        ({"decay_to": 0.5}, "mean nothing without decay"),
        ({"decay": "linear"}, "needs decay_steps of at least 1, not None"),
        ({"decay": "cosine", "decay_steps": 0}, "needs decay_steps of at least 1, not 0"),
        ({"decay": "cosine", "decay_steps": 5, "decay_to": 1.5}, r"share of lr in \[0, 1\]"),
        ({"decay": "exponential", "decay_steps": 5, "decay_to": 0.0}, r"share of lr in \(0, 1\]"),
        ({"decay": "linear", "decay_steps": 5, "decay_to": math.nan}, r"share of lr in \[0, 1\]"),
    ],
)
def test_a_fall_that_means_nothing_is_refused(given, says):
    with pytest.raises(ValueError, match=says):
        OptimizerConfig(**given)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (TrainConfig, "reduction", "avg"),
        (TrainConfig, "mixing", "round-robin"),
        (TrainConfig, "dtype", "fp16"),
        (OptimizerConfig, "decay", "cosin"),
        (ParallelConfig, "frozen", "residnt"),
        (ParallelConfig, "zero_stage", 4),
        (ParallelConfig, "activation_checkpointing", "selectiv"),
    ],
)
def test_a_misspelt_choice_is_refused(kind, name, value):
    """A recipe is Python: nobody else looks at its strings, and another branch ran without a word."""
    needed = {TrainConfig: {"steps": 3}, OptimizerConfig: {"decay_steps": 5}}.get(kind, {})
    with pytest.raises(ValueError, match=rf"{name}={value!r} is not known; choose one of "):
        kind(**needed, **{name: value})
