"""The published weights of SmolLM2, dequantised: our LM, at TP 1 and 3, against transformers' LLaMA."""

import os

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flamingo_dist.models.weights import open_lm_weights, read_lm_config
from jobs.demo.fetch import fetch_parts, find_parts
from jobs.demo.sources import LANGUAGE_MODEL
from tests.flamingo_dist.models.test_lm import our_logits

pytestmark = [pytest.mark.assets, pytest.mark.distributed]


@pytest.fixture(scope="module")
def gguf() -> str:
    parts = find_parts()
    if LANGUAGE_MODEL not in parts.found and os.environ.get("CI") == "true":
        parts = fetch_parts(names=[LANGUAGE_MODEL])
    if LANGUAGE_MODEL not in parts.found:
        pytest.skip("SmolLM2 is not in the cache; `flamingo demo` fetches it")
    return str(parts.language_model)


@pytest.fixture(scope="module")
def expected(gguf: str) -> tuple[torch.Tensor, torch.Tensor]:
    ours = read_lm_config(gguf)
    config = LlamaConfig(
        vocab_size=ours.vocab_size,
        hidden_size=ours.width,
        intermediate_size=ours.ffn_width,
        num_hidden_layers=ours.num_layers,
        num_attention_heads=ours.num_heads,
        num_key_value_heads=ours.num_kv_heads,
        head_dim=ours.head_dim,
        rms_norm_eps=ours.norm_eps,
        rope_theta=ours.rope_base,
        tie_word_embeddings=True,
    )
    source = open_lm_weights(ours)
    state = {name: source.read(name) for name in source.shapes()}
    oracle = LlamaForCausalLM(config).eval()
    missing, surplus = oracle.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"]
    assert surplus == []
    oracle.tie_weights()
    tokens = torch.randint(3, ours.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    # "The capital of France is" in SmolLM2's vocabulary: a text whose next token we know.
    tokens[0, -5:] = torch.tensor([504, 3575, 282, 4649, 314])
    with torch.no_grad():
        return tokens, oracle(tokens).logits


@pytest.mark.parametrize("tensor", [1, 3])
def test_logits_equal_transformers(ranks, gguf, expected, tensor):
    tokens, logits = expected
    for ours in ranks.run(our_logits, gguf, tokens, False, world=tensor, tensor=tensor):
        torch.testing.assert_close(ours, logits, atol=1e-4, rtol=0)


def test_two_ranks_are_refused_because_nine_heads_do_not_divide(gguf):
    from flamingo_dist.parallel.topology import Topology

    config = read_lm_config(gguf)
    with pytest.raises(ValueError, match="tensor=2 does not divide lm.num_heads=9"):
        Topology(world=2, rank=0, tensor=2).check_divisible({"lm.num_heads": config.num_heads})
