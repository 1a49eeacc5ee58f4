"""Peak memory of a process that fills one rank's LM: `python -m ...measure_loading FOLDER GAP [STORAGE]`."""

import re
import sys
from functools import partial
from pathlib import Path

import torch

from flamingo_dist.models.linear import quantise_
from flamingo_dist.models.lm import LanguageModel
from flamingo_dist.models.lm_config import LMConfig, WeightStorage
from flamingo_dist.models.weights import lm_shard, open_lm_weights
from flamingo_dist.parallel.zero import fill_parameters
from tests.flamingo_dist.planning.shapes import fake_world

CONFIG = LMConfig(
    vocab_size=1024,
    num_layers=6,
    width=1024,
    num_heads=8,
    num_kv_heads=8,
    head_dim=128,
    ffn_width=4096,
)


def peak() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main(folder: str, gap: int, storage: WeightStorage = "same") -> None:
    config = LMConfig(**{**vars(CONFIG), "weights": folder})
    quantise = None if storage == "same" else partial(quantise_, storage=storage, device=torch.device("cpu"))
    torch.set_num_threads(1)
    with fake_world(2, 2):
        source = open_lm_weights(config)
        for file in source.files.values():
            file.max_gap = gap
        torch.zeros(8).bfloat16() + 1  # what torch allocates once
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = peak()
        lm = LanguageModel(config, torch.bfloat16)
        fill_parameters(
            lm,
            lambda name, param: (
                torch.zeros(param.shape)
                if ".extra" in name
                else lm_shard(source, name, param.shape, config, tp_rank=0, tp_size=2)
            ),
            quantise,
        )
        held = (*lm.parameters(), *lm.buffers())
        print(peak() - before, sum(t.numel() * t.element_size() for t in held))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
