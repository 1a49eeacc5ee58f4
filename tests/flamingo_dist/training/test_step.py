"""Contracts 3, 4 and 7, and the skipping of bad steps."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flamingo_dist.parallel.topology import ParallelConfig, Topology, single_process
from flamingo_dist.training.batch import TrainBatch
from flamingo_dist.training.build import build_model
from flamingo_dist.training.config import OptimizerConfig, TrainConfig
from flamingo_dist.training.optimizer import is_gate, parameter_groups
from flamingo_dist.training.step import TrainingDivergedError
from tests import tiny

pytestmark = pytest.mark.distributed


def summed_gradient(reduction: str) -> tuple[float, dict[str, torch.Tensor]]:
    """The gradient of the weighted sum of all data sets' losses, by one backward of plain PyTorch."""
    with single_process() as topology:
        model = build_model(
            tiny.network(gate_init=0.5),
            ParallelConfig(zero_stage=0),
            topology,
            dtype=torch.float32,
            seed=tiny.train_config().seed,
        )
        loss = torch.zeros(())
        for name, weight in tiny.WEIGHTS.items():
            whole = tiny.batch(name, 0)
            out = model(
                whole.tokens_BT,
                whole.media_index_BT,
                whole.media,
                whole.media_mask_BM,
                targets_BT=whole.targets(),
            )
            divisor = whole.num_loss_tokens() if reduction == "mean" else whole.tokens_BT.shape[0]
            loss = loss + weight * out.nll_BT.sum() / divisor
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    norm = float(torch.stack([g.pow(2).sum() for g in grads.values()]).sum().sqrt())
    return norm, grads


