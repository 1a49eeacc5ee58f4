"""Bytes of one rank, by kind."""

from typing import Literal

from flamingo_dist.models.head_loss import chunk_tokens
from flamingo_dist.planning.gathers import replay
from flamingo_dist.planning.parameters import ParameterCounts, count_parameters, lm_matrices
from flamingo_dist.planning.vision import vision_working_bytes
from flamingo_dist.planning.workload import DatasetShape, Workload

Residency = Literal["resident", "partitioned"]
REDUCE_BUCKET = 50_000_000
"""Elements of the bucket that ZeRO 2 and 3 collect gradients in, always whole (`parallel.zero.deepspeed_config`)."""


def state_memory(work: Workload, *, tp: int, dp: int, residency: Residency) -> dict[str, float]:
    """Return the bytes of weights, gradients, optimizer state, ZeRO's bucket and the batches.

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
    return {
        "vision": float(counts.vision * vision_size),
        "frozen": frozen_bytes(work, counts) / (dp if residency == "partitioned" else 1),
        "trainable": trainable * size / (dp if stage == 3 else 1),
        "gradients": trainable * 4 / (dp if stage >= 2 else 1),
        "optimizer": trainable * (8 if plain else 12) / (dp if stage >= 1 else 1),
        "reduce_buckets": float(REDUCE_BUCKET * 4) if stage >= 2 else 0.0,
        "batches": float(sum(batch_bytes(work, data, dp) for data in work.datasets)),
    }


def frozen_bytes(work: Workload, counts: ParameterCounts) -> int:
    """Return the bytes of the frozen LM on a tensor-parallel rank, in its storage: one byte a value, fp32 scales."""
    size = work.bytes_per_value
    if work.model.lm.weight_storage == "same":
        return counts.frozen_lm * size
    copies = 2 if work.model.lm.matrix_products == "fp8" else 1  # the second is transposed
    return (
        copies * counts.lm_matrices + 4 * counts.lm_channels + (counts.frozen_lm - counts.lm_matrices) * size
    )


def batch_bytes(work: Workload, data: DatasetShape, dp: int) -> float:
    """Return the bytes of one rank's batch: media, and tokens, media index and masks."""
    vision = work.model.vision
    frame = 3 * vision.image_size**2 if data.pixels else 2 * vision.num_features * vision.width
    return data.rows / dp * (data.media * (data.frames * frame + 1) + data.tokens * (13 + 4 * data.packed))


def gathered_bytes(work: Workload, *, tp: int, dp: int, residency: Residency) -> dict[str, float]:
    """Return the bytes of weights that ZeRO-3 holds whole, in the phases of `activation_memory`.

    Args:
        work: the run.
        tp: tensor-parallel degree.
        dp: data-parallel degree.
        residency: where frozen weights live.
    """
    if work.parallel.zero_stage < 3 or dp == 1:
        return {"vision": 0.0, "logits": 0.0, "block": 0.0}
    again, partitioned = bool(work.parallel.activation_checkpointing), residency == "partitioned"
    gathers = replay(work.model, tp, partitioned=partitioned, checkpointing=again)
    size = work.bytes_per_value
    return {
        "vision": 0.0,
        "logits": float(gathers.live_at_head * size),
        "block": float(gathers.live_in_blocks * size),
    }


def lm_block_bytes(work: Workload, tokens: int, length: int, tp: int) -> float:
    """Return what a frozen block keeps of `tokens` tokens: no input of a linear layer, as no weight is trained.

    Two norms' inputs, queries, keys, values and result of attention, and the inputs of the activation. Queries and
    keys a second time where they are normalised (a third time over all heads, which are laid side by side for it), and
    where they are rotated: the values, in one piece with them, hold them as they were. With relative positions the
    queries a second time and a bias for each pair of the `length` tokens of a row.
    """
    lm = work.model.lm
    hidden = lm.ffn_width * (2 if lm.gated else 1)
    again = (lm.positions == "rotary") + {"none": 0, "head": 1, "width": 2}[lm.qk_norm]
    sharded = (2 * lm.num_heads + 2 * lm.num_kv_heads) * lm.head_dim + hidden
    sharded += again * (lm.num_heads + lm.num_kv_heads) * lm.head_dim
    if lm.positions == "relative":
        sharded += lm.num_heads * (lm.head_dim + length)
    return work.bytes_per_value * tokens * (2 * lm.width + sharded / tp)


