"""The encoder in training: nothing of it is kept, and its work can be shared among tensor-parallel ranks."""

from dataclasses import replace

import pytest
import torch

from flamingo_dist.models.vision.split import encode_split
from flamingo_dist.parallel.topology import ParallelConfig, single_process
from flamingo_dist.training.build import build_model
from tests import tiny


def shared(topology, count):
    """A stand-in that shows who encodes what: each rank adds its number."""
    frames = torch.arange(count * 12, dtype=torch.float32).view(count, 3, 2, 2)
    seen = []

    def encode(few):
        seen.append(len(few))
        return few.flatten(2) * 2 + 1000 * topology.tensor_rank

    return encode_split(encode, frames), seen, frames.flatten(2) * 2


@pytest.mark.distributed
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_every_rank_gets_all_features_and_encodes_its_share(ranks, count):
    share = -(-count // 2)
    first, second = ranks.run(shared, count, world=2, tensor=2)
    for features, _, plain in (first, second):
        expected = plain.clone()
        expected[share:] += 1000
        assert torch.equal(features, expected)
    assert (first[1], second[1]) == ([share], [count - share])


def saved_bytes(pixels):
    """Bytes that a forward keeps for the backward, and the network's gradients."""
    with single_process() as topology:
        config = replace(tiny.network(gate_init=0.5), vision_batch=3)
        parallel = ParallelConfig(zero_stage=0)
        model = build_model(config, parallel, topology, dtype=torch.float32, seed=7)
        batch = tiny.batch("docs", 0)
        sizes = {}
        if not pixels:
            features = model.vision(batch.media.flatten(0, 2)).unflatten(0, batch.media.shape[:3])
            batch = replace(batch, media=features)
        calls = []
        model.vision.register_forward_hook(lambda module, given, result: calls.append(result))

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = tiny.forward(model, batch, targets_BT=batch.targets())
        out.nll_BT.sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return sum(sizes.values()), grads, calls


def test_nothing_of_the_encoder_is_kept_for_the_backward():
    from_pixels, grads, calls = saved_bytes(True)
    from_features, wanted, none = saved_bytes(False)
    assert len(calls) > 1, "sub-batches"
    assert not none
    assert all(result.grad_fn is None and len(result) <= 3 for result in calls)
    assert from_pixels == from_features
    for name, grad in wanted.items():
        torch.testing.assert_close(grads[name], grad)
