"""Bytes of one rank, by kind."""

from typing import Literal

from flamingo_dist.planning.parameters import count_parameters
from flamingo_dist.planning.vision import vision_working_bytes
from flamingo_dist.planning.workload import DatasetShape, Workload

Residency = Literal["resident", "partitioned"]
REDUCE_BUCKET = 50_000_000
"""Elements of a bucket of gradients (`parallel.zero.deepspeed_config`); two are in flight."""
PREFETCH = 50_000_000
"""Elements that ZeRO-3 gathers ahead."""
MAX_LIVE = 1_000_000_000
"""Gathered elements that DeepSpeed keeps by default before it releases."""


def state_memory(work: Workload, *, tp: int, dp: int, residency: Residency) -> dict[str, float]:
    """Return the bytes of weights, gradients, optimizer state and ZeRO's buffers.

    ZeRO's padding of each parameter to a multiple of the ranks is left out.

    Args:
        work: the run.
        tp: tensor-parallel degree.
        dp: data-parallel degree.
        residency: where frozen weights live.
    """
    counts, size, stage = count_parameters(work.model, tp), work.bytes_per_value, work.parallel.zero_stage
    trainable = counts.trainable
    vision_size = work.model.vision.torch_dtype.itemsize
    plain = stage == 0 and size == 4  # torch's optimizer on the parameters themselves, no master copy
    managed = trainable + (counts.frozen_lm if residency == "partitioned" else 0)
    unit = max(counts.gated_block, counts.resampler if work.model.resampler.shared_feature_kv else 0)
    if residency == "partitioned":
        unit = max(unit, counts.lm_block, counts.vocabulary)
    gathered = max(unit + PREFETCH, MAX_LIVE)
    return {
        "vision": float(counts.vision * vision_size),
        "frozen": counts.frozen_lm * size / (dp if residency == "partitioned" else 1),
        "trainable": trainable * size / (dp if stage == 3 else 1),
        "gradients": trainable * 4 / (dp if stage >= 2 else 1),
        "optimizer": trainable * (8 if plain else 12) / (dp if stage >= 1 else 1),
        "gather_buffers": float(min(gathered, managed) * size) if stage == 3 and dp > 1 else 0.0,
        "reduce_buckets": float(2 * min(REDUCE_BUCKET, trainable) * 4) if dp > 1 else 0.0,
    }


def lm_block_bytes(work: Workload, tokens: int, tp: int) -> float:
    """Return what a frozen block keeps of `tokens` tokens: no input of a linear layer, as no weight is trained.

    Two norms' inputs, queries, keys, values and result of attention, and the inputs of the activation.
    """
    lm = work.model.lm
    hidden = lm.ffn_width * (3 if lm.activation == "silu_gated" else 1)
    sharded = (2 * lm.num_heads + 2 * lm.num_kv_heads) * lm.head_dim + hidden
    return work.bytes_per_value * tokens * (2 * lm.width + sharded / tp)


def gated_block_bytes(work: Workload, tokens: int, media: int, tp: int) -> float:
    """Return what a gated block keeps, inputs of its linear layers included."""
    g = work.model.gated
    inner = g.heads * g.head_dim
    hidden = g.ffw_hidden * (4 if g.activation == "silu_gated" else 2)
    text = tokens * (4 * g.width + (2 * inner + hidden) / tp)
    return work.bytes_per_value * (text + media * work.model.resampler.latents * 2 * inner / tp)


def resampler_bytes(work: Workload, media: int, frames: int, tp: int) -> float:
    """Return what the resampler keeps; it is not checkpointed."""
    r = work.model.resampler
    features, inner = frames * work.model.vision.num_features, r.heads * r.head_dim
    hidden = r.ffw_mult * r.width * (4 if r.activation == "silu_gated" else 2)
    latents = r.latents * (4 * r.width + (4 * inner + hidden) / tp)
    normed = features * r.width * (1 if r.shared_feature_kv else r.depth)
    kept = r.depth * (latents + features * 2 * inner / tp) + normed + features * r.width
    if r.feature_width != r.width:
        kept += features * r.feature_width
    return work.bytes_per_value * media * kept


def vision_bytes(work: Workload, frames: int) -> float:
    """Return the peak of encoding `frames` frames in sub-batches: all features twice, and one sub-batch's layer."""
    vision = work.model.vision
    size = vision.torch_dtype.itemsize
    features = 2.0 * frames * vision.num_features * vision.width * size
    return features + min(frames, work.model.vision_batch) * vision_working_bytes(vision)


def activation_memory(work: Workload, data: DatasetShape, *, tp: int, dp: int) -> dict[str, float]:
    """Return the activation bytes of one data set's forward and backward on one rank.

    `kept` stands from the forward to the backward. Of `vision`, `logits` and `block` (the working set of the
    block that the backward is in) only the largest counts at the peak: they follow one another.

    Args:
        work: the run.
        data: the batch.
        tp: tensor-parallel degree.
        dp: data-parallel degree.
    """
    model, size = work.model, work.bytes_per_value
    tokens, media = data.rows * data.tokens / dp, data.rows * data.media / dp
    n_tokens, n_media = int(tokens), max(1, int(media))
    lm = lm_block_bytes(work, n_tokens, tp)
    gated = gated_block_bytes(work, n_tokens, n_media, tp)
    stream = float(n_tokens * model.lm.width * size)
    if work.parallel.activation_checkpointing:
        blocks = model.lm.num_layers * stream
        working = lm + gated + 2 * stream
    else:
        blocks = model.lm.num_layers * lm + len(model.gated_positions()) * gated
        working = 4 * stream
    vocabulary = n_tokens * model.lm.vocab_size / tp
    return {
        "kept": blocks + resampler_bytes(work, n_media, data.frames, tp),
        "block": working,
        "logits": vocabulary * (12 + (2 if size == 2 else 0)),
        "vision": vision_bytes(work, n_media * data.frames) if data.pixels else 0.0,
    }