def one_sgd_step(topology: Topology, parallel: ParallelConfig, reduction: str) -> dict[str, Any]:
    """One step of SGD with rate 1 and no clip: the update is the gradient."""
    train = replace(
        tiny.train_config(),
        reduction=reduction,
        optimizer=OptimizerConfig(lr=1.0, warmup_steps=0, clip_norm=0),
    )
    import flamingo_dist.training.build as build

    keep = build.make_optimizer

    def sgd(named: Any, config: OptimizerConfig) -> torch.optim.Optimizer:
        groups = [{**g, "weight_decay": 0.0} for g in parameter_groups(named, config)]
        return torch.optim.SGD(groups, lr=1.0)

    build.make_optimizer = sgd
    try:
        step = tiny.make_step(topology, parallel, train, tiny.network(gate_init=0.5))
    finally:
        build.make_optimizer = keep
    from tests.flamingo_dist.training.test_parity import whole_weights

    before = whole_weights(step, topology)
    result = step.run(0, tiny.batches(0, topology), bad_samples=10**topology.data_rank)
    after = whole_weights(step, topology)
    assert result.bad_samples == sum(10**rank for rank in range(topology.data))
    return {"norm": result.grad_norm, "update": {n: before[n] - after[n] for n in before}}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("world", "tensor", "stage"), [(2, 1, 0), (2, 1, 1), (2, 1, 2), (2, 1, 3), (4, 2, 1), (4, 2, 3)]
)
def test_one_backward_per_data_set_is_the_summed_gradient(ranks, world, tensor, stage, reduction):
    norm, grads = summed_gradient(reduction)
    parallel = ParallelConfig(tensor=tensor, zero_stage=stage)
    for result in ranks.run(one_sgd_step, parallel, reduction, world=world, tensor=tensor):
        assert result["norm"] == pytest.approx(norm, rel=1e-4)
        assert result["update"].keys() == grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(
                result["update"][name], grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


def with_features(batch: TrainBatch) -> TrainBatch:
    """The batch with features instead of pixels, which can hold a NaN."""
    shape = (*batch.media.shape[:3], 4, 16)
    features = torch.rand(shape, generator=torch.Generator().manual_seed(5))
    return replace(batch, media=features)


def with_bad_step(topology: Topology, stage: int, dtype: str, bad_rank: int) -> dict[str, Any]:
    from tests.flamingo_dist.training.test_parity import whole_weights

    train = tiny.train_config(6, dtype=dtype)
    step = tiny.make_step(topology, ParallelConfig(tensor=topology.tensor, zero_stage=stage), train)
    applied, changed = [], []
    for number in range(4):
        batches = {name: with_features(b) for name, b in tiny.batches(number, topology).items()}
        if number == 1 and topology.data_rank == bad_rank:
            bad = batches["docs"]
            batches["docs"] = replace(
                bad,
                media=torch.full_like(bad.media, float("nan")),
                media_mask_BM=torch.ones_like(bad.media_mask_BM),
                media_index_BT=torch.ones_like(bad.media_index_BT),
            )
        before = whole_weights(step, topology)
        result = step.run(number, batches)
        after = whole_weights(step, topology)
        applied.append(result.applied)
        changed.append(any(not torch.equal(before[n], after[n]) for n in before))
        assert all(v.isfinite().all() for v in after.values())
    return {"applied": applied, "changed": changed, "skipped": step.skipped}


@pytest.mark.parametrize(
    ("stage", "dtype", "world", "tensor"),
    [(0, "fp32", 2, 1), (1, "fp32", 2, 1), (2, "bf16", 2, 1), (3, "fp32", 4, 2), (3, "bf16", 2, 1)],
)
def test_a_non_finite_step_is_skipped_by_all_ranks_together(ranks, stage, dtype, world, tensor):
    for result in ranks.run(with_bad_step, stage, dtype, 1, world=world, tensor=tensor):
        assert result["applied"] == [True, False, True, True]
        assert result["changed"] == [True, False, True, True]
        assert result["skipped"] == 1


def diverging(topology: Topology) -> str:
    train = replace(tiny.train_config(9), max_bad_steps=3)
    step = tiny.make_step(topology, ParallelConfig(zero_stage=3), train)
    for number in range(9):
        batches = tiny.batches(number, topology)
        bad = torch.full((2, 1, 2, 4, 16), float("inf"))
        batches["pairs"] = replace(batches["pairs"], media=bad)
        try:
            step.run(number, batches)
        except TrainingDivergedError as error:
            return f"{number}: {error}"
    return "never"


def test_the_job_stops_after_bad_steps_in_a_row(ranks):
    for told in ranks.run(diverging, world=2):
        assert told.startswith("2: 3 steps in a row, up to step 2, had a non-finite loss")


def uneven(topology: Topology, frozen: str, checkpointing: bool) -> list[float]:
    """Data-parallel rank 0 has no image at all, rank 1 no token that carries loss."""
    parallel = ParallelConfig(
        tensor=topology.tensor, zero_stage=3, frozen=frozen, activation_checkpointing=checkpointing
    )
    step = tiny.make_step(topology, parallel)
    norms = []
    for number in range(2):
        batches = tiny.batches(number, topology)
        for name, batch in batches.items():
            if topology.data_rank == 0:
                batches[name] = replace(
                    batch,
                    media=torch.zeros_like(batch.media),
                    media_mask_BM=torch.zeros_like(batch.media_mask_BM),
                    media_index_BT=torch.zeros_like(batch.media_index_BT),
                )
            else:
                batches[name] = replace(batch, loss_mask_BT=torch.zeros_like(batch.loss_mask_BT))
        norms.append(step.run(number, batches).grad_norm)
    return norms


@pytest.mark.parametrize(
    ("frozen", "checkpointing", "world", "tensor"),
    [("partitioned", True, 2, 1), ("partitioned", False, 4, 2), ("resident", True, 4, 2)],
)
def test_ranks_stay_in_step_whatever_their_batches_hold(ranks, frozen, checkpointing, world, tensor):
    results = ranks.run(uneven, frozen, checkpointing, world=world, tensor=tensor, timeout=90)
    assert all(r == results[0] and all(n > 0 for n in r) for r in results)


def frozen_bits(topology: Topology, frozen: str) -> dict[str, Any]:
    parallel = ParallelConfig(tensor=topology.tensor, zero_stage=3, frozen=frozen)
    step = tiny.make_step(topology, parallel, tiny.train_config(3, dtype="bf16"))
    module = step.engine.module

    def bits() -> dict[str, torch.Tensor]:
        import deepspeed

        kept = [p for p in module.parameters() if not p.requires_grad and hasattr(p, "ds_id")]
        with deepspeed.zero.GatheredParameters(kept, enabled=bool(kept)):
            named = {n: p for n, p in module.named_parameters() if not p.requires_grad}
            named |= dict(module.named_buffers())
            return {n: v.detach().clone() for n, v in named.items() if n.startswith(("lm.", "vision."))}

    before = bits()
    for number in range(3):
        step.run(number, tiny.batches(number, topology))
    after = bits()
    held = [n for n, p in module.named_parameters() if not p.requires_grad and p.grad is not None]
    changed = [n for n in before if not torch.equal(before[n], after[n])]
    dist.barrier()
    return {"count": len(before), "changed": changed, "held": held}


@pytest.mark.parametrize("frozen", ["resident", "partitioned"])
def test_frozen_weights_never_change_and_hold_no_gradient(ranks, frozen):
    for result in ranks.run(frozen_bits, frozen, world=4, tensor=2):
        assert result["count"] > 15
        assert result["changed"] == []
        assert result["held"] == []


def round_robin(topology: Topology) -> list[list[str]]:
    train = replace(tiny.train_config(4), mixing="round_robin")
    step = tiny.make_step(topology, ParallelConfig(zero_stage=2), train)
    return [list(step.run(n, tiny.batches(n, topology)).loss) for n in range(4)]


def test_round_robin_takes_the_data_sets_in_turn(ranks):
    for names in ranks.run(round_robin, world=2):
        assert names == [["docs"], ["pairs"], ["docs"], ["pairs"]]


def counted(topology: Topology) -> tuple[dict[str, int], dict[str, int], int]:
    step = tiny.make_step(topology, ParallelConfig(tensor=topology.tensor))
    result = step.run(0, tiny.batches(0, topology))
    return dict(result.media), dict(result.loss_tokens), result.tokens


@pytest.mark.distributed
def test_counts_are_those_of_the_global_batch_whatever_the_layout(ranks):
    whole = {name: tiny.batch(name, 0) for name in tiny.WEIGHTS}
    expected = (
        {name: batch.num_media() for name, batch in whole.items()},
        {name: batch.num_loss_tokens() for name, batch in whole.items()},
        sum(batch.num_tokens() for batch in whole.values()),
    )
    assert ranks.run(counted, world=4, tensor=2) == [expected] * 4


def test_resident_weights_have_the_dtype_of_the_run_and_the_encoder_keeps_its_own():
    with single_process() as topology:
        model = build_model(tiny.network(), ParallelConfig(), topology, dtype=torch.bfloat16, seed=0)
    assert {buffer.dtype for buffer in model.lm.buffers()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.vision.buffers()} == {torch.float32}


def stop_wish(topology: Topology) -> list[bool]:
    step = tiny.make_step(topology, ParallelConfig(zero_stage=0))
    asked = [False, topology.rank == 1]
    return [step.run(n, tiny.batches(n, topology), stop=a).stop_requested for n, a in enumerate(asked)]


def test_a_stop_wish_of_one_rank_reaches_all(ranks):
    assert ranks.run(stop_wish, world=2) == [[False, True], [False, True]]


def test_weight_decay_spares_the_resampler_and_the_gates():
    with single_process() as topology:
        model = build_model(
            tiny.network(), ParallelConfig(zero_stage=0), topology, dtype=torch.float32, seed=0
        )
    config = OptimizerConfig(gate_lr_scale=20.0)
    decayed, plain, gates = parameter_groups(model.named_parameters(), config)
    names = {id(p): n for n, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1
    assert plain["weight_decay"] == gates["weight_decay"] == 0.0
    assert all(names[id(p)].startswith("resampler.") for p in plain["params"])
    assert {is_gate(names[id(p)]) for p in gates["params"]} == {True}
    assert len(gates["params"]) == 2 * len(model.gated)
    assert gates["lr_scale"] == 20.0
    assert not any(names[id(p)].startswith("resampler.") for p in decayed["params"])
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sum(len(g["params"]) for g in (decayed, plain, gates)) == len(trainable)


def test_learning_rate_warms_up_linearly_and_stays():
    config = TrainConfig(steps=10, optimizer=OptimizerConfig(lr=1e-3, warmup_steps=4)).optimizer
    assert [config.lr_at(s) for s in range(6)] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])
