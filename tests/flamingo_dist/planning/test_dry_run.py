"""A dry run against real gloo ranks: what they hold at their peak and every collective that they send."""

from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save_file

from flamingo_dist.models.vision import VisionConfig, build_vision
from flamingo_dist.parallel.topology import ParallelConfig, Topology
from flamingo_dist.parallel.zero import deepspeed_config
from flamingo_dist.planning.collectives import by_purpose
from flamingo_dist.planning.dry_run import Followed, dry_run, follow, local_batch
from flamingo_dist.planning.gathers import Limits, replay
from flamingo_dist.planning.ledger import Ledger
from flamingo_dist.planning.memory import state_memory
from flamingo_dist.planning.traffic import step_traffic
from flamingo_dist.planning.workload import DatasetShape, Workload
from tests import tiny
from tests.flamingo_dist.models.vision.test_vision import random_state

LIMITS = Limits(prefetch=6_000, live=40_000, reuse=20_000)
"""As small beside the tiny network as the real ones are beside the large."""
BUCKET = 4_000
"""Elements of a bucket of gradients; at its real size it would be all that a tiny rank holds."""
DATASETS = (
    DatasetShape(name="docs", rows=8, tokens=14, media=2, frames=2),
    DatasetShape(name="pairs", rows=4, tokens=9, media=1, frames=2),
)


def work_of(parallel: ParallelConfig, dtype: str, storage: Any = "same") -> Workload:
    size = 4 if dtype == "fp32" else 2
    model = tiny.network(layers=4, every=2, gate_init=0.5)
    kind, _, products = storage.partition(" ")
    lm = replace(model.lm, weight_storage=kind, matrix_products="fp8" if products else "same")
    model = replace(model, lm=lm)
    # Two images at once, so that data sets differ in how often the encoder runs.
    model = replace(model, vision_batch=4)
    return Workload(model=model, datasets=DATASETS, parallel=parallel, bytes_per_value=size)


@contextmanager
def small_buckets():
    def small(*args: Any, **kwargs: Any) -> dict[str, Any]:
        config = deepspeed_config(*args, **kwargs)
        config["zero_optimization"] |= {
            "reduce_bucket_size": BUCKET,
            "stage3_prefetch_bucket_size": LIMITS.prefetch,
            "stage3_max_live_parameters": LIMITS.live,
            "stage3_max_reuse_distance": LIMITS.reuse,
        }
        return config

    with patch("flamingo_dist.training.build.deepspeed_config", small):
        yield


def real_batch(data: DatasetShape, work: Workload, dp: int) -> Any:
    """A batch whose every position carries loss and whose every slot holds an image; most text sees the last one."""
    batch = local_batch(data, work, dp)
    index = torch.full_like(batch.media_index_BT, data.media)
    index[:, :3] = 1
    mask = torch.ones_like(batch.loss_mask_BT)
    mask[:, 0] = False
    tokens = torch.randint(3, tiny.VOCAB, batch.tokens_BT.shape, generator=torch.Generator().manual_seed(1))
    media = torch.randint(0, 256, batch.media.shape, generator=torch.Generator().manual_seed(2)).to(
        torch.uint8
    )
    filled = {"tokens_BT": tokens, "loss_mask_BT": mask, "media_index_BT": index, "media": media}
    return replace(batch, **filled, media_mask_BM=torch.ones_like(batch.media_mask_BM))


def real_run(
    topology: Topology, parallel: ParallelConfig, dtype: str, storage: Any = "same"
) -> tuple[Followed, dict[str, float]]:
    work = work_of(parallel, dtype, storage)
    with small_buckets(), Ledger() as ledger:
        batches = {data.name: real_batch(data, work, topology.data) for data in DATASETS}
        for batch in batches.values():
            for tensor in batch.tensors().values():
                ledger.mark(tensor, "batches")
        figures, result = follow(ledger, topology, work, tiny.train_config(dtype=dtype), batches)
    return figures, dict(result.loss)


def fake_run(
    parallel: ParallelConfig, dtype: str, world: int, rank: int = 0, storage: Any = "same"
) -> Followed:
    topology = Topology(world=world, rank=rank, tensor=parallel.tensor)
    with small_buckets():
        return dry_run(
            work_of(parallel, dtype, storage), tiny.train_config(dtype=dtype), topology, like_gpu=False
        )


CASES = [
    (0, "resident", 2, "fp32", False),
    (1, "resident", 1, "bf16", True),
    (2, "resident", 2, "fp32", False),
    (3, "resident", 1, "fp32", True),
    (3, "resident", 2, "bf16", True),
    (3, "partitioned", 1, "bf16", False),
    (3, "partitioned", 2, "fp32", True),
    (3, "resident", 2, "bf16", "selective"),
]
CASES = [(*case, 0) for case in CASES] + [
    (2, "resident", 1, "bf16", False, 2),
    (3, "partitioned", 2, "fp32", True, 3),
]


