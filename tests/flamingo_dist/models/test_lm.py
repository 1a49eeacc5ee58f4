from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flamingo_dist.models.lm import LanguageModel
from flamingo_dist.models.lm_config import LMConfig
from flamingo_dist.models.megatron import KeyValueCache
from flamingo_dist.models.weights import check_names, lm_shard, open_weights, read_lm_config
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


def our_logits(topology: Topology, folder: str, tokens_BT: torch.Tensor, cached: bool) -> torch.Tensor:
    config = read_lm_config(folder)
    source = open_weights(folder)
    check_names(source, config)
    lm = LanguageModel(config, torch.float32)

    def value_of(name: str, param: Any) -> torch.Tensor:
        if ".extra" in name:
            return torch.zeros(param.shape)
        return lm_shard(
            source, name, param.shape, config, tp_rank=topology.tensor_rank, tp_size=topology.tensor
        )

    fill_parameters(lm, value_of)
    cache = KeyValueCache() if cached else None
    parts = tokens_BT.split([5] + [1] * (tokens_BT.shape[1] - 5), dim=1) if cached else [tokens_BT]
    out = []
    with torch.no_grad():
        for part in parts:
            x = lm.vocabulary(part).transpose(0, 1).contiguous()
            rotary = lm.rotary(part.shape[1], offset=cache.length if cache else 0, device=x.device)
            with lm.caching(cache):
                for layer in lm.layers:
                    x, _ = layer(x, attention_mask=None, rotary_pos_emb=rotary)
            if cache:
                cache.length += part.shape[1]
            out.append(lm.vocabulary(lm.final_norm(x).transpose(0, 1), as_head=True))
    return torch.cat(out, dim=1)[..., : config.vocab_size]


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
    deeper = LMConfig(**{**vars(config), "num_layers": 4})
    with pytest.raises(ValueError, match=r"missing \['model.layers.3.input_layernorm.weight'"):
        check_names(open_weights(str(tmp_path)), deeper)
    wider = LMConfig(**{**vars(config), "ffn_width": 80})
    with pytest.raises(ValueError, match=r"layers.0.mlp.linear_fc1.weight needs shape \(160, 48\)"):
        lm_shard(
            open_weights(str(tmp_path)),
            "layers.0.mlp.linear_fc1.weight",
            torch.Size((160, 48)),
            wider,
            tp_rank=0,
            tp_size=1,
        )
