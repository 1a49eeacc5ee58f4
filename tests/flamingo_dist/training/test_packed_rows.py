"""Packed rows give the loss and the gradients of the samples apart, whatever the layout; weights follow a schedule."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.formatting import TokenizedSample
from data_pipeline.packing import pack_row
from data_pipeline.schedule import WeightSchedule
from flamingo_dist.models.positions import segment_mask, segment_positions
from flamingo_dist.parallel.topology import ParallelConfig, Topology, single_process
from flamingo_dist.training.batch import TrainBatch
from flamingo_dist.training.build import build_model
from flamingo_dist.training.config import OptimizerConfig
from flamingo_dist.training.optimizer import parameter_groups
from tests import tiny

pytestmark = pytest.mark.distributed
ROWS = 8


def sample_of(whole: TrainBatch, row: int) -> TokenizedSample:
    length = int(whole.loss_mask_BT[row].nonzero().max()) + 1
    return TokenizedSample(
        tokens_T=whole.tokens_BT[row, :length].numpy(),
        loss_mask_T=whole.loss_mask_BT[row, :length].numpy(),
        media_index_T=whole.media_index_BT[row, :length].numpy(),
        media=("png",),
    )


def packed(whole: TrainBatch, pack: int, *, bad: int | None = None) -> TrainBatch:
    """The rows of a batch of pairs, `pack` to a row; sample `bad` is left out."""
    samples = [None if row == bad else sample_of(whole, row) for row in range(ROWS)]
    length = max(len(s.tokens_T) for s in samples if s is not None) * pack
    arrays = [np.zeros((ROWS // pack, length), d) for d in (np.int64, np.bool_, np.int32, np.int32)]
    for b in range(ROWS // pack):
        for array, part in zip(arrays, pack_row(samples[b * pack : (b + 1) * pack], length), strict=True):
            array[b, : len(part)] = part
    tokens, loss, index, segments = (torch.from_numpy(array) for array in arrays)
    media, mask = whole.media.clone(), whole.media_mask_BM.clone()
    if bad is not None:
        media[bad], mask[bad] = 0, False
    return TrainBatch(
        tokens_BT=tokens,
        loss_mask_BT=loss,
        media_index_BT=index,
        media=media.flatten(0, 1).unflatten(0, (ROWS // pack, pack)),
        media_mask_BM=mask.view(ROWS // pack, pack),
        segments_BT=segments,
    )


def without(whole: TrainBatch, bad: int | None) -> TrainBatch:
    """The batch with an emptied slot."""
    if bad is None:
        return whole
    changed = {n: v.clone() for n, v in whole.tensors().items()}
    for value in changed.values():
        value[bad] = 0
    return TrainBatch(**changed)


def loss_and_gradients(
    batch: TrainBatch, topology: Topology, **parallel: Any
) -> tuple[float, dict[str, Any]]:
    model = build_model(
        tiny.network(gate_init=0.5),
        ParallelConfig(zero_stage=0, **parallel),
        topology,
        dtype=torch.float32,
        seed=7,
    )
    out = model(
        batch.tokens_BT,
        batch.media_index_BT,
        batch.media,
        batch.media_mask_BM,
        targets_BT=batch.targets(),
        segments_BT=batch.segments_BT,
    )
    loss = out.nll_BT.sum() / batch.num_loss_tokens()
    loss.backward()
    return float(loss.detach()), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("pack", [2, 4, 8])
@pytest.mark.parametrize("bad", [None, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_those_of_the_samples_apart(
    pack: int, bad: int | None, checkpointing: bool
) -> None:
    whole = tiny.batch("pairs", 3, rows=ROWS)
    with single_process() as topology:
        loss, gradients = loss_and_gradients(without(whole, bad), topology)
        rows = packed(whole, pack, bad=bad)
        packed_loss, packed_gradients = loss_and_gradients(
            rows, topology, activation_checkpointing=checkpointing
        )
    assert rows.num_loss_tokens() == without(whole, bad).num_loss_tokens()
    assert rows.num_sequences() == ROWS
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert packed_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, atol=1e-5, rtol=1e-5)


def test_a_packed_sample_sees_nothing_of_its_neighbours() -> None:
    whole = packed(tiny.batch("pairs", 3, rows=ROWS), 4)
    changed = replace(whole, tokens_BT=whole.tokens_BT.clone(), media=whole.media.clone())
    assert whole.segments_BT is not None
    second = whole.segments_BT == 2
    words = second & (whole.tokens_BT < tiny.VOCAB)
    changed.tokens_BT[words] = (whole.tokens_BT[words] + 1) % tiny.VOCAB
    changed.media[:, 1] = 255 - changed.media[:, 1]
    with single_process() as topology:
        model = build_model(
            tiny.network(gate_init=0.5), ParallelConfig(zero_stage=0), topology, dtype=torch.float32, seed=7
        )
        nll = [
            model(
                b.tokens_BT,
                b.media_index_BT,
                b.media,
                b.media_mask_BM,
                targets_BT=whole.targets(),
                segments_BT=b.segments_BT,
            ).nll_BT.detach()
            for b in (whole, changed)
        ]
        with pytest.raises(ValueError, match="packed rows are for training"):
            model(
                whole.tokens_BT,
                whole.media_index_BT,
                whole.media,
                whole.media_mask_BM,
                segments_BT=whole.segments_BT,
                cache=model.new_cache(),
            )
    difference = (nll[0] - nll[1]).abs()
    assert difference[~second].max() == 0.0
    assert difference[second].max() > 1e-3


def test_masks_and_positions_of_segments() -> None:
    segments_BT = torch.tensor([[1, 1, 2, 2, 2, 0], [2, 3, 3, 3, 3, 3]])
    assert segment_positions(segments_BT).tolist() == [[0, 1, 0, 1, 2, 0], [0, 0, 1, 2, 3, 4]]
    mask = segment_mask(segments_BT)[:, 0]
    for b in range(2):
        for q in range(6):
            for k in range(6):
                wanted = k <= q and segments_BT[b, k] == segments_BT[b, q]
                assert mask[b, q, k] == wanted


def sgd_step(topology: Topology, parallel: ParallelConfig, reduction: str, pack: int) -> dict[str, Any]:
    """The update, which is the gradient, of one step on pairs, packed or not."""
    import flamingo_dist.training.build as build
    from tests.flamingo_dist.training.test_parity import whole_weights

    train = replace(
        tiny.train_config(),
        reduction=reduction,
        optimizer=OptimizerConfig(lr=1.0, warmup_steps=0, clip_norm=0),
    )
    keep = build.make_optimizer
    build.make_optimizer = lambda named, config: torch.optim.SGD(
        [{**g, "weight_decay": 0.0} for g in parameter_groups(named, config)], lr=1.0
    )
    try:
        step = tiny.make_step(topology, parallel, train, tiny.network(gate_init=0.5))
    finally:
        build.make_optimizer = keep
    step.weights = {"pairs": WeightSchedule(points=((0, 0.5), (10, 1.5))).at}
    whole = tiny.batch("pairs", 3, rows=ROWS)
    batch = tiny.local(packed(whole, pack) if pack > 1 else whole, topology)
    before = whole_weights(step, topology)
    result = step.run(4, {"pairs": batch})
    after = whole_weights(step, topology)
    return {
        "loss": result.loss["pairs"],
        "weights": result.weights,
        "norm": result.grad_norm,
        "update": {n: before[n] - after[n] for n in before},
    }


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("world", "tensor", "stage"), [(2, 1, 1), (4, 2, 3)])
def test_tensor_parallelism_and_zero_leave_packing_alone(ranks, world, tensor, stage, reduction):
    parallel = ParallelConfig(tensor=tensor, zero_stage=stage)
    apart = ranks.run(sgd_step, parallel, reduction, 1, world=world, tensor=tensor)[0]
    for result in ranks.run(sgd_step, parallel, reduction, 2, world=world, tensor=tensor):
        assert result["weights"] == {"pairs": pytest.approx(0.9)}, "step 4 of a line from 0.5 to 1.5"
        assert result["loss"] == pytest.approx(apart["loss"], rel=1e-5)
        assert result["norm"] == pytest.approx(apart["norm"], rel=1e-5)
        for name, update in apart["update"].items():
            torch.testing.assert_close(result["update"][name], update, atol=1e-5, rtol=1e-4)
