"""What a frozen block keeps for its backward, against what autograd keeps of it, for each kind of language model."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flamingo_dist.models.flamingo import Flamingo
from flamingo_dist.models.lm import run_layer
from flamingo_dist.parallel.topology import ParallelConfig, single_process
from flamingo_dist.planning.memory import lm_block_bytes
from flamingo_dist.planning.workload import Workload
from tests import tiny

ROWS, TOKENS = 4, 64
KINDS: dict[str, dict[str, Any]] = {
    "LLaMA": {},
    "Qwen3": {"qk_norm": "head", "num_kv_heads": 2},
    "MPT-1B": {
        "positions": "alibi",
        "qk_norm": "width",
        "norm": "layer",
        "activation": "gelu",
        "num_kv_heads": 4,
    },
    "GPT-2": {
        "positions": "learned",
        "norm": "layer",
        "activation": "gelu_tanh",
        "bias": "all",
        "num_kv_heads": 4,
    },
    "Chinchilla": {"positions": "relative", "activation": "gelu", "num_kv_heads": 4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_keeps_what_is_planned(kind):
    base = tiny.network()
    wide = {"width": 256, "head_dim": 64, "num_heads": 4, "ffn_width": 512}
    lm = replace(base.lm, **wide, **KINDS[kind])
    config = replace(base, lm=lm, gated=replace(base.gated, width=256))
    kept: dict[int, int] = {}
    with single_process():
        model = Flamingo(config, dtype=torch.float32)
        for param in model.parameters():
            torch.nn.init.normal_(param.data, std=0.02)
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        x_TBD, inputs = model.lm.embed(torch.zeros(ROWS, TOKENS, dtype=torch.int64))
        x_TBD = x_TBD.detach().requires_grad_()
        outputs = []
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            for layer in model.lm.layers:
                x_TBD = run_layer(layer, x_TBD, inputs)
                outputs.append(x_TBD)
    work = Workload(model=config, datasets=(), parallel=ParallelConfig(), bytes_per_value=4)
    planned = lm_block_bytes(work, ROWS * TOKENS, TOKENS, 1) * lm.num_layers
    assert sum(kept.values()) == pytest.approx(planned, rel=0.06)
