"""The frozen language model: vocabulary, Megatron blocks, final norm."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core import parallel_state
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor, nn

from flamingo_dist.models.init import tag
from flamingo_dist.models.lm_config import LMConfig
from flamingo_dist.models.megatron import (
    CausalAttention,
    KeyValueCache,
    layer_spec,
    rotary_angles,
    rotary_frequencies,
    transformer_config,
)
from flamingo_dist.models.norms import build_norm
from flamingo_dist.models.vocabulary import Vocabulary


class LanguageModel(nn.Module):
    """A decoder assembled from megatron-core layers; the caller runs the blocks one by one.

    Everything but the trainable rows of the vocabulary is frozen.
    """

    def __init__(self, config: LMConfig, dtype: torch.dtype) -> None:
        """Build the LM empty, sliced for this rank of Megatron's tensor-parallel group."""
        super().__init__()
        self.config = config
        tp_size = parallel_state.get_tensor_model_parallel_world_size()
        megatron = transformer_config(config, dtype=dtype, tp_size=tp_size)
        self.vocabulary = Vocabulary(config, megatron)
        self.layers = nn.ModuleList(
            build_module(layer_spec(), config=megatron, layer_number=i + 1) for i in range(config.num_layers)
        )
        self.final_norm = build_norm(config.width, kind=config.norm, eps=config.norm_eps, dtype=dtype)
        for name, param in self.named_parameters():
            _tag_frozen(name, param, stride=2 if config.activation == "silu_gated" else 1)
            if ".extra" not in name:
                param.requires_grad_(False)

    def rotary(self, length: int, *, offset: int, device: torch.device) -> Tensor:
        """Return the rotary angles [length, 1, 1, K] of positions from `offset` on."""
        return rotary_frequencies(length, self.config, offset=offset, device=device)

    def rotary_at(self, positions_BT: Tensor) -> Tensor:
        """Return the rotary angles [T, B, 1, K] of positions int64 [B, T] that differ from row to row."""
        return rotary_angles(positions_BT.T, self.config)[:, :, None]

    @contextmanager
    def caching(self, cache: KeyValueCache | None) -> Iterator[None]:
        """Let the attention of every block read and extend `cache` for the time of the block."""
        cores = [m for m in self.modules() if isinstance(m, CausalAttention)]
        for core in cores:
            core.cache = cache
        try:
            yield
        finally:
            for core in cores:
                core.cache = None


def _tag_frozen(name: str, param: nn.Parameter, *, stride: int) -> None:
    """Tag Megatron's own parameters, for the random weights of a run without published ones."""
    if hasattr(param, "flamingo_tag"):
        return
    if name.endswith("layernorm.bias"):
        tag(param, value=0.0)
    elif "layernorm" in name:
        tag(param, value=1.0)
    elif "linear_fc1" in name:
        tag(param, std=0.02, partition_dim=0, stride=stride)
    elif "linear_qkv" in name:
        tag(param, std=0.02, partition_dim=0)
    else:
        tag(param, std=0.02, partition_dim=1)
