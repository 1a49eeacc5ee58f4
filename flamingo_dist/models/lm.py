"""The frozen language model: vocabulary, Megatron blocks, final norm."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor, nn

from flamingo_dist.models.attention import CausalAttention, KeyValueCache
from flamingo_dist.models.init import tag
from flamingo_dist.models.lm_config import LMConfig
from flamingo_dist.models.megatron import layer_spec, transformer_config
from flamingo_dist.models.norms import build_norm
from flamingo_dist.models.positions import (
    PositionTable,
    alibi_bias,
    alibi_slopes,
    distance_sinusoids,
    rotary_angles,
    segment_mask,
    segment_positions,
)
from flamingo_dist.models.vocabulary import Vocabulary


class BlockInputs(NamedTuple):
    """What every block of one forward gets beside the stream."""

    mask_B1TT: Tensor | None
    """bool [B, 1, T, T] of packed rows, True may attend; None is causal."""
    rotary: Tensor | None
    """Rotary angles, fp32 [T, 1 or B, 1, K]."""
    bias: Tensor | None
    """ALiBi's bias [1, H, T, S] of this rank's heads, or sinusoids [S, D] of relative distances, fp32."""


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
        self.positions = PositionTable(config, dtype) if config.positions == "learned" else None
        spec = layer_spec(config)
        self.layers = nn.ModuleList(
            build_module(spec, config=megatron, layer_number=i + 1) for i in range(config.num_layers)
        )
        self.final_norm = build_norm(config.width, kind=config.norm, eps=config.norm_eps, dtype=dtype)
        for name, param in self.named_parameters():
            _tag_frozen(name, param, stride=2 if config.gated else 1)
            if ".extra" not in name:
                param.requires_grad_(False)

    def embed(
        self, tokens_BT: Tensor, *, segments_BT: Tensor | None = None, offset: int = 0
    ) -> tuple[Tensor, BlockInputs]:
        """Embed tokens and prepare what the blocks need of their positions.

        Args:
            tokens_BT: ids below vocab_size + extra_tokens, int64 [B, T].
            segments_BT: packed samples, integer [B, T]: they do not see one another, positions begin anew with each.
            offset: tokens before these, in a cache; not with segments.

        Returns:
            The stream [T, B, D], and the blocks' inputs.

        Raises:
            ValueError: the text is longer than a table of learned positions.
        """
        length, device = tokens_BT.shape[1], tokens_BT.device
        x_BTD = self.vocabulary(tokens_BT)
        if segments_BT is None:
            mask, positions = None, torch.arange(offset, offset + length, device=device)[None]
        else:
            mask, positions = segment_mask(segments_BT), segment_positions(segments_BT)
        rotary = bias = None
        if self.config.positions == "rotary":
            rotary = rotary_angles(positions.T, self.config)[:, :, None]
        elif self.positions is not None:
            x_BTD = x_BTD + self.positions(positions, offset + length)
        elif self.config.positions == "alibi":
            bias = alibi_bias(self._slopes(device), length, offset + length)
        else:
            bias = distance_sinusoids(offset + length, self.config.width, device=device)
        return x_BTD.transpose(0, 1).contiguous(), BlockInputs(mask_B1TT=mask, rotary=rotary, bias=bias)

    def _slopes(self, device: torch.device) -> Tensor:
        """Return ALiBi's slopes [H] of this rank's heads."""
        slopes = alibi_slopes(self.config.num_heads, self.config.alibi_max)
        parts = slopes.chunk(parallel_state.get_tensor_model_parallel_world_size())
        return parts[parallel_state.get_tensor_model_parallel_rank()].to(device)

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


def run_layer(layer: nn.Module, x_TBD: Tensor, inputs: BlockInputs) -> Tensor:
    """Run one decoder block on the stream x_TBD [T, B, D]; the result has its shape."""
    out_TBD: Tensor = layer(
        x_TBD,
        attention_mask=inputs.mask_B1TT,
        rotary_pos_emb=inputs.rotary,
        attention_bias=inputs.bias,
    )[0]
    return out_TBD


def _tag_frozen(name: str, param: nn.Parameter, *, stride: int) -> None:
    """Tag Megatron's own parameters, for the random weights of a run without published ones."""
    if hasattr(param, "flamingo_tag"):
        return
    part, kind = name.split(".")[-2:]
    if "layernorm" in part:
        tag(param, value=1.0 if kind == "weight" else 0.0)
    elif part in ("linear_fc1", "linear_qkv"):
        cut = stride if part == "linear_fc1" else 1
        tag(param, std=0.02 if kind == "weight" else None, partition_dim=0, stride=cut)
    elif kind == "bias":
        tag(param)  # added after the sum over ranks, so whole on each
    else:
        tag(param, std=0.02, partition_dim=1)
