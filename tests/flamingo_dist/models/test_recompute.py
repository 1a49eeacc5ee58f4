"""Selective recomputation: the same gradients, costly results used again, and loud where it cannot hold."""

import importlib.util

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from flamingo_dist.models.recompute import Keeper
from flamingo_dist.parallel.topology import ParallelConfig, single_process
from flamingo_dist.training.build import build_model
from tests import tiny


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.name() in ("aten::mm", "aten::addmm")
        return func(*args, **(kwargs or {}))


def backward(recompute, every):
    """Gradients of one backward, the products that it took, and its network."""
    with single_process() as topology:
        parallel = ParallelConfig(zero_stage=0, activation_checkpointing=recompute)
        config = tiny.network(gate_init=0.5, layers=4, every=every)
        model = build_model(config, parallel, topology, dtype=torch.float32, seed=7)
        batch = tiny.batch("docs", 0)
        out = model(
            batch.tokens_BT,
            batch.media_index_BT,
            batch.media,
            batch.media_mask_BM,
            targets_BT=batch.targets(),
        )
        with Products() as products:
            out.nll_BT.sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, products.count


@pytest.mark.parametrize("every", [1, 3])
def test_gradients_are_equal_to_the_last_bit_and_products_are_not_repeated(every):
    kept, fewest = backward(False, every)
    everything, most = backward(True, every)
    selective, count = backward("selective", every)
    gated, blocks = {1: 4, 3: 2}[every], 4
    # A frozen block repeats all but its last product, a gated block all six or none.
    assert most - fewest == 3 * blocks + 6 * gated
    assert count - fewest == 3 * blocks
    assert kept.keys() == everything.keys() == selective.keys()
    for name, value in kept.items():
        assert torch.equal(selective[name], value), name
        assert torch.equal(everything[name], value), name


def run(function):
    """A checkpointed product inside a keeper, then what `function` does with it."""
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)

    def body(keeper, x):
        with keeper:
            y = x @ w
        return function(y).sum()

    return checkpoint(body, Keeper(), x, use_reentrant=False)


def test_a_second_backward_is_refused():
    loss = run(torch.sin)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_a_kept_result_that_was_changed_is_found_out():
    with pytest.raises(AssertionError, match="changed in place"):
        run(lambda y: y.mul_(2).sin()).backward()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_kernels_attention_is_kept():
    import kernels.gated_xattn.op  # noqa: F401, it defines the operator

    with FakeTensorMode():
        q, k, v = (torch.empty(2, n, 2, 16, requires_grad=True) for n in (6, 8, 8))
        spans, gate = torch.empty(2, 2, dtype=torch.int32), torch.empty(())
        keeper = Keeper()
        with keeper:
            first = torch.ops.flamingo.gated_xattn(q, k, v, spans, gate)
        with keeper:
            second = torch.ops.flamingo.gated_xattn(q, k, v, spans, gate)
        assert second is not first
        assert second.untyped_storage()._cdata == first.untyped_storage()._cdata
        assert second.requires_grad
