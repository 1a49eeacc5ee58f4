"""Every kind of language model trains alike on every layout, with random weights and with published ones.

What differs from LLaMA under ZeRO-3, residency, tensor parallelism and recomputation: biases, position matrices and
tables, u and v, wide norms.
"""

from dataclasses import replace
from typing import Any

import pytest

from flamingo_dist.models.flamingo import FlamingoConfig
from flamingo_dist.models.weights import read_lm_config
from flamingo_dist.parallel.topology import ParallelConfig, Topology
from tests import tiny
from tests.flamingo_dist.models.lm_oracles import save_oracles

pytestmark = pytest.mark.distributed
STEPS = 2
KINDS: dict[str, dict[str, Any]] = {
    "chinchilla": {"positions": "relative", "activation": "gelu"},
    "opt": {
        "positions": "learned",
        "position_offset": 2,
        "bias": "all",
        "norm": "layer",
        "activation": "relu",
    },
    "mpt-1b": {
        "positions": "alibi",
        "norm": "layer_no_bias",
        "qk_norm": "width",
        "activation": "gelu",
        "clip_qkv": 0.05,
    },
}
LAYOUTS = [
    (2, 2, ParallelConfig(tensor=2, zero_stage=3, frozen="resident", activation_checkpointing=True)),
    (2, 1, ParallelConfig(tensor=1, zero_stage=3, frozen="partitioned")),
    (4, 2, ParallelConfig(tensor=2, zero_stage=3, frozen="partitioned", activation_checkpointing=True)),
]


def networks(published: dict[str, str]) -> dict[str, FlamingoConfig]:
    """A tiny network of each kind, one that maps its latents, and one around each published LM."""
    base = tiny.network(gate_init=0.5)
    found = {name: replace(base, lm=replace(base.lm, num_kv_heads=4, **kind)) for name, kind in KINDS.items()}
    wide = found["chinchilla"]
    found["chinchilla"] = replace(wide, gated=replace(wide.gated, media_width=32))
    for name, folder in published.items():
        # The batches' `<image>` and `<EOC>` stand at 60 and 61.
        lm = read_lm_config(folder)
        found[name] = replace(base, lm=lm, gated=replace(base.gated, width=lm.width))
    return found


def train(topology: Topology, parallel: ParallelConfig, published: dict[str, str]) -> dict[str, Any]:
    results = {}
    for name, config in networks(published).items():
        step = tiny.make_step(topology, parallel, tiny.train_config(STEPS), config)
        runs = [step.run(i, tiny.batches(i, topology)) for i in range(STEPS)]
        results[name] = [(dict(r.loss), r.grad_norm) for r in runs]
    return results


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_oracles(folder)
    return {name: str(folder / name) for name in ("gpt2", "qwen2")}


@pytest.fixture(scope="module")
def reference(ranks, published):
    return ranks.run(train, ParallelConfig(zero_stage=0), published, world=1)[0]


@pytest.mark.parametrize(("world", "tensor", "parallel"), LAYOUTS, ids=["tp2", "dp2", "tp2 dp2"])
def test_every_layout_trains_alike(ranks, published, reference, world, tensor, parallel):
    for results in ranks.run(train, parallel, published, world=world, tensor=tensor):
        for name, steps in results.items():
            for (loss, norm), (want_loss, want_norm) in zip(steps, reference[name], strict=True):
                assert loss == pytest.approx(want_loss, abs=3e-5), name
                assert norm == pytest.approx(want_norm, rel=1e-3), name
                assert norm > 0
