"""Bytes that one GPU sends in a step, by group of ranks and by kind."""

from dataclasses import dataclass

from flamingo_dist.planning.gathers import replay
from flamingo_dist.planning.memory import REDUCE_BUCKET, Residency, feature_bytes
from flamingo_dist.planning.parameters import count_parameters
from flamingo_dist.planning.workload import DatasetShape, Workload

GROUPS = 3
"""Parameter groups of the optimizer (`training.optimizer`): ZeRO 1 and 2 gather the weights of each after an update."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What a kind of collective sends in a step, on one GPU, in a ring."""

    group: str
    """"tensor" or "data"."""
    wire_bytes: float
    """Bytes that a GPU sends to its neighbour."""
    calls: int
    """Collectives."""


def _tensor(work: Workload, data: DatasetShape, tp: int, dp: int) -> tuple[float, int]:
    """Return payload bytes and calls of the tensor-parallel all-reduces of one data set."""
    model, size = work.model, work.bytes_per_value
    stream = data.rows * data.tokens / dp * model.lm.width * size
    media = data.rows * data.media / dp
    latents = media * model.resampler.latents * model.resampler.width * size
    handed_on = media * model.resampler.latents * model.gated.media_width * size
    features = media * data.frames * model.vision.num_features * model.resampler.width * size
    checkpointing = work.parallel.activation_checkpointing
    layers, gated, depth = model.lm.num_layers, len(model.gated_positions()), model.resampler.depth
    extra_gate = 1 if model.gated.activation == "silu_gated" else 0
    # Recomputation stops before the last sum of a checkpointed unit, which is an LM block's. "selective" keeps a gated
    # block's sums.
    again = (layers if checkpointing else 0) + (2 * gated if checkpointing is True else 0)
    streams = 4 * (layers + gated) + again + gated * extra_gate + 2
    feature_sums = 1 if model.resampler.shared_feature_kv else depth
    resampler_gate = 1 if model.resampler.activation == "silu_gated" else 0
    latent_sums = depth * (4 + resampler_gate)
    payload = streams * stream + latent_sums * latents + gated * handed_on + feature_sums * features
    return payload, (streams + latent_sums + gated + feature_sums) * len(work.parts(data, dp))


def step_traffic(work: Workload, *, tp: int, dp: int, residency: Residency) -> dict[str, Traffic]:
    """Return a step's traffic by kind.

    Every data set, and every part of its rows, has its own forward and backward: ZeRO-3 gathers weights for each
    (`planning.gathers`), and ZeRO 2 and 3 reduce gradients, in fp32, for each.

    Args:
        work: the run.
        tp: tensor-parallel degree.
        dp: data-parallel degree.
        residency: where frozen weights live; resident ones move no byte.
    """
    counts, size, stage = count_parameters(work.model, tp), work.bytes_per_value, work.parallel.zero_stage
    sets, share = sum(len(work.parts(data, dp)) for data in work.datasets), (dp - 1) / dp
    kinds: dict[str, Traffic] = {}
    if tp > 1:
        pairs = [_tensor(work, data, tp, dp) for data in work.datasets]
        payload, calls = sum(p for p, _ in pairs), sum(c for _, c in pairs)
        kinds["tensor_all_reduce"] = Traffic(
            group="tensor", wire_bytes=2 * (tp - 1) / tp * payload, calls=calls
        )
        if work.parallel.split_vision:
            pixels = [data for data in work.datasets if data.pixels]
            features = sum(feature_bytes(work, data.rows * data.media * data.frames / dp) for data in pixels)
            kinds["tensor_gather"] = Traffic(
                group="tensor",
                wire_bytes=(tp - 1) / tp * features,
                calls=sum(len(work.parts(data, dp)) for data in pixels),
            )
    if dp == 1:
        return kinds
    # ZeRO 3 scatters the sums; the lower stages of DeepSpeed 0.19 sum whole buckets, also where a rank keeps a part.
    reductions, ring = (sets if stage >= 2 else 1), (1 if stage == 3 else 2)
    buckets = 1 + counts.trainable // REDUCE_BUCKET
    kinds["gradient_reduce"] = Traffic(
        group="data", wire_bytes=ring * reductions * share * 4 * counts.trainable, calls=reductions * buckets
    )
    if stage in (1, 2):
        kinds["trainable_gather"] = Traffic(
            group="data", wire_bytes=share * size * counts.trainable, calls=GROUPS
        )
    if stage < 3:
        return kinds
    again, partitioned = bool(work.parallel.activation_checkpointing), residency == "partitioned"
    gathers = replay(work.model, tp, partitioned=partitioned, checkpointing=again)
    values = {"trainable_gather": gathers.trainable, "frozen_gather": gathers.frozen}
    for kind, value in values.items():
        if value:
            calls = round(sets * gathers.calls * value / sum(values.values()))
            kinds[kind] = Traffic(group="data", wire_bytes=sets * share * size * value, calls=calls)
    return kinds
