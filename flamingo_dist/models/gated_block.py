"""GATED XATTN-DENSE: the trainable layer before a block of the frozen LM (paper section 3.1.2)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from flamingo_dist.models.feed_forward import Activation, FeedForward, check_activation
from flamingo_dist.models.init import tag
from flamingo_dist.models.linear import (
    column_linear,
    fan_in_std,
    row_linear,
    sum_grad_over_tp,
    tp_share,
)
from flamingo_dist.models.norms import AddNorm, NormKind, build_head_norm, build_norm
from kernels.dispatch import Implementation, check_implementation, gated_xattn


@dataclass(frozen=True, kw_only=True)
class GatedBlockConfig:
    """Shape and variants of a gated cross-attention block. The defaults are the paper's choices."""

    width: int
    """D: width of the LM's stream."""
    media_width: int
    """E: width of the latents, mapped to it linearly where the resampler's is another."""
    heads: int
    """H: attention heads; the tensor-parallel size must divide it."""
    head_dim: int
    """K: width of a head; `heads * head_dim` need not equal `width` (8 x 64 in OpenFlamingo)."""
    ffw_hidden: int
    """Hidden width of the FFW, 4 * `width` in the paper; the tensor-parallel size must divide it."""
    activation: Activation = "sqrelu"
    """FFW activation: squared ReLU in the paper, GELU in OpenFlamingo, SwiGLU in IDEFICS."""
    norm: NormKind = "layer"
    """Norm of the attention's and the FFW's input; the resampler has normalised the latents."""
    norm_eps: float = 1e-5
    """Epsilon of all norms."""
    gate: Literal["scalar", "vector"] = "scalar"
    """One gate for each sub-layer (the paper's), or one for each channel (IDEFICS)."""
    gate_init: float = 0.0
    """Initial gate before tanh. 0 makes the block an identity, so that training starts from the LM itself."""
    qk_norm: bool = False
    """Normalise each head's queries and keys, as IDEFICS does."""
    attend_all: bool = False
    """Let text see all media before it instead of the last one alone; worse in the paper's ablation."""
    init_std: float | None = None
    """Standard deviation of initial weights; None is 1/sqrt(3 * inputs), `nn.Linear`'s own."""
    implementation: Implementation = "auto"
    """Implementation of attention, residual norm and FFW activation, see `kernels.dispatch`."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: a size below 1, or an unknown choice.
        """
        for name in ("width", "media_width", "heads", "head_dim", "ffw_hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"GatedBlockConfig.{name}={getattr(self, name)} must be at least 1.")
        if self.gate not in ("scalar", "vector"):
            raise ValueError(
                f"GatedBlockConfig.gate={self.gate!r} is not known; choose 'scalar' or 'vector'."
            )
        check_activation(self.activation)
        check_implementation(self.implementation)

    def std(self, fan_in: int) -> float:
        """Return the standard deviation of a weight with `fan_in` inputs."""
        return fan_in_std(fan_in) if self.init_std is None else self.init_std


@dataclass(kw_only=True)
class MediaKV:
    """Keys and values of one block's media, kept while generating: latents do not change from token to token.

    Starts empty; the first forward that gets it fills it and later ones read it instead of the latents.
    """

    k_BMRHK: Tensor | None = None
    """[B, M, R, H, K] keys of this rank's heads, after the key norm."""
    v_BMRHK: Tensor | None = None
    """[B, M, R, H, K] values of this rank's heads."""


class CrossAttention(nn.Module):
    """Text rows attend to the latents of their medium; heads tensor-parallel, no biases, no positions."""

    def __init__(self, config: GatedBlockConfig, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        inner = config.heads * config.head_dim
        tp_share(config.heads, "GatedBlockConfig.heads")
        self.config = config
        std_media = config.std(config.media_width)
        self.q = column_linear(config.width, inner, std=config.std(config.width), dtype=dtype)
        self.k = column_linear(config.media_width, inner, std=std_media, sum_input_grad=False, dtype=dtype)
        self.v = column_linear(config.media_width, inner, std=std_media, sum_input_grad=False, dtype=dtype)
        self.out = row_linear(inner, config.width, std=config.std(inner), dtype=dtype)
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if config.qk_norm:
            self.q_norm = build_head_norm(config.head_dim, kind=config.norm, eps=config.norm_eps, dtype=dtype)
            self.k_norm = build_head_norm(config.head_dim, kind=config.norm, eps=config.norm_eps, dtype=dtype)

    def forward(
        self,
        x_TBD: Tensor,
        latents_BMRE: Tensor | None,
        media_index_BT: Tensor,
        gate: Tensor | None,
        media_kv: MediaKV | None = None,
    ) -> Tensor:
        """Return [T, B, D], the gated update; exactly zero in rows whose media index is 0.

        Args:
            x_TBD: [T, B, D] normalised text stream, dtype of the parameters.
            latents_BMRE: [B, M, R, E] floating; may be None where `media_kv` is filled.
            media_index_BT: [B, T] integer, 0 sees nothing, m in 1..M sees medium m - 1.
            gate: 0-dim tanh of the gate, or None.
            media_kv: cache of keys and values, for generation.
        """
        q_TBHK = self.q(x_TBD)[0].unflatten(-1, (-1, self.config.head_dim))
        if self.q_norm is not None:
            q_TBHK = self.q_norm(q_TBHK)
        k_BMRHK, v_BMRHK = self._media(latents_BMRE, x_TBD.dtype, media_kv)
        # Each rank multiplies its own heads by the gate, so it has only their part of the gate's gradient.
        attended_BTHK = gated_xattn(
            q_TBHK.transpose(0, 1),
            k_BMRHK,
            v_BMRHK,
            media_index_BT,
            None if gate is None else sum_grad_over_tp(gate),
            attend_all=self.config.attend_all,
            implementation=self.config.implementation,
        )
        update_TBD: Tensor = self.out(attended_BTHK.transpose(0, 1).flatten(2))[0]
        return update_TBD

    def _media(
        self, latents_BMRE: Tensor | None, dtype: torch.dtype, media_kv: MediaKV | None
    ) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, M, R, H, K], from the cache where it holds them."""
        if media_kv is not None and media_kv.k_BMRHK is not None and media_kv.v_BMRHK is not None:
            return media_kv.k_BMRHK, media_kv.v_BMRHK
        if latents_BMRE is None:
            raise ValueError("latents_BMRE is None and no filled MediaKV was given; pass one of them.")
        latents_BMRE = sum_grad_over_tp(latents_BMRE.to(dtype))
        k_BMRHK: Tensor = self.k(latents_BMRE)[0].unflatten(-1, (-1, self.config.head_dim))
        v_BMRHK: Tensor = self.v(latents_BMRE)[0].unflatten(-1, (-1, self.config.head_dim))
        if self.k_norm is not None:
            k_BMRHK = self.k_norm(k_BMRHK)
        if media_kv is not None:
            media_kv.k_BMRHK, media_kv.v_BMRHK = k_BMRHK, v_BMRHK
        return k_BMRHK, v_BMRHK


class GatedCrossAttentionBlock(nn.Module):
    """x <- x + tanh(a_x) * Attn(LN(x), latents), then x <- x + tanh(a_d) * FFW(LN(x)).

    The FFW runs for every row, with or without an image (paper, OpenFlamingo and IDEFICS alike). The branches
    run in the dtype of the parameters; the stream keeps the dtype of `x`.
    """

    def __init__(self, config: GatedBlockConfig, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        # A vector of one element, not a 0-dim tensor, as in the public checkpoints.
        gate_width = 1 if config.gate == "scalar" else config.width
        self.gate_attn = tag(nn.Parameter(torch.empty(gate_width, dtype=dtype)), value=config.gate_init)
        self.gate_ffw = tag(nn.Parameter(torch.empty(gate_width, dtype=dtype)), value=config.gate_init)
        self.norm_attn = build_norm(config.width, kind=config.norm, eps=config.norm_eps, dtype=dtype)
        self.attn = CrossAttention(config, dtype=dtype)
        self.norm_ffw = AddNorm(
            config.width,
            kind=config.norm,
            eps=config.norm_eps,
            implementation=config.implementation,
            dtype=dtype,
        )
        self.ffw = FeedForward(
            config.width,
            config.ffw_hidden,
            activation=config.activation,
            init_std=config.init_std,
            implementation=config.implementation,
            dtype=dtype,
        )
        self._last_gates: tuple[Tensor, Tensor] | None = None

    def forward(
        self,
        x_TBD: Tensor,
        latents_BMRE: Tensor | None,
        media_index_BT: Tensor,
        *,
        media_kv: MediaKV | None = None,
    ) -> Tensor:
        """Condition the text stream on the media.

        Args:
            x_TBD: [T, B, D] text stream, sequence first, floating.
            latents_BMRE: [B, M, R, E] latents of the resampler, floating; None where `media_kv` is filled.
            media_index_BT: [B, T] integer; m in 1..M sees medium m - 1 of axis M, 0 sees nothing.
            media_kv: this block's cache of keys and values while generating.

        Returns:
            [T, B, D] in the dtype of `x_TBD`; equal to it while both gates are 0.

        Raises:
            ValueError: shapes that do not fit, or a media index above M.
        """
        gate_attn, gate_ffw = self.gate_attn.tanh(), self.gate_ffw.tanh()
        self._last_gates = (gate_attn.detach(), gate_ffw.detach())
        scalar = self.config.gate == "scalar"
        # A scalar gate commutes with the output projection, so the attention function multiplies by it.
        update_TBD = self.attn(
            self.norm_attn(x_TBD),
            latents_BMRE,
            media_index_BT,
            gate_attn.squeeze(0) if scalar else None,
            media_kv,
        )
        x_TBD, normed_TBD = self.norm_ffw(x_TBD, update_TBD, None if scalar else gate_attn)
        update_TBD = self.ffw(normed_TBD, gate_ffw.squeeze(0) if scalar else gate_ffw)
        return x_TBD + update_TBD.to(x_TBD.dtype)

    def gates(self) -> tuple[Tensor, Tensor]:
        """Return tanh of the attention gate and of the FFW gate, for logging.

        As the last forward used them, so that nothing has to be gathered under ZeRO-3; before any
        forward, from the parameters.

        Returns:
            two detached fp32 tensors, 0-dim for scalar gates, [D] for vector gates.

        Raises:
            RuntimeError: ZeRO-3 has partitioned the gates and no forward has run yet.
        """
        if self._last_gates is None:
            if self.gate_attn.numel() == 0:
                raise RuntimeError("the gates are partitioned by ZeRO-3; run a forward before reading them.")
            gates = (self.gate_attn.detach().tanh(), self.gate_ffw.detach().tanh())
        else:
            gates = self._last_gates
        attn, ffw = (gate.float().squeeze() for gate in gates)
        return attn, ffw
