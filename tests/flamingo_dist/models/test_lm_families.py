"""Every family's logits against transformers' own classes, at TP 1 and 2, whole and token by token."""

from typing import Any

import pytest
import torch

from flamingo_dist.models.weights import read_lm_config
from tests.flamingo_dist.models.lm_oracles import VOCAB, save_oracles
from tests.flamingo_dist.models.test_lm import lm_logits, load_lm

SEGMENTS = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 3], [1] * 7 + [2] * 5])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    models = save_oracles(folder)
    tokens = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return folder, tokens, {name: (model, model(tokens).logits) for name, model in models.items()}


def all_logits(topology: Any, folders: dict[str, str], tokens: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    found = {}
    for name, folder in folders.items():
        lm = load_lm(topology, read_lm_config(folder))
        found[name] = [
            lm_logits(lm, tokens, cached=False),
            lm_logits(lm, tokens, cached=True),
            lm_logits(lm, tokens, cached=False, segments_BT=SEGMENTS),
        ]
    return found


def segment_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """What a model says to each segment alone, put back into rows."""
    rows = []
    for row, segments in zip(tokens, SEGMENTS, strict=True):
        parts = [row[segments == number] for number in segments.unique()]
        rows.append(torch.cat([model(part[None]).logits[0] for part in parts]))
    return torch.stack(rows)


@pytest.mark.distributed
@pytest.mark.parametrize("tensor", [1, 2])
def test_logits_equal_transformers(ranks, saved, tensor):
    folder, tokens, models = saved
    folders = {name: str(folder / name) for name in models}
    assert len(list((folder / "qwen2").glob("*.safetensors"))) > 1
    for found in ranks.run(all_logits, folders, tokens, world=tensor, tensor=tensor):
        for name, (model, expected) in models.items():
            whole, cached, packed = found[name]
            with torch.no_grad():
                apart = segment_logits(model, tokens)
            message = f"{name}: {{}}".format
            torch.testing.assert_close(whole, expected, atol=1e-4, rtol=0, msg=message)
            torch.testing.assert_close(cached, expected, atol=1e-4, rtol=0, msg=message)
            torch.testing.assert_close(packed, apart, atol=1e-4, rtol=0, msg=message)
            assert (packed - expected).abs().max() > 0.1, "packing must change something"
