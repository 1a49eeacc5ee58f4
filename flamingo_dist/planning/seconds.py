"""Seconds of a step, from operations, bytes and stated efficiencies."""

from dataclasses import dataclass

from flamingo_dist.planning.flops import PartFlops, dataset_flops, relative_flops
from flamingo_dist.planning.hardware import GPU, Assumptions
from flamingo_dist.planning.memory import Residency, gated_block_bytes, lm_block_bytes, resampler_bytes
from flamingo_dist.planning.parameters import count_parameters, lm_matrices
from flamingo_dist.planning.traffic import Traffic, step_traffic
from flamingo_dist.planning.workload import DatasetShape, Workload


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The GPUs of a plan."""

    gpu: GPU
    """Data sheet of one."""
    gpus: int
    """How many."""
    gpus_per_node: int = 8
    """GPUs that NVLink joins."""
    assumptions: Assumptions
    """Efficiencies."""


def compute_seconds(work: Workload, machine: Machine, *, tp: int, dp: int) -> dict[str, float]:
    """Return the seconds of computation on one GPU, by part.

    The encoder runs whole on every tensor-parallel rank, unless it is split; all else is shared by the group.

    Args:
        work: the run.
        machine: the GPUs.
        tp: tensor-parallel degree.
        dp: data-parallel degree.
    """
    gpu, assumed = machine.gpu, machine.assumptions
    peak = (gpu.bf16_tflops if work.bytes_per_value == 2 else gpu.fp32_tflops) * 1e12
    vision_peak = gpu.tf32_tflops if work.model.vision.dtype == "float32" else gpu.bf16_tflops
    seconds: dict[str, float] = {}
    kept = 0.0
    for data in work.datasets:
        flops = dataset_flops(work.model, data, checkpointing=work.parallel.activation_checkpointing)
        for name, part in flops.items():
            if name == "vision":
                ranks = dp * tp if work.parallel.split_vision else dp
                value = part.forward / ranks / (vision_peak * 1e12 * assumed.vision)
            else:
                again = 1 if part.recomputed else 0
                linear = part.linear + again * (part.linear - part.skipped) + part.backward_linear
                if name == "lm" and work.model.lm.matrix_products == "fp8":
                    linear *= _fp8_share(work, data, part, machine)
                # A flash backward computes the scores once more: five products where the forward has two.
                attention = part.attention * (1 + again) + 1.25 * part.backward_attention
                value = (linear / assumed.matmul + attention / assumed.attention) / (tp * dp * peak)
            seconds[name] = seconds.get(name, 0.0) + value
        n_tokens, n_media = data.rows * data.tokens // dp, max(1, data.rows * data.media // dp)
        blocks = work.model.lm.num_layers * lm_block_bytes(work, n_tokens, data.tokens, tp)
        blocks += len(work.model.gated_positions()) * gated_block_bytes(work, n_tokens, n_media, tp)
        kept += blocks * (1.5 if work.parallel.activation_checkpointing else 1.0)
        kept += resampler_bytes(work, n_media, data.frames, tp)
    bandwidth = gpu.hbm_gbs * 1e9 * assumed.hbm
    seconds["elementwise"] = assumed.activation_passes * kept / bandwidth
    if work.model.lm.matrix_products == "fp8":
        seconds["quantise"] = _quantised_bytes(work, tp=tp, dp=dp) / bandwidth
    elif work.model.lm.weight_storage != "same":
        # Codes are read and written in the run's dtype, by each forward, recomputation and backward.
        passes = sum(len(work.parts(data, dp)) for data in work.datasets) * (
            3 if work.parallel.activation_checkpointing else 2
        )
        matrices = count_parameters(work.model, tp).lm_matrices
        seconds["dequantise"] = passes * matrices * (1 + work.bytes_per_value) / bandwidth
    state = count_parameters(work.model, tp).trainable * 16 / (dp if work.parallel.zero_stage >= 1 else 1)
    seconds["optimizer"] = assumed.optimizer_passes * state / bandwidth
    return seconds


def _fp8_share(work: Workload, data: DatasetShape, part: PartFlops, machine: Machine) -> float:
    """Return what is left of the time of the LM's linear operations, where those with its matrices are in fp8."""
    gpu, assumed = machine.gpu, machine.assumptions
    _, scores = relative_flops(work.model.lm, data)
    ratio = gpu.bf16_tflops * assumed.matmul / (gpu.fp8_tflops * assumed.fp8_matmul)
    return (scores + (part.linear - scores) * ratio) / part.linear


