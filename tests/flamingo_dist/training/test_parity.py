"""Contract 5: one process, tensor parallel, data parallel and every ZeRO stage train the same network."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from flamingo_dist.parallel.topology import MegatronMPU, ParallelConfig, Topology
from flamingo_dist.parallel.zero import gathered
from tests import tiny

STEPS = 3


def whole_weights(step: Any, topology: Topology) -> dict[str, torch.Tensor]:
    """Trainable weights, put together from ZeRO's and tensor parallelism's parts."""
    out = {}
    for name, param in step.engine.module.named_parameters():
        if not param.requires_grad:
            continue
        with gathered([param]):
            value = param.detach().clone()
        dim = param.flamingo_tag.partition_dim
        if dim is not None and topology.tensor > 1:
            parts = [torch.empty_like(value) for _ in range(topology.tensor)]
            dist.all_gather(parts, value, group=MegatronMPU().get_model_parallel_group())
            value = torch.cat(parts, dim=dim)
        out[name] = value
    return out


def train(topology: Topology, parallel: ParallelConfig, steps: int = STEPS) -> dict[str, Any]:
    step = tiny.make_step(topology, parallel, tiny.train_config(steps))
    results = [step.run(i, tiny.batches(i, topology)) for i in range(steps)]
    return {
        "loss": [dict(r.loss) for r in results],
        "norm": [r.grad_norm for r in results],
        "weights": whole_weights(step, topology),
    }


@pytest.fixture(scope="module")
def reference(ranks):
    return ranks.run(train, ParallelConfig(zero_stage=0), world=1)[0]


LAYOUTS = [
    (
        world,
        tensor,
        ParallelConfig(tensor=tensor, zero_stage=stage, frozen=frozen, activation_checkpointing=ac),
    )
    for world, tensor, stage, frozen, ac in [
        (1, 1, 1, "resident", False),
        (1, 1, 2, "resident", False),
        (1, 1, 3, "resident", False),
        (1, 1, 0, "resident", True),
        (2, 1, 0, "resident", False),
        (2, 1, 1, "resident", False),
        (2, 1, 2, "resident", False),
        (2, 1, 3, "partitioned", False),
        (2, 2, 0, "resident", False),
        (2, 2, 3, "resident", True),
        (4, 2, 0, "resident", False),
        (4, 2, 1, "resident", False),
        (4, 2, 2, "resident", True),
        (4, 2, 3, "resident", False),
        (4, 2, 3, "partitioned", True),
        (2, 2, 1, "resident", "selective"),
        (4, 2, 3, "partitioned", "selective"),
    ]
]
LAYOUTS.append((2, 2, ParallelConfig(tensor=2, zero_stage=2, split_vision=True)))
# Rows in parts: of one row each, and of three, which leaves a smaller last part.
LAYOUTS += [
    (1, 1, ParallelConfig(zero_stage=0, micro_rows=3)),
    (2, 1, ParallelConfig(zero_stage=1, micro_rows=1)),
    (2, 1, ParallelConfig(zero_stage=2, micro_rows=1)),
    (4, 2, ParallelConfig(tensor=2, zero_stage=3, frozen="partitioned", micro_rows=1)),
    (4, 2, ParallelConfig(tensor=2, zero_stage=3, activation_checkpointing=True, micro_rows=1)),
]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "tensor", "parallel"),
    LAYOUTS,
    ids=lambda v: (
        f"zero{v.zero_stage}-{v.frozen}-{v.activation_checkpointing}-{v.micro_rows}"
        if isinstance(v, ParallelConfig)
        else None
    ),
)
def test_every_layout_trains_alike(ranks, reference, world, tensor, parallel):
    for result in ranks.run(train, parallel, world=world, tensor=tensor):
        for ours, expected in zip(result["loss"], reference["loss"], strict=True):
            assert ours == pytest.approx(expected, abs=2e-5)
        assert result["norm"] == pytest.approx(reference["norm"], rel=1e-4)
        assert result["weights"].keys() == reference["weights"].keys()
        for name, value in reference["weights"].items():
            # AdamW divides by the gradient's own size: where that is rounding noise, so is the update.
            torch.testing.assert_close(result["weights"][name], value, atol=2e-4, rtol=1e-4, msg=name)


def train_in_bf16(topology: Topology, parallel: ParallelConfig) -> list[dict[str, float]]:
    step = tiny.make_step(topology, parallel, tiny.train_config(STEPS, dtype="bf16"))
    return [dict(step.run(i, tiny.batches(i, topology)).loss) for i in range(STEPS)]


@pytest.mark.distributed
def test_parts_under_zero_1_in_bf16_train_as_all_rows_under_zero_3(ranks):
    """ZeRO 1 has an optimizer of its own for bf16, which adds gradients up in fp32."""
    whole = ranks.run(train_in_bf16, ParallelConfig(zero_stage=3), world=2)[0]
    for rows in (0, 1):
        parallel = ParallelConfig(zero_stage=1, micro_rows=rows)
        for losses in ranks.run(train_in_bf16, parallel, world=2):
            for ours, expected in zip(losses, whole, strict=True):
                assert ours == pytest.approx(expected, abs=5e-3)
