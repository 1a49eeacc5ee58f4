"""Parameter counts against the real modules, and bytes against real tensors."""

from dataclasses import replace

import pytest
import torch

from flamingo_dist.models.flamingo import Flamingo
from flamingo_dist.models.linear import ColumnLinear, RowLinear
from flamingo_dist.models.vision import build_vision
from flamingo_dist.parallel.topology import ParallelConfig, single_process
from flamingo_dist.planning.memory import state_memory
from flamingo_dist.planning.parameters import count_parameters
from flamingo_dist.training.config import OptimizerConfig
from flamingo_dist.training.optimizer import make_optimizer
from jobs.plan import workload
from jobs.recipes import RECIPES
from tests.flamingo_dist.planning.shapes import fake_world, meta_counts
from tests.tiny import network

CASES = [("smoke", 1), ("smoke", 2)]
CASES += [(f"flamingo_{size}", tp) for size in ("3b", "9b", "80b") for tp in (1, 2, 4, 8)]


def assert_counts(config, tp):
    counts = count_parameters(config, tp)
    real = meta_counts(config, tp)
    for part in ("resampler", "media_map", "gated", "extra", "lm_blocks", "vocabulary"):
        assert getattr(counts, part) == real.pop(part, 0), part
    assert not real


@pytest.mark.parametrize(("name", "tp"), CASES)
def test_counts_equal_the_modules_of_a_rank(name, tp):
    assert_counts(RECIPES[name].config().model, tp)


@pytest.mark.parametrize("tp", [1, 2])
def test_counts_of_the_variants(tp):
    base = network()
    lm = replace(base.lm, activation="gelu", norm="layer", tied=False, vocab_size=61)
    gated = replace(base.gated, activation="silu_gated", norm="rms", gate="vector", qk_norm=True)
    resampler = replace(base.resampler, qk_norm=True, activation="silu_gated", norm="rms")
    assert_counts(replace(base, lm=lm, gated=gated, resampler=resampler, cross_phase="last"), tp)


VARIANTS = {
    "chinchilla": {"positions": "relative", "activation": "gelu"},
    "qwen2": {"bias": "qkv"},
    "qwen3": {"qk_norm": "head"},
    "opt": {
        "positions": "learned",
        "position_offset": 2,
        "bias": "all",
        "norm": "layer",
        "activation": "relu",
    },
    "gated with biases": {"bias": "all"},
    "mpt-1b": {"positions": "alibi", "norm": "layer_no_bias", "qk_norm": "width", "activation": "gelu"},
    "wide norm with a shift": {"norm": "layer", "qk_norm": "width"},
}


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_counts_of_language_models(variant, tp):
    base = network()
    assert_counts(replace(base, lm=replace(base.lm, **VARIANTS[variant])), tp)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_matrices_of_language_models(variant, tp):
    """What `weight_storage` shrinks, against the modules that `quantise_` would take."""
    base = network()
    config = replace(base, lm=replace(base.lm, **VARIANTS[variant]))
    with fake_world(tp, tp), torch.device("meta"):
        lm = Flamingo(config, dtype=torch.bfloat16).lm
    weights = [m.weight for m in lm.modules() if isinstance(m, ColumnLinear | RowLinear)]
    counts = count_parameters(config, tp)
    assert counts.lm_matrices == sum(w.numel() for w in weights)
    assert counts.lm_channels == sum(w.shape[0] for w in weights)
    assert counts.largest_matrix == max(w.numel() for w in weights)


@pytest.mark.parametrize("tp", [1, 2])
def test_counts_with_a_map_of_the_latents(tp):
    base = network()
    config = replace(base, gated=replace(base.gated, media_width=32))
    assert count_parameters(config, tp).media_map == 24 * 32
    assert_counts(config, tp)


@pytest.mark.parametrize("name", ["smoke", "flamingo_3b"])
def test_the_encoder_counts_its_buffers(name):
    config = RECIPES[name].config().model
    with torch.device("meta"):
        vision = build_vision(config.vision)
    assert count_parameters(config).vision == sum(b.numel() for b in vision.buffers())


def test_bytes_of_the_smoke_recipe_equal_real_tensors():
    """One process, ZeRO 0, fp32: parameters, gradients and AdamW's moments after a step."""
    run = RECIPES["smoke"].config()
    with single_process():
        model = Flamingo(run.model, dtype=torch.float32)
        optimizer = make_optimizer(model.named_parameters(), OptimizerConfig())
        for param in model.parameters():
            param.grad = torch.zeros_like(param) if param.requires_grad else None
        optimizer.step()
    work = replace(workload(run), parallel=ParallelConfig(zero_stage=0))
    memory = state_memory(work, tp=1, dp=1, residency="resident")
    moments = [t for s in optimizer.state.values() for k, t in s.items() if k.startswith("exp_avg")]

    def size(tensors):
        return sum(t.numel() * t.element_size() for t in tensors)

    trained = [p for p in model.parameters() if p.requires_grad]
    assert memory["frozen"] == size(p for p in model.parameters() if not p.requires_grad)
    assert memory["trainable"] == size(trained)
    assert memory["gradients"] == size(p.grad for p in trained)
    assert memory["optimizer"] == size(moments)
    assert memory["vision"] == size(model.vision.buffers())
