"""Tiny random language models of transformers' own classes, saved as folders."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 101
"""Odd, so that two ranks pad it."""
LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MPT: dict[str, Any] = {"vocab_size": VOCAB, "d_model": 48, "n_heads": 6, "n_layers": 2, "max_seq_len": 32}
OPT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "ffn_dim": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 20,
}
GPT2: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 20}


def oracles() -> dict[str, PreTrainedModel]:
    return {
        "llama": LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=False, rope_theta=5000.0)),
        "llama3": LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True, rope_parameters=LLAMA3)),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**LLAMA, tie_word_embeddings=True)),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**{**LLAMA, "head_dim": 16})),
        "mpt": MptForCausalLM(MptConfig(**MPT)),
        "mpt clipped": MptForCausalLM(MptConfig(**MPT, attn_config={"clip_qkv": 0.7})),
        "opt": OPTForCausalLM(OPTConfig(**OPT)),
        "gpt2": GPT2LMHeadModel(GPT2Config(**GPT2)),
    }


def save_oracles(folder: Path) -> dict[str, PreTrainedModel]:
    """Save a model of each family in a folder of its name."""
    torch.manual_seed(0)
    models = oracles()
    for name, model in models.items():
        model.eval()
        with torch.no_grad():
            for key, param in model.named_parameters():
                # Norms and biases hide nothing either.
                is_scale = "norm" in key or ".ln_" in key
                param.normal_(mean=1.0 if is_scale and key.endswith("weight") else 0.0, std=0.2)
        # Several shards with an index, as large models have them.
        model.save_pretrained(folder / name, max_shard_size="20KB" if name == "qwen2" else "5GB")
    return models


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
