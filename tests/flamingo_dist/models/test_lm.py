from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flamingo_dist.models.attention import KeyValueCache
from flamingo_dist.models.lm import LanguageModel, run_layer
from flamingo_dist.models.lm_config import LMConfig
from flamingo_dist.models.weights import lm_shard, open_lm_weights, read_lm_config
from flamingo_dist.parallel.topology import Topology
from flamingo_dist.parallel.zero import fill_parameters


def tiny_llama(folder: str, *, tied: bool, heads: int = 6, kv_heads: int = 6) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=48,
        intermediate_size=72,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=8,
        tie_word_embeddings=tied,
        rope_theta=5000.0,
    )
    model = LlamaForCausalLM(config).eval()
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.2)
    model.save_pretrained(folder)
    return model


def load_lm(topology: Topology, config: LMConfig) -> LanguageModel:
    source = open_lm_weights(config)
    lm = LanguageModel(config, torch.float32)

    def value_of(name: str, param: Any) -> torch.Tensor:
        if ".extra" in name:
            return torch.zeros(param.shape)
        return lm_shard(
            source, name, param.shape, config, tp_rank=topology.tensor_rank, tp_size=topology.tensor
        )

    fill_parameters(lm, value_of)
    return lm


def lm_logits(
    lm: LanguageModel, tokens_BT: torch.Tensor, cached: bool, segments_BT: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits of all tokens at once, or of five and then one at a time."""
    cache = KeyValueCache() if cached else None
    parts = tokens_BT.split([5] + [1] * (tokens_BT.shape[1] - 5), dim=1) if cached else [tokens_BT]
    out = []
    with torch.no_grad():
        for part in parts:
            x, inputs = lm.embed(part, segments_BT=segments_BT, offset=cache.length if cache else 0)
            with lm.caching(cache):
                for layer in lm.layers:
                    x = run_layer(layer, x, inputs)
            if cache:
                cache.length += part.shape[1]
            out.append(lm.vocabulary(lm.final_norm(x).transpose(0, 1), as_head=True))
    return torch.cat(out, dim=1)[..., : lm.config.vocab_size]


def our_logits(topology: Topology, folder: str, tokens_BT: torch.Tensor, cached: bool) -> torch.Tensor:
    return lm_logits(load_lm(topology, read_lm_config(folder)), tokens_BT, cached)


@pytest.mark.distributed
@pytest.mark.parametrize("tensor", [1, 2, 3])
@pytest.mark.parametrize(("tied", "kv_heads"), [(True, 6), (False, 6)])
def test_logits_equal_transformers(ranks, tmp_path, tensor, tied, kv_heads):
    oracle = tiny_llama(str(tmp_path), tied=tied, kv_heads=kv_heads)
    tokens = torch.randint(0, 101, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = oracle(tokens).logits
    for ours in ranks.run(our_logits, str(tmp_path), tokens, False, world=tensor, tensor=tensor):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


@pytest.mark.distributed
@pytest.mark.parametrize("kv_heads", [2, 6])
def test_grouped_queries_and_cache(ranks, tmp_path, kv_heads):
    oracle = tiny_llama(str(tmp_path), tied=True, kv_heads=kv_heads)
    tokens = torch.randint(0, 101, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = oracle(tokens).logits
    for cached in (False, True):
        for ours in ranks.run(our_logits, str(tmp_path), tokens, cached, world=2, tensor=2):
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_weights_that_do_not_fit_are_named(tmp_path):
    tiny_llama(str(tmp_path), tied=True)
    config = read_lm_config(str(tmp_path))
    open_lm_weights(config)
    with pytest.raises(
        ValueError, match=r"missing \['model.layers.3.input_layernorm.weight'.*\(9 in all\)\.$"
    ):
        open_lm_weights(replace(config, num_layers=4))
    with pytest.raises(
        ValueError, match=r"surplus \['model.layers.2.input_layernorm.weight'.*\(9 in all\)\.$"
    ):
        open_lm_weights(replace(config, num_layers=2))
    shape = r"model.layers.0.mlp.gate_proj.weight is \(72, 48\) and should be \(80, 48\)"
    with pytest.raises(ValueError, match=rf"misshaped \['{shape}'.*\(9 in all\)\.$"):
        open_lm_weights(replace(config, ffn_width=80))
    with pytest.raises(ValueError, match=r"layers.0.mlp.linear_fc1.weight needs shape \(160, 48\)"):
        lm_shard(
            open_lm_weights(config),
            "layers.0.mlp.linear_fc1.weight",
            torch.Size((160, 48)),
            replace(config, ffn_width=80),
            tp_rank=0,
            tp_size=2,
        )