@pytest.mark.distributed
@pytest.mark.parametrize(("stage", "frozen", "tensor", "dtype", "checkpointing", "micro_rows"), CASES)
def test_a_dry_run_agrees_with_real_ranks(ranks, stage, frozen, tensor, dtype, checkpointing, micro_rows):
    parallel = ParallelConfig(
        tensor=tensor,
        zero_stage=stage,
        frozen=frozen,
        activation_checkpointing=checkpointing,
        split_vision=stage == 2 and tensor == 2,
        micro_rows=micro_rows,
    )
    world = 2 * tensor
    real, _ = ranks.run(real_run, parallel, dtype, world=world, tensor=tensor)[0]
    fake = fake_run(parallel, dtype, world)
    assert sum(fake.peak.values()) == pytest.approx(sum(real.peak.values()), rel=0.01)
    for kind in ("frozen", "trainable", "optimizer", "vision"):
        assert fake.peak.get(kind, 0) == real.peak.get(kind, 0), kind
    # All but the counts, flags and norms, of which DeepSpeed's comparison of module numbers is left out.
    moved = {kind: volume for kind, volume in real.sent.items() if kind.purpose != "control"}
    assert moved
    assert moved.keys() == {kind for kind in fake.sent if kind.purpose != "control"}
    for kind, volume in moved.items():
        assert fake.sent[kind].calls == pytest.approx(volume.calls), kind
        assert fake.sent[kind].payload_bytes == pytest.approx(volume.payload_bytes), kind
    planned = step_traffic(work_of(parallel, dtype), tp=tensor, dp=2, residency=frozen)
    sent = by_purpose(real.sent)
    assert ("tensor_gather" in planned) == ("tensor_gather" in sent) == (stage == 2 and tensor == 2)
    for kind in ("tensor_all_reduce", "tensor_gather", "gradient_reduce"):
        if kind in planned:
            assert sent[kind].wire_bytes == pytest.approx(planned[kind].wire_bytes, rel=0.1), kind


@pytest.mark.distributed
@pytest.mark.parametrize("storage", ["fp8", "fp8 products"])
def test_quantised_weights_run_dry_as_on_real_ranks(ranks, storage):
    parallel = ParallelConfig(tensor=2, zero_stage=3, activation_checkpointing=True)
    real, _ = ranks.run(real_run, parallel, "bf16", storage, world=4, tensor=2)[0]
    fake = fake_run(parallel, "bf16", 4, storage=storage)
    assert sum(fake.peak.values()) == pytest.approx(sum(real.peak.values()), rel=0.01)
    work = work_of(parallel, "bf16", storage)
    planned = state_memory(work, tp=2, dp=2, residency="resident")["frozen"]
    assert fake.peak["frozen"] == real.peak["frozen"] == planned
    sums = [by_purpose(x.sent)["tensor_all_reduce"] for x in (real, fake)]
    assert sums[0].wire_bytes == sums[1].wire_bytes
    wanted = step_traffic(work, tp=2, dp=2, residency="resident")["tensor_all_reduce"]
    assert sums[0].wire_bytes == pytest.approx(wanted.wire_bytes, rel=0.1)


@pytest.mark.distributed
def test_packed_rows_of_stored_features_run_dry_on_any_rank():
    parallel = ParallelConfig(tensor=2, activation_checkpointing=True)
    packed = DatasetShape(name="packed", rows=8, tokens=24, media=3, frames=1, pixels=False, packed=True)
    work = replace(work_of(parallel, "bf16"), datasets=(packed,))
    runs = [
        dry_run(work, tiny.train_config(dtype="bf16"), Topology(world=8, rank=rank, tensor=2))
        for rank in (0, 7)
    ]
    first, last = (sum(run.peak.values()) for run in runs)
    assert first == pytest.approx(last, rel=0.01)
    assert runs[0].sent == runs[1].sent
    assert "vision_work" not in runs[0].peak
    kinds = by_purpose(runs[0].sent)
    assert kinds["tensor_all_reduce"].wire_bytes == pytest.approx(
        step_traffic(work, tp=2, dp=4, residency="resident")["tensor_all_reduce"].wire_bytes, rel=0.1
    )


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["tiny", "efficientnet-lite0"])
def test_an_encoder_with_statistics_runs_dry(tmp_path, name):
    """As in the demo: neither the statistics nor the weights of the encoder can be read or handed on there."""
    width, weights = (16, "") if name == "tiny" else (1280, str(tmp_path / "lite0.pth"))
    if weights:
        torch.save(random_state(), weights)
    path = str(tmp_path / "statistics.safetensors")
    save_file({"mean": torch.ones(width), "std": torch.ones(width)}, path)
    vision = VisionConfig(name=name, weights=weights, image_size=32, tiny_width=16, statistics=path)
    work = work_of(ParallelConfig(), "bf16")
    resampler = replace(work.model.resampler, feature_width=width)
    work = replace(work, model=replace(work.model, vision=vision, resampler=resampler))
    run = dry_run(work, tiny.train_config(dtype="bf16"), Topology(world=2, rank=0, tensor=1))
    held = sum(b.numel() * b.element_size() for b in build_vision(vision).buffers())
    assert run.peak["vision"] == pytest.approx(held, rel=0.01)


@pytest.mark.distributed
def test_resident_weights_move_no_byte_and_train_alike(ranks):
    """Measured on real ranks; tests/flamingo_dist/training/test_parity.py compares more layouts and the weights."""
    runs = {}
    for frozen in ("resident", "partitioned"):
        parallel = ParallelConfig(zero_stage=3, frozen=frozen, activation_checkpointing=True)
        runs[frozen] = ranks.run(real_run, parallel, "fp32", world=2)[0]
    resident, partitioned = (by_purpose(runs[name][0].sent) for name in ("resident", "partitioned"))
    assert "frozen_gather" not in resident
    assert partitioned["frozen_gather"].payload_bytes > 0
    assert runs["resident"][1] == pytest.approx(runs["partitioned"][1], abs=2e-5)
    for name, sent in (("resident", resident), ("partitioned", partitioned)):
        model = work_of(ParallelConfig(), "fp32").model
        gathers = replay(model, 1, partitioned=name == "partitioned", checkpointing=True, limits=LIMITS)
        for kind, elements in (("trainable_gather", gathers.trainable), ("frozen_gather", gathers.frozen)):
            if elements:
                formula = len(DATASETS) * 4 * elements
                assert sent[kind].payload_bytes == pytest.approx(formula, rel=0.05), (name, kind)
