"""Perceiver Resampler: any number of visual features to a fixed number of latents (paper section 3.1.1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flamingo_dist.models.feed_forward import Activation, FeedForward, check_activation
from flamingo_dist.models.init import tag
from flamingo_dist.models.linear import (
    column_linear,
    fan_in_std,
    replicated_linear,
    row_linear,
    sum_grad_over_tp,
    tp_share,
)
from flamingo_dist.models.norms import AddNorm, NormKind, build_head_norm, build_norm
from kernels.dispatch import Implementation, check_implementation, perceiver_attn

FeatureKV = tuple[Tensor, Tensor]
"""Keys and values of the features for one layer, each [N, J, H, K]."""


@dataclass(frozen=True, kw_only=True)
class ResamplerConfig:
    """Shape and variants of the Perceiver Resampler. The defaults are the paper's (Table 4)."""

    feature_width: int
    """C: channels of the vision encoder's features; mapped linearly to `width` where they differ."""
    width: int = 1536
    """E: width of the latents."""
    depth: int = 6
    """Number of layers, each with weights of its own."""
    latents: int = 64
    """R: latents that an image or video becomes."""
    heads: int = 16
    """H: attention heads; the tensor-parallel size must divide it."""
    head_dim: int = 96
    """K: width of a head; `heads * head_dim` need not equal `width`. This is 1536 / 16, as the paper's text has it;
    its table 5 counts 128 (docs/language-models.md)."""
    ffw_mult: int = 4
    """Hidden width of the FFW as a multiple of `width`; the tensor-parallel size must divide the product."""
    activation: Activation = "sqrelu"
    """FFW activation: squared ReLU in the paper, GELU in OpenFlamingo, ReLU in IDEFICS."""
    frames: int = 8
    """F at training: number of learnt temporal embeddings. Longer videos get them interpolated."""
    norm: NormKind = "layer"
    """Normalisation of attention inputs, FFW inputs and the result."""
    norm_eps: float = 1e-5
    """Epsilon of all norms."""
    qk_norm: bool = False
    """Normalise each head's queries and keys, as IDEFICS does."""
    init_std: float | None = None
    """Standard deviation of initial weights; None is 1/sqrt(3 * inputs), `nn.Linear`'s own."""
    latents_std: float = 0.02
    """Standard deviation of the initial latents (the paper gives none; public implementations draw at 1). Small,
    because they stay in the residual stream: at 1 they drown what attention adds, and 3% of the output's energy
    differs between images at the demonstration's size, against 59% at 0.02."""
    frames_std: float = 0.02
    """Standard deviation of the initial temporal embeddings: small beside normalised features."""
    shared_feature_kv: bool = False
    """Normalise the features once and compute all layers' keys and values of them in one matrix product, each
    layer's scale and shift folded into its weights: the same function of the same parameters. Faster, and holds
    `depth` times the keys and values at once (2 GB in bf16 for 64 videos of 800 features at the defaults)."""
    implementation: Implementation = "auto"
    """Implementation of attention, residual norm and FFW activation, see `kernels.dispatch`."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: a size below 1, or an unknown choice.
        """
        for name in (
            "feature_width",
            "width",
            "depth",
            "latents",
            "heads",
            "head_dim",
            "ffw_mult",
            "frames",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"ResamplerConfig.{name}={getattr(self, name)} must be at least 1.")
        check_activation(self.activation)
        check_implementation(self.implementation)

    @property
    def ffw_width(self) -> int:
        """Hidden width of the FFW."""
        return self.ffw_mult * self.width

    def std(self, fan_in: int) -> float:
        """Return the standard deviation of a weight with `fan_in` inputs."""
        return fan_in_std(fan_in) if self.init_std is None else self.init_std


