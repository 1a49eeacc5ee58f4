"""What a batch knows of itself, so that a device need not be asked."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flamingo_dist.parallel.topology import ParallelConfig, single_process
from flamingo_dist.training.build import build_model
from kernels.gated_xattn import reference
from tests import tiny

aten = torch.ops.aten


@pytest.mark.parametrize("rows", [0, 1, 3, 4])
def test_parts_know_their_own_rows(rows):
    whole = tiny.batch("docs", 1).counted()
    for part in whole.split(rows):
        assert part.counts is not None
        assert part.num_loss_tokens() == int(part.loss_mask_BT.sum())
        assert part.num_media() == int(part.media_mask_BM.sum())
        assert len(part.counts.tokens) == len(part.tokens_BT)
    assert sum(part.num_tokens() for part in whole.split(rows)) == whole.num_tokens()


def test_a_batch_is_counted_before_it_leaves_the_host():
    batch = tiny.batch("docs", 1)
    away = batch.to(torch.device("meta"))
    assert away.tokens_BT.device.type == "meta"
    assert away.num_loss_tokens() == batch.num_loss_tokens() > 0
    assert away.num_media() == batch.num_media() > 0
    assert away.num_tokens() == batch.num_tokens() > 0
    assert [part.num_media() for part in away.split(2)] == [part.num_media() for part in batch.split(2)]


class Questions(TorchDispatchMode):
    """Notes what a device would have to answer before the host can go on."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func in (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if by_mask or func in (
            aten.nonzero.default,
            aten._local_scalar_dense.default,
            aten.masked_select.default,
        ):
            self.asked.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.distributed
def test_forward_and_backward_ask_the_device_nothing(monkeypatch):
    """Each question drained the queue of a GPU, which then stood still while the host caught up."""
    monkeypatch.setattr(reference, "values_are_known", lambda tensor: False)  # as on an accelerator
    batch = tiny.batch("docs", 1).counted()
    outcomes = []
    with single_process() as topology:
        model = build_model(
            tiny.network(gate_init=0.5), ParallelConfig(zero_stage=0), topology, dtype=torch.float32, seed=0
        )
        for known in (True, False):
            counts = {"num_media": batch.num_media(), "num_targets": batch.num_loss_tokens()} if known else {}
            with Questions() as questions:
                loss = tiny.forward(model, batch, targets_BT=batch.targets(), **counts).nll_BT
                loss.sum().backward()
            grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            model.zero_grad(set_to_none=True)
            outcomes.append([loss.detach(), *grads])
            assert (questions.asked == []) == known, questions.asked
    for one, other in zip(*outcomes, strict=True):
        assert torch.equal(one, other)
