"""Perceiver Resampler: any number of visual features to a fixed number of latents (paper section 3.1.1)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

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
from flamingo_dist.models.norms import NormKind, build_head_norm, build_norm
from kernels.dispatch import Implementation, check_implementation, perceiver_attn


@dataclass(frozen=True, kw_only=True)
class ResamplerConfig:
    """Shape and variants of the Perceiver Resampler. The defaults are the paper's (Table 4)."""

    feature_width: int
    """C: channels of the vision encoder's features; mapped linearly to `width` where they differ."""
    width: int = 1536
    """E: width of the latents, and of the keys and values that the gated blocks read."""
    depth: int = 6
    """Number of layers, each with weights of its own."""
    latents: int = 64
    """R: latents that an image or video becomes."""
    heads: int = 16
    """H: attention heads; the tensor-parallel size must divide it."""
    head_dim: int = 96
    """K: width of a head; `heads * head_dim` need not equal `width`."""
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
    implementation: Implementation = "auto"
    """Attention implementation, see `kernels.dispatch`."""

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
        self.q = column_linear(width, inner, std=std, dtype=dtype)
        self.k = column_linear(width, inner, std=std, sum_input_grad=False, dtype=dtype)
        self.v = column_linear(width, inner, std=std, sum_input_grad=False, dtype=dtype)
        self.out = row_linear(inner, width, std=config.std(inner), dtype=dtype)
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if config.qk_norm:
            self.q_norm = build_head_norm(config.head_dim, kind=config.norm, eps=config.norm_eps, dtype=dtype)
            self.k_norm = build_head_norm(config.head_dim, kind=config.norm, eps=config.norm_eps, dtype=dtype)

    def forward(self, features_NJE: Tensor, latents_NRE: Tensor, feature_mask_NJ: Tensor | None) -> Tensor:
        """Return [N, R, E], the update of the latents.

        Args:
            features_NJE: [N, J, E] features of all frames, dtype of the parameters.
            latents_NRE: [N, R, E], dtype of the parameters.
            feature_mask_NJ: bool [N, J], False for padding, or None.
        """
        features = features_NJE.shape[1]
        latents_NRE = self.norm_latents(latents_NRE)
        context = torch.cat((self.norm_features(features_NJE), latents_NRE), dim=1)
        context = sum_grad_over_tp(context)
        q = self.q(latents_NRE)[0].unflatten(-1, (-1, self.head_dim))
        k = self.k(context)[0].unflatten(-1, (-1, self.head_dim))
        v = self.v(context)[0].unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        attended_NRHK = perceiver_attn(
            q,
            k[:, :features],
            v[:, :features],
            k[:, features:],
            v[:, features:],
            feature_mask_NJ,
            implementation=self.implementation,
        )
        update_NRE: Tensor = self.out(attended_NRHK.flatten(2))[0]
        return update_NRE


class PerceiverLayer(nn.Module):
    """One layer: x <- x + Attn(q=x, kv=[features, x]), then x <- x + FFW(x)."""

    def __init__(self, config: ResamplerConfig, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.attn = PerceiverAttention(config, dtype=dtype)
        self.norm_ffw = build_norm(config.width, kind=config.norm, eps=config.norm_eps, dtype=dtype)
        self.ffw = FeedForward(
            config.width,
            config.ffw_width,
            activation=config.activation,
            init_std=config.init_std,
            dtype=dtype,
        )

    def forward(self, features_NJE: Tensor, latents_NRE: Tensor, feature_mask_NJ: Tensor | None) -> Tensor:
        """Return the new latents [N, R, E]; features [N, J, E] stay as they are."""
        latents_NRE = latents_NRE + self.attn(features_NJE, latents_NRE, feature_mask_NJ)
        updated_NRE: Tensor = latents_NRE + self.ffw(self.norm_ffw(latents_NRE))
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

    def forward(self, features_NFSC: Tensor, frame_mask_NF: Tensor | None = None) -> Tensor:
        """Resample (paper section 3.1.1 and the pseudo-code of appendix A.1.1).

        Args:
            features_NFSC: [N, F, S, C] floating features of the vision encoder; an image has F = 1.
            frame_mask_NF: bool [N, F], False for a frame that is padding; None if all are real.

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
        x_NRE = self.latents.expand(n, -1, -1)
        for layer in self.layers:
            x_NRE = layer(features_NJE, x_NRE, mask_NJ)
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
