"""What int8 and fp8 cost a real LM: `python -m tests.flamingo_dist.models.measure_storage [GGUF] [FILE...]`.

Losses of the bare LM on text, by default SmolLM2 from the demo's cache on pages of this repository, and how far its
next-token distributions move.
"""

import sys
from pathlib import Path

import torch

from data_pipeline.tokenizer import TokenizerConfig
from flamingo_dist.models.linear import quantise_
from flamingo_dist.models.lm_config import MatrixProducts
from flamingo_dist.models.weights import read_lm_config
from flamingo_dist.parallel.topology import single_process
from jobs.demo.fetch import find_parts
from tests.flamingo_dist.models.test_lm import lm_logits, load_lm

PAGES = ("docs/architecture.md", "README.md")
LENGTH = 256
FP8_PRODUCTS = "fp8, products too"
STORAGES: dict[str, MatrixProducts] = {"int8": "same", "fp8": "same", FP8_PRODUCTS: "fp8"}


def measure(gguf: str, files: list[str]) -> dict[str, dict[str, float]]:
    """Return figures by storage: loss, its change, divergence from the unquantised LM and its agreement."""
    tokenizer = TokenizerConfig(kind="gguf", path=gguf).load()
    ids = [i for file in files for i in tokenizer.encode(Path(file).read_text())]
    rows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    config = read_lm_config(gguf)
    found: dict[str, dict[str, float]] = {}
    with single_process() as topology, torch.no_grad():
        plain = load_lm(topology, config)
        for storage, products in STORAGES.items():
            kind = "fp8" if storage == FP8_PRODUCTS else storage
            stored = load_lm(topology, config)
            for module in list(stored.modules()):
                quantise_(module, kind, torch.device("cpu"), products=products)
            sums = torch.zeros(4, dtype=torch.float64)
            for row in rows.split(4):
                before, after = (lm_logits(lm, row, False).log_softmax(-1)[:, :-1] for lm in (plain, stored))
                picked = [-x.gather(-1, row[:, 1:, None]).sum().double() for x in (before, after)]
                divergence = (before.exp() * (before - after)).sum().double()
                agree = (before.argmax(-1) == after.argmax(-1)).sum().double()
                sums += torch.stack([*picked, divergence, agree])
            nll, nll_stored, divergence, agree = (sums / rows[:, 1:].numel()).tolist()
            found["same"] = {"tokens": rows.numel(), "nats": nll}
            found[storage] = {"nats": nll_stored, "change": nll_stored - nll, "kl": divergence, "top1": agree}
    return found


if __name__ == "__main__":
    given = sys.argv[1:] or [str(find_parts().language_model)]
    for name, figures in measure(given[0], given[1:] or list(PAGES)).items():
        print(name, {key: round(value, 5) for key, value in figures.items()})