class PerceiverAttention(nn.Module):
    """Latents attend to features and to themselves; pre-norm on both, no biases, heads tensor-parallel."""

    def __init__(self, config: ResamplerConfig, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        width, inner = config.width, config.heads * config.head_dim
        tp_share(config.heads, "ResamplerConfig.heads")
        self.head_dim = config.head_dim
        self.implementation = config.implementation
        self.norm_features = build_norm(width, kind=config.norm, eps=config.norm_eps, dtype=dtype)
        self.norm_latents = build_norm(width, kind=config.norm, eps=config.norm_eps, dtype=dtype)
        std = config.std(width)
        self.q = column_linear(width, inner, std=std, sum_input_grad=False, dtype=dtype)
        self.k = column_linear(width, inner, std=std, sum_input_grad=False, dtype=dtype)
        self.v = column_linear(width, inner, std=std, sum_input_grad=False, dtype=dtype)
        self.out = row_linear(inner, width, std=config.std(inner), dtype=dtype)
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if config.qk_norm:
            self.q_norm = build_head_norm(config.head_dim, kind=config.norm, eps=config.norm_eps, dtype=dtype)
            self.k_norm = build_head_norm(config.head_dim, kind=config.norm, eps=config.norm_eps, dtype=dtype)

    def forward(
        self,
        features_NJE: Tensor,
        latents_NRE: Tensor,
        feature_mask_NJ: Tensor | None,
        feature_kv: FeatureKV | None = None,
    ) -> Tensor:
        """Return [N, R, E], the update of the latents.

        Args:
            features_NJE: [N, J, E] features of all frames, dtype of the parameters; not read with `feature_kv`.
            latents_NRE: [N, R, E], dtype of the parameters.
            feature_mask_NJ: bool [N, J], False for padding, or None.
            feature_kv: keys before the key norm and values of the features, each [N, J, H, K], if they exist.
        """
        latents_NRE = sum_grad_over_tp(self.norm_latents(latents_NRE))
        q_NRHK, k_lat, v_lat = (self._heads(project(latents_NRE)[0]) for project in (self.q, self.k, self.v))
        if feature_kv is None:
            features_NJE = sum_grad_over_tp(self.norm_features(features_NJE))
            feature_kv = (self._heads(self.k(features_NJE)[0]), self._heads(self.v(features_NJE)[0]))
        k_feat, v_feat = feature_kv
        if self.q_norm is not None and self.k_norm is not None:
            q_NRHK, k_feat, k_lat = self.q_norm(q_NRHK), self.k_norm(k_feat), self.k_norm(k_lat)
        attended_NRHK = perceiver_attn(
            q_NRHK, k_feat, v_feat, k_lat, v_lat, feature_mask_NJ, implementation=self.implementation
        )
        update_NRE: Tensor = self.out(attended_NRHK.flatten(2))[0]
        return update_NRE

    def _heads(self, x: Tensor) -> Tensor:
        """Return x of shape [N, J, H * K] as [N, J, H, K]."""
        return x.unflatten(-1, (-1, self.head_dim))


class PerceiverLayer(nn.Module):
    """One layer: x <- x + Attn(q=x, kv=[features, x]), then x <- x + FFW(x)."""

    def __init__(self, config: ResamplerConfig, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.attn = PerceiverAttention(config, dtype=dtype)
        self.norm_ffw = AddNorm(
            config.width,
            kind=config.norm,
            eps=config.norm_eps,
            implementation=config.implementation,
            dtype=dtype,
        )
        self.ffw = FeedForward(
            config.width,
            config.ffw_width,
            activation=config.activation,
            init_std=config.init_std,
            implementation=config.implementation,
            dtype=dtype,
        )

    def forward(
        self,
        features_NJE: Tensor,
        latents_NRE: Tensor,
        feature_mask_NJ: Tensor | None,
        feature_kv: FeatureKV | None = None,
    ) -> Tensor:
        """Return the new latents [N, R, E].

        Args:
            features_NJE: [N, J, E] features of all frames, which stay as they are.
            latents_NRE: [N, R, E].
            feature_mask_NJ: bool [N, J], False for padding, or None.
            feature_kv: the features' keys and values for this layer, each [N, J, H, K], if they exist.
        """
        update_NRE = self.attn(features_NJE, latents_NRE, feature_mask_NJ, feature_kv)
        latents_NRE, normed_NRE = self.norm_ffw(latents_NRE, update_NRE)
        updated_NRE: Tensor = latents_NRE + self.ffw(normed_NRE)
        return updated_NRE


class PerceiverResampler(nn.Module):
    """Turns the features of N images or videos into R latents each."""

    def __init__(self, config: ResamplerConfig, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.latents = tag(
            nn.Parameter(torch.empty(config.latents, config.width, dtype=dtype)), std=config.latents_std
        )
        self.frame_embeddings = tag(
            nn.Parameter(torch.empty(config.frames, config.width, dtype=dtype)), std=config.frames_std
        )
        self.project: nn.Module | None = None
        if config.feature_width != config.width:
            self.project = replicated_linear(
                config.feature_width, config.width, std=config.std(config.feature_width), dtype=dtype
            )
        self.layers = nn.ModuleList(PerceiverLayer(config, dtype=dtype) for _ in range(config.depth))
        self.norm = build_norm(config.width, kind=config.norm, eps=config.norm_eps, dtype=dtype)
        if config.shared_feature_kv:
            self.register_forward_pre_hook(_add_anchor, with_kwargs=True)

    def forward(
        self, features_NFSC: Tensor, frame_mask_NF: Tensor | None = None, anchor: Tensor | None = None
    ) -> Tensor:
        """Resample (paper section 3.1.1 and the pseudo-code of appendix A.1.1).

        Args:
            features_NFSC: [N, F, S, C] floating features of the vision encoder; an image has F = 1.
            frame_mask_NF: bool [N, F], False for a frame that is padding; None if all are real.
            anchor: 0-dim zero that a hook passes where ZeRO-3 needs it, see `_add_anchor`; not for callers.

        Returns:
            [N, R, E] latents in the dtype of the parameters.

        Raises:
            ValueError: the shape does not fit the configuration, or a video for a resampler with one temporal
                embedding, which could not tell its frames apart.
        """
        self._check(features_NFSC, frame_mask_NF)
        n, frames, spatial, _ = features_NFSC.shape
        # The encoder is frozen and its features may be stored in half precision.
        features = features_NFSC.to(self.latents.dtype)
        if self.project is not None:
            features = self.project(features)
        features = features + interpolate_frames(self.frame_embeddings, frames)[:, None, :]
        features_NJE = features.flatten(1, 2)
        mask_NJ = None if frame_mask_NF is None else frame_mask_NF.repeat_interleave(spatial, dim=1)
        latents_RE = self.latents if anchor is None else self.latents + anchor
        x_NRE = latents_RE.expand(n, -1, -1)
        shared: list[FeatureKV | None] = [None] * len(self.layers)
        if self.config.shared_feature_kv:
            attentions = [cast(PerceiverLayer, layer).attn for layer in self.layers]
            shared = [*shared_feature_kv(features_NJE, attentions)]
        for layer, feature_kv in zip(self.layers, shared, strict=True):
            x_NRE = layer(features_NJE, x_NRE, mask_NJ, feature_kv)
        out_NRE: Tensor = self.norm(x_NRE)
        return out_NRE

    def _check(self, features_NFSC: Tensor, frame_mask_NF: Tensor | None) -> None:
        """Raise `ValueError` unless the inputs fit the configuration."""
        shape = tuple(features_NFSC.shape)
        if len(shape) != 4 or shape[3] != self.config.feature_width or shape[1] < 1:
            raise ValueError(
                f"features are {shape}; expected [N, F, S, C] with F >= 1 and C = feature_width = "
                f"{self.config.feature_width}."
            )
        if shape[1] > 1 and self.config.frames == 1:
            raise ValueError(
                f"features hold {shape[1]} frames, but the resampler has one temporal embedding, so their "
                "order would be lost. Set ResamplerConfig.frames to the number of frames of training."
            )
        if frame_mask_NF is not None and tuple(frame_mask_NF.shape) != shape[:2]:
            raise ValueError(f"frame_mask_NF is {tuple(frame_mask_NF.shape)}; expected [N, F] = {shape[:2]}.")


def _add_anchor(
    resampler: PerceiverResampler, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pass the resampler a 0-dim zero that wants a gradient.

    With shared keys and values ZeRO-3 gathers the resampler as one unit, and lets go of its weights when the
    gradients of the unit's inputs are there. Features of a frozen encoder want none, and DeepSpeed would let go
    before the backward has begun. The anchor's gradient is the last thing that the unit's backward computes.
    """
    latents = resampler.latents
    anchor = torch.zeros(
        (), dtype=latents.dtype, device=latents.device, requires_grad=torch.is_grad_enabled()
    )
    # By position: DeepSpeed looks at no other arguments.
    args += tuple(kwargs.pop(name, None) for name in ("features_NFSC", "frame_mask_NF")[len(args) :])
    return (*args, anchor), kwargs


def shared_feature_kv(features_NJE: Tensor, attentions: Sequence[PerceiverAttention]) -> list[FeatureKV]:
    """Return the features' keys (before the key norm) and values for every layer, from one matrix product.

    With x the normalised features before any scale or shift, layer l's keys are
    (x * scale_l + shift_l) Wk_l^T = x (Wk_l * scale_l)^T + Wk_l shift_l, and its values alike: only the weights
    depend on the layer. They are read outside of the layers' forward, so ZeRO-3 has to gather the resampler as one
    unit (`Flamingo.gather_units`).

    Args:
        features_NJE: [N, J, E] features of all frames, dtype of the parameters.
        attentions: the layers' attention modules.

    Returns:
        For each layer keys and values, each [N, J, H, K], views of one tensor.
    """
    norms = [attention.norm_features for attention in attentions]
    # Each rank multiplies the scale, the shift and the features with its own heads' weights alone.
    vectors: list[list[Tensor]] = [
        [norm.weight] if norm.bias is None else [norm.weight, norm.bias] for norm in norms
    ]
    vectors_LPE = sum_grad_over_tp(torch.stack([torch.stack(layer) for layer in vectors]))
    normed_NJE = sum_grad_over_tp(norms[0].without_affine(features_NJE))
    weights_L2IE = torch.stack([torch.stack((a.k.weight, a.v.weight)) for a in attentions])
    folded = (weights_L2IE * vectors_LPE[:, None, None, 0]).flatten(0, 2)
    bias = None
    if vectors_LPE.shape[1] == 2:
        bias = (weights_L2IE @ vectors_LPE[:, 1, None, :, None]).flatten()
    kv = F.linear(normed_NJE, folded, bias).unflatten(-1, (2 * len(attentions), -1, attentions[0].head_dim))
    # One unbind over layers and kinds: its backward is one stack, where a slice's would fill the whole with zeros.
    parts = kv.unbind(2)
    return list(zip(parts[::2], parts[1::2], strict=True))


def interpolate_frames(embeddings_FE: Tensor, frames: int) -> Tensor:
    """Return temporal embeddings for `frames` frames.

    Up to the trained number the first ones are taken as they are, so that an image is frame 0 and a short
    clip the beginning of a clip. More frames (the paper evaluates at 30 after training at 8) get a linear
    interpolation whose first and last frame have the first and last embedding.

    Args:
        embeddings_FE: [F, E] learnt embeddings.
        frames: number of frames wanted, at least 1.

    Returns:
        [frames, E], dtype of the embeddings.
    """
    trained = embeddings_FE.shape[0]
    if frames <= trained:
        return embeddings_FE[:frames]
    # In integers, so that bf16 embeddings do not coarsen the positions.
    position = torch.arange(frames, device=embeddings_FE.device) * (trained - 1)
    low = position // (frames - 1)
    weight = ((position % (frames - 1)) / (frames - 1)).to(embeddings_FE.dtype)[:, None]
    high = (low + 1).clamp(max=trained - 1)
    return embeddings_FE[low] * (1 - weight) + embeddings_FE[high] * weight
