"""Parameters of every component of a network, on one tensor-parallel rank."""

from dataclasses import dataclass

from flamingo_dist.models.flamingo import FlamingoConfig
from flamingo_dist.models.fp8_product import check_fp8_shape
from flamingo_dist.models.gated_block import GatedBlockConfig
from flamingo_dist.models.lm_config import LMConfig
from flamingo_dist.models.resampler import ResamplerConfig
from flamingo_dist.models.vocabulary import padded_vocab_size
from flamingo_dist.planning.vision import vision_values


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Elements on one tensor-parallel rank."""

    vision: int
    """Frozen encoder, whole on every rank."""
    resampler: int
    """Trainable Perceiver Resampler."""
    media_map: int
    """Trainable map of the latents to the gated blocks' media width; 0 where they are as wide."""
    gated: int
    """Trainable gated blocks, all of them."""
    extra: int
    """Trainable rows of the vocabulary, of the embedding and of the head."""
    lm_blocks: int
    """Frozen LM blocks, final norm and learned positions."""
    vocabulary: int
    """Frozen embedding, and head where it is not tied."""
    lm_block: int
    """One LM block."""
    gated_block: int
    """One gated block."""
    lm_matrices: int
    """Of `lm_blocks`, the matrices, which `LMConfig.weight_storage` may keep in one byte a value."""
    lm_channels: int
    """Output channels of those matrices; each has a scale then."""
    largest_matrix: int
    """The largest of those matrices."""

    @property
    def trainable(self) -> int:
        """Elements that hold gradients and optimizer state."""
        return self.resampler + self.media_map + self.gated + self.extra

    @property
    def frozen_lm(self) -> int:
        """Frozen elements but the encoder's, which are buffers that ZeRO never meets."""
        return self.lm_blocks + self.vocabulary


def count_parameters(model: FlamingoConfig, tp: int = 1) -> ParameterCounts:
    """Count the parameters of one rank.

    Args:
        model: the network.
        tp: tensor-parallel degree; must divide what it cuts.
    """
    lm, gated = model.lm, gated_block(model.gated, tp)
    block = lm_block(lm, tp)
    vocabulary = padded_vocab_size(lm.vocab_size, tp) // tp * lm.width
    matrices = lm_matrices(lm, tp)
    return ParameterCounts(
        vision=vision_values(model.vision),
        resampler=resampler(model.resampler, tp),
        media_map=model.resampler.width * model.gated.media_width if model.maps_media else 0,
        gated=gated * len(model.gated_positions()),
        extra=2 * lm.extra_tokens * lm.width,
        lm_blocks=block * lm.num_layers + _norm(lm.norm, lm.width) + lm.table_rows * lm.width,
        vocabulary=vocabulary * (1 if lm.tied else 2),
        lm_block=block,
        gated_block=gated,
        lm_matrices=lm.num_layers * sum(outputs * inputs for outputs, inputs in matrices),
        lm_channels=lm.num_layers * sum(outputs for outputs, _ in matrices),
        largest_matrix=max(outputs * inputs for outputs, inputs in matrices),
    )


def _norm(kind: str, width: int) -> int:
    return width * (2 if kind == "layer" else 1)


def lm_matrices(lm: LMConfig, tp: int) -> list[tuple[int, int]]:
    """Return outputs and inputs of a frozen block's matrices on one rank."""
    queries, keys = lm.num_heads * lm.head_dim, lm.num_kv_heads * lm.head_dim
    hidden = lm.ffn_width * (2 if lm.gated else 1)
    found = [((queries + 2 * keys) // tp, lm.width), (lm.width, queries // tp)]
    found += [(hidden // tp, lm.width), (lm.width, lm.ffn_width // tp)]
    return found + ([(queries // tp, lm.width)] if lm.positions == "relative" else [])


def check_fp8_shapes(lm: LMConfig, tp: int) -> None:
    """Raise `ValueError` where a rank's matrix is to be multiplied in fp8 and does not fit the matrix units."""
    if lm.matrix_products == "fp8":
        for outputs, inputs in lm_matrices(lm, tp):
            check_fp8_shape(outputs, inputs)


def lm_block(lm: LMConfig, tp: int) -> int:
    """Count one frozen block."""
    queries, keys = lm.num_heads * lm.head_dim, lm.num_kv_heads * lm.head_dim
    hidden = lm.ffn_width * (2 if lm.gated else 1)
    matrices = sum(outputs * inputs for outputs, inputs in lm_matrices(lm, tp))
    sharded = 0
    whole = 2 * _norm(lm.norm, lm.width)
    if lm.bias != "none":
        sharded += queries + 2 * keys
    if lm.bias == "all":
        sharded += hidden
        whole += 2 * lm.width  # of the projections that end in a sum over ranks
    if lm.positions == "relative":
        sharded += 2 * queries
    if lm.qk_norm == "head":
        whole += 2 * _norm(lm.norm, lm.head_dim)
    elif lm.qk_norm == "width":
        sharded += _norm(lm.norm, queries) + _norm(lm.norm, keys)
    return matrices + sharded // tp + whole


def gated_block(config: GatedBlockConfig, tp: int) -> int:
    """Count one gated block."""
    inner = config.heads * config.head_dim
    attention = 2 * config.width * inner + 2 * config.media_width * inner
    ffw = config.width * config.ffw_hidden * (3 if config.activation == "silu_gated" else 2)
    gates = 2 * (1 if config.gate == "scalar" else config.width)
    heads = 2 * _norm(config.norm, config.head_dim) if config.qk_norm else 0
    return (attention + ffw) // tp + gates + heads + 2 * _norm(config.norm, config.width)


def resampler(config: ResamplerConfig, tp: int) -> int:
    """Count the whole resampler."""
    inner, width = config.heads * config.head_dim, config.width
    ffw = width * width * config.ffw_mult * (3 if config.activation == "silu_gated" else 2)
    heads = 2 * _norm(config.norm, config.head_dim) if config.qk_norm else 0
    layer = (4 * width * inner + ffw) // tp + 3 * _norm(config.norm, width) + heads
    project = config.feature_width * width if config.feature_width != width else 0
    learned = (config.latents + config.frames) * width
    return config.depth * layer + project + learned + _norm(config.norm, width)
