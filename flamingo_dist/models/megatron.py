"""The frozen language model's blocks: megatron-core `TransformerLayer` by spec, on every device.

megatron-core's `GPTModel` needs CUDA (its rotary embedding asks for a device), its layers do not. The spec
here names tensor-parallel linear layers, torch's own norms and a core attention on
`scaled_dot_product_attention`; positions are computed by `LanguageModel.embed` and passed in.
Shapes are sequence-first, as Megatron's are: x_TBD is [T, B, D].
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from flamingo_dist.models.attention import CausalAttention, RelativeAttention
from flamingo_dist.models.init import tag
from flamingo_dist.models.linear import (
    ColumnLinear,
    RowLinear,
    sum_grad_over_tp,
    sum_over_tp,
    tp_share,
    tp_size,
)
from flamingo_dist.models.lm_config import LMConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu_gated": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class BlockNorm:
    """torch's norm of the LM's kind, in the dtype of the LM's parameters; a class because specs want one."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float, *, kind: str) -> Any:
        """Return the norm over `hidden_size` channels."""
        if kind == "rms":
            return nn.RMSNorm(hidden_size, eps=eps, dtype=config.params_dtype)
        return nn.LayerNorm(hidden_size, eps=eps, bias=kind == "layer", dtype=config.params_dtype)


class WidthNorm(nn.Module):
    """A norm over all heads of the queries or keys together (MPT-1B); the heads are tensor-parallel."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float, *, kind: str, heads: int
    ) -> None:
        super().__init__()
        self.kind, self.eps, self.count = kind, eps, heads * hidden_size
        shape = (tp_share(heads, "lm.num_heads or lm.num_kv_heads"), hidden_size)
        empty = partial(torch.empty, shape, dtype=config.params_dtype)
        self.weight = tag(nn.Parameter(empty()), value=1.0, partition_dim=0)
        bias = tag(nn.Parameter(empty()), partition_dim=0) if kind == "layer" else None
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)

    def forward(self, x_TBHK: Tensor) -> Tensor:
        """Normalise x_TBHK [T, B, H, K] of this rank's heads over the heads of all ranks; dtype of x."""
        if tp_size() == 1:
            flat, weight = x_TBHK.flatten(-2), self.weight.flatten()
            if self.kind == "rms":
                return F.rms_norm(flat, weight.shape, weight, self.eps).view_as(x_TBHK)
            bias = None if self.bias is None else self.bias.flatten()
            return F.layer_norm(flat, weight.shape, weight, bias, self.eps).view_as(x_TBHK)
        x = x_TBHK.float()
        if self.kind != "rms":
            x = x - _sum_over_tp(x.sum((-2, -1), keepdim=True)) / self.count
        variance = _sum_over_tp(x.square().sum((-2, -1), keepdim=True)) / self.count
        out = x * (variance + self.eps).rsqrt() * self.weight
        return (out if self.bias is None else out + self.bias).to(x_TBHK.dtype)


def _sum_over_tp(x: Tensor) -> Tensor:
    """Return the sum of x (any shape) over the group, of which every rank uses its own part of the gradient."""
    if tp_size() == 1:
        return x
    reduce = sum_over_tp if torch.compiler.is_compiling() else reduce_from_tensor_model_parallel_region
    return sum_grad_over_tp(reduce(x.contiguous()))


_MLP_PARTS = MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear)


class GatedMLP(MLP):
    """megatron-core's MLP with a SiLU gate, keeping the two halves for the backward and nothing made of them.

    megatron-core's own eager path adds an offset of zero to the linear half, a copy of it for nothing, and autograd
    keeps that and the gate besides: four hidden widths a token instead of two.
    """

    def __init__(self, config: TransformerConfig) -> None:
        """Make the two layers."""
        super().__init__(config, submodules=_MLP_PARTS)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
        """Map hidden_states [T, B, D] to [T, B, D], and the bias that is to be added or None."""
        both, bias = self.linear_fc1(hidden_states)
        output: tuple[Tensor, Tensor | None] = self.linear_fc2(
            _silu_gate(both if bias is None else both + bias)
        )
        return output


def _silu_gate(both: Tensor) -> Tensor:
    """Return silu(a) * b, [..., F], of [..., a | b]; a compiler chooses by itself what it keeps."""
    if torch.compiler.is_compiling():
        gate, up = both.chunk(2, -1)
        return F.silu(gate) * up
    gated: Tensor = _SiLUGate.apply(both)
    return gated


class _SiLUGate(torch.autograd.Function):
    """silu(a) * b of [..., a | b], which is all that is kept."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        """Return [..., F] of [..., 2 F]."""
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Return the gradient [..., 2 F] of that of the result [..., F]."""
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, -1)
        grad = torch.empty_like(both)
        of_gate, of_up = grad.chunk(2, -1)
        torch.mul(F.silu(gate), grads[0], out=of_up)
        torch.ops.aten.silu_backward.grad_input(grads[0] * up, gate, grad_input=of_gate)
        return grad


class ClippedColumnLinear(ColumnLinear):
    """A column-parallel layer whose output is clamped (MPT's `clip_qkv`)."""

    def __init__(self, *args: Any, clip: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.clip = clip

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Map input_ of shape [..., in] to shape [..., out / tp size], clamped."""
        output, bias = super().forward(input_, *args, **kwargs)
        return output.clamp(-self.clip, self.clip), bias


def transformer_config(config: LMConfig, *, dtype: torch.dtype, tp_size: int) -> TransformerConfig:
    """Return megatron-core's configuration for the LM `config` with parameters of `dtype`."""
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.width,
        num_attention_heads=config.num_heads,
        num_query_groups=config.num_kv_heads,
        kv_channels=config.head_dim,
        ffn_hidden_size=config.ffn_width,
        normalization="RMSNorm" if config.norm == "rms" else "LayerNorm",
        layernorm_epsilon=config.norm_eps,
        gated_linear_unit=config.gated,
        activation_func=ACTIVATIONS[config.activation],
        add_bias_linear=config.bias == "all",
        add_qkv_bias=config.bias != "none",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp_size,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,
        # Fused parts are CUDA-only (Transformer Engine, Apex); the plain ones run everywhere.
        apply_rope_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )


def layer_spec(config: LMConfig) -> ModuleSpec:
    """Return the spec of one decoder block of `config`: pre-norm self-attention and MLP, no fused part."""
    norm = ModuleSpec(module=BlockNorm, params={"kind": config.norm})
    clip = config.clip_qkv
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnLinear if clip is None else partial(ClippedColumnLinear, clip=clip),
                    core_attention=RelativeAttention if config.positions == "relative" else CausalAttention,
                    linear_proj=RowLinear,
                    q_layernorm=_qk_norm(config, config.num_heads),
                    k_layernorm=_qk_norm(config, config.num_kv_heads),
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            # Of a spec with a class of ours Megatron would say at each layer that it does not know it.
            mlp=GatedMLP if config.gated else ModuleSpec(module=MLP, submodules=_MLP_PARTS),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _qk_norm(config: LMConfig, heads: int) -> Any:
    """Return the spec of the norm of queries or keys of `heads` heads."""
    if config.qk_norm == "none":
        return IdentityOp
    if config.qk_norm == "head":
        return ModuleSpec(module=BlockNorm, params={"kind": config.norm})
    return ModuleSpec(module=WidthNorm, params={"kind": config.norm, "heads": heads})