def gated_block_bytes(work: Workload, tokens: int, media: int, tp: int) -> float:
    """Return what a gated block keeps, inputs of its linear layers included."""
    gated = work.model.gated.activation == "silu_gated"
    return _gated_bytes(work, tokens, media, tp, widths=4, hiddens=4 if gated else 2)


def gated_results_bytes(work: Workload, tokens: int, media: int, tp: int) -> float:
    """Return what a gated block keeps of its products and its attention alone (`models.recompute`)."""
    gated = work.model.gated.activation == "silu_gated"
    return _gated_bytes(work, tokens, media, tp, widths=2, hiddens=2 if gated else 1)


def _gated_bytes(work: Workload, tokens: int, media: int, tp: int, *, widths: int, hiddens: int) -> float:
    """Return the bytes of attention (queries, result, keys, values) and of so many widths and hidden widths a token."""
    g = work.model.gated
    inner = g.heads * g.head_dim
    text = tokens * (widths * g.width + (2 * inner + hiddens * g.ffw_hidden) / tp)
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


def feature_bytes(work: Workload, frames: float) -> float:
    """Return the bytes of the encoder's features of `frames` frames."""
    vision = work.model.vision
    return frames * vision.num_features * vision.width * vision.torch_dtype.itemsize


def vision_bytes(work: Workload, frames: int, tp: int) -> float:
    """Return the peak of encoding `frames` frames in sub-batches: a rank's features twice, and one sub-batch's layer.

    Where each tensor-parallel rank has a share, all features beside its own are more than that in large batches.
    """
    share = -(-frames // tp) if work.parallel.split_vision else frames
    own = feature_bytes(work, share)
    encoding = own + min(share, work.model.vision_batch) * vision_working_bytes(work.model.vision)
    return own + (encoding if share == frames else max(encoding, feature_bytes(work, frames)))


def activation_memory(work: Workload, data: DatasetShape, *, tp: int, dp: int) -> dict[str, float]:
    """Return the activation bytes of one data set's largest forward and backward on one rank.

    `kept` stands from the forward to the backward. `vision`, `logits` and `block` (the working set of the block that
    the backward is in) follow one another; while the encoder runs, there is nothing kept yet.

    Args:
        work: the run.
        data: the batch.
        tp: tensor-parallel degree.
        dp: data-parallel degree.
    """
    model, size = work.model, work.bytes_per_value
    rows = max(work.parts(data, dp), default=0)
    n_tokens, n_media = rows * data.tokens, max(1, rows * data.media)
    lm = lm_block_bytes(work, n_tokens, data.tokens, tp)
    gated = gated_block_bytes(work, n_tokens, n_media, tp)
    stream = float(n_tokens * model.lm.width * size)
    again = work.parallel.activation_checkpointing
    if again:
        results = gated_results_bytes(work, n_tokens, n_media, tp) if again == "selective" else 0.0
        blocks = model.lm.num_layers * stream + len(model.gated_positions()) * results
        # Beside what two blocks keep, the gradients before and after the wider activation.
        hidden = max(model.lm.ffn_width, model.gated.ffw_hidden)
        working = lm + gated - results + 2 * stream + 2 * n_tokens * hidden * size / tp
    else:
        blocks = model.lm.num_layers * lm + len(model.gated_positions()) * gated
        working = 4 * stream
    if model.lm.matrix_products == "fp8":  # codes of one product's rows
        working += n_tokens * max(max(sides) for sides in lm_matrices(model.lm, tp))
    elif model.lm.weight_storage != "same":  # one matrix at a time stands in the run's dtype
        working += count_parameters(model, tp).largest_matrix * size
    vocabulary = model.lm.vocab_size / tp
    at_once = min(n_tokens, chunk_tokens(vocabulary))
    return {
        "kept": blocks + resampler_bytes(work, n_media, data.frames, tp),
        "block": working,
        # A chunk's logits with their fp32 logarithms; all tokens' final hidden states and gradients (`head_loss`).
        "logits": at_once * vocabulary * (size + 4) + 2 * stream,
        "vision": vision_bytes(work, n_media * data.frames, tp) if data.pixels else 0.0,
    }
