"""Floating-point operations of a step, by part: a multiplication and an addition are two."""

from dataclasses import dataclass

from flamingo_dist.models.flamingo import FlamingoConfig
from flamingo_dist.models.lm_config import LMConfig
from flamingo_dist.models.recompute import Recompute
from flamingo_dist.planning.vision import vision_flops
from flamingo_dist.planning.workload import DatasetShape, Workload


@dataclass(frozen=True, kw_only=True)
class PartFlops:
    """One part's operations in one forward and backward."""

    linear: float = 0.0
    """Forward of linear layers and convolutions."""
    attention: float = 0.0
    """Forward of the scores and the weighted sum."""
    trainable: bool = True
    """Whether the weights want gradients."""
    differentiated: bool = True
    """Whether a backward runs through the part at all."""
    recomputed: bool = False
    """Whether checkpointing runs the forward again."""
    skipped: float = 0.0
    """Forward operations that the recomputation leaves out: it stops once the last tensor that a backward needs
    is there, and the last product of a frozen block keeps nothing. (megatron-core's own layer, at TP > 1, runs it.)"""
    no_input_gradient: float = 0.0
    """Forward operations of layers whose input wants no gradient."""

    @property
    def forward(self) -> float:
        """Operations of the forward."""
        return self.linear + self.attention

    @property
    def backward_linear(self) -> float:
        """Backward of linear layers: input gradients, and weight gradients where weights are trained."""
        both = self.linear * (self.trainable + 1) - self.no_input_gradient
        return both if self.differentiated else 0.0

    @property
    def backward_attention(self) -> float:
        """Backward of attention: the four products that it needs, twice the forward."""
        return 2 * self.attention if self.differentiated else 0.0

    @property
    def useful(self) -> float:
        """Forward and backward without recomputation."""
        return self.forward + self.backward_linear + self.backward_attention

    @property
    def recompute(self) -> float:
        """Operations of the second forward."""
        return self.forward - self.skipped if self.recomputed else 0.0


def dataset_flops(
    model: FlamingoConfig, data: DatasetShape, *, checkpointing: Recompute
) -> dict[str, PartFlops]:
    """Return the operations of one global batch of a data set, by part, whatever the layout.

    Every token is taken to carry loss and every slot to hold a medium: an upper bound. Causal attention counts
    the half that is not masked, cross-attention the one medium that a token sees.

    Args:
        model: the network.
        data: the batch.
        checkpointing: what of the LM's blocks and the gated blocks is recomputed.
    """
    tokens, media = data.rows * data.tokens, data.rows * data.media
    lm = model.lm
    distances, scores = relative_flops(lm, data)
    return {
        "vision": PartFlops(
            linear=media * data.frames * vision_flops(model.vision) if data.pixels else 0.0,
            trainable=False,
            differentiated=False,
        ),
        "resampler": resampler(model, media, data.frames),
        "gated": gated(model, tokens, media, data.media, recomputed=checkpointing is True),
        "lm": PartFlops(
            linear=2.0 * tokens * lm.num_layers * _lm_weights(model) + distances + scores,
            attention=2.0 * tokens * (data.tokens + 1) * lm.num_layers * lm.num_heads * lm.head_dim,
            trainable=False,
            skipped=2.0 * tokens * lm.num_layers * lm.width * lm.ffn_width,
            recomputed=bool(checkpointing),
            no_input_gradient=distances,
        ),
        "head": PartFlops(linear=2.0 * tokens * lm.width * lm.vocab_size, trainable=False),
    }


def relative_flops(lm: LMConfig, data: DatasetShape) -> tuple[float, float]:
    """Return the forward operations that relative positions add to all blocks.

    First the projection of the distances: once for a batch, whatever its rows, by every data-parallel rank, of which
    one is counted. Then the scores of queries and distances, of which none is masked before the shift; their
    backward is one product, as a linear layer's with frozen weights is.
    """
    if lm.positions != "relative":
        return 0.0, 0.0
    inner = lm.num_layers * lm.num_heads * lm.head_dim
    return 2.0 * data.tokens * lm.width * inner, 2.0 * data.rows * data.tokens**2 * inner


def _lm_weights(model: FlamingoConfig) -> int:
    """Return the matrix elements of one LM block."""
    lm = model.lm
    attention = (2 * lm.num_heads + 2 * lm.num_kv_heads) * lm.head_dim * lm.width
    return attention + lm.width * lm.ffn_width * (3 if lm.gated else 2)


def resampler(model: FlamingoConfig, media: int, frames: int) -> PartFlops:
    """Return the operations of resampling `media` media of `frames` frames, and of mapping their latents."""
    r = model.resampler
    inner, features = r.heads * r.head_dim, frames * model.vision.num_features
    ffw = r.ffw_mult * r.width * r.width * (3 if r.activation == "silu_gated" else 2)
    latents = r.latents * (4 * r.width * inner + ffw)
    linear = r.depth * (latents + features * 2 * r.width * inner)
    # The projection reads the frozen encoder's features.
    project = features * r.feature_width * r.width if r.feature_width != r.width else 0
    media_map = r.latents * r.width * model.gated.media_width if model.maps_media else 0
    attention = r.depth * 2 * r.latents * (features + r.latents) * inner
    return PartFlops(
        linear=2.0 * media * (linear + project + media_map),
        attention=2.0 * media * attention,
        no_input_gradient=2.0 * media * project,
    )


def gated(
    model: FlamingoConfig, tokens: int, media: int, media_a_row: int, *, recomputed: bool = False
) -> PartFlops:
    """Return the operations of all gated blocks on `tokens` tokens and `media` media."""
    g, blocks, latents = model.gated, len(model.gated_positions()), model.resampler.latents
    inner = g.heads * g.head_dim
    ffw = g.width * g.ffw_hidden * (3 if g.activation == "silu_gated" else 2)
    linear = tokens * (2 * g.width * inner + ffw) + media * latents * 2 * g.media_width * inner
    seen = latents * (media_a_row if g.attend_all else 1)
    return PartFlops(
        linear=2.0 * blocks * linear, attention=4.0 * blocks * tokens * seen * inner, recomputed=recomputed
    )


def step_flops(work: Workload) -> dict[str, dict[str, float]]:
    """Return a step's operations over all GPUs: forward, backward and recompute of every part."""
    parts: dict[str, dict[str, float]] = {}
    for data in work.datasets:
        flops = dataset_flops(work.model, data, checkpointing=work.parallel.activation_checkpointing)
        for name, part in flops.items():
            sums = parts.setdefault(name, {"forward": 0.0, "backward": 0.0, "recompute": 0.0})
            sums["forward"] += part.forward
            sums["backward"] += part.useful - part.forward
            sums["recompute"] += part.recompute
    return parts