def _quantised_bytes(work: Workload, *, tp: int, dp: int) -> float:
    """Return the bytes that a step's quantisation of rows reads and writes on one GPU.

    Inputs of all matrices in each forward, the recomputation but for its last product included, and gradients of their
    outputs in the backward.
    """
    lm, size = work.model.lm, work.bytes_per_value
    matrices = lm_matrices(lm, tp)[:4]  # the distances of relative positions are few
    inputs, outputs = (sum(sides[i] for sides in matrices) for i in (1, 0))
    again = inputs - matrices[-1][1] if work.parallel.activation_checkpointing else 0
    tokens = sum(data.rows * data.tokens // dp for data in work.datasets)
    return float(tokens * lm.num_layers * (inputs + again + outputs) * (size + 1))


def link_bytes(traffic: Traffic, machine: Machine, *, tp: int) -> dict[str, float]:
    """Return a GPU's share of a kind of traffic by link.

    A ring leaves a node once, whatever number of its GPUs it runs through, and the node's network cards serve
    all of its rings: of a data-parallel group with n members in a node each sends 1/n of its bytes outside.

    Args:
        traffic: what is sent.
        machine: the GPUs.
        tp: tensor-parallel degree; neighbours, so that a group lies in one node.
    """
    if traffic.group == "tensor" or machine.gpus <= machine.gpus_per_node:
        return {"nvlink": traffic.wire_bytes, "network": 0.0}
    members = max(1, machine.gpus_per_node // tp)
    return {
        "nvlink": traffic.wire_bytes * (members - 1) / members,
        "network": traffic.wire_bytes / members,
    }


def traffic_seconds(traffic: Traffic, machine: Machine, *, tp: int) -> float:
    """Return the seconds of a kind of traffic: of the slower link, and the latency of its calls."""
    gpu, assumed, links = machine.gpu, machine.assumptions, link_bytes(traffic, machine, tp=tp)
    nvlink = links["nvlink"] / (gpu.nvlink_gbs * 1e9 * assumed.nvlink)
    network = links["network"] / (gpu.network_gbs * 1e9 * assumed.network)
    return max(nvlink, network) + traffic.calls * assumed.latency


def step_seconds(
    work: Workload, machine: Machine, *, tp: int, dp: int, residency: Residency
) -> dict[str, float]:
    """Return the seconds of a step by part; they add up to the step.

    Tensor-parallel sums stand in the way of the next product; of the data-parallel traffic of ZeRO 2 and 3 the
    share `overlap` hides behind computation, as far as there is computation to hide behind.

    Args:
        work: the run.
        machine: the GPUs.
        tp: tensor-parallel degree.
        dp: data-parallel degree.
        residency: where frozen weights live.
    """
    seconds = compute_seconds(work, machine, tp=tp, dp=dp)
    hidden_by = sum(seconds.values()) - seconds["optimizer"]
    kinds = step_traffic(work, tp=tp, dp=dp, residency=residency)
    by_group = {"tensor": 0.0, "data": 0.0}
    for traffic in kinds.values():
        by_group[traffic.group] += traffic_seconds(traffic, machine, tp=tp)
    seconds["tensor_traffic"] = by_group["tensor"]
    # ZeRO 2 and 3 reduce during the backward; DeepSpeed's lower stages reduce and gather when it is over.
    overlap = machine.assumptions.overlap if work.parallel.zero_stage >= 2 else 0.0
    seconds["data_traffic_exposed"] = by_group["data"] - min(overlap * by_group["data"], hidden_by)
    return seconds
