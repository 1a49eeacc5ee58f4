"""Training settings that would train nothing, or wrongly without a word, are refused."""

import math

import pytest

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
