"""The loss over a frozen head in chunks: losses and gradients of a plain cross-entropy over all logits."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from flamingo_dist.models import head_loss
from flamingo_dist.models.head_loss import HeadShard, frozen_head_nll
from flamingo_dist.models.vocabulary import padded_vocab_size

D, X = 12, 3


def draw(vocab: int, tokens: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "x": normal(tokens, D),
        "weight": normal(vocab, D),
        "extra": normal(tokens, X),
        "upstream": normal(tokens).float(),
        "targets": torch.randint(0, vocab + X, (tokens,), generator=generator),
    }


def plain(found: dict[str, Tensor]) -> list[Tensor]:
    """Losses and gradients in fp64 by a cross-entropy over all logits."""
    x, extra = (found[name].double().requires_grad_() for name in ("x", "extra"))
    logits = torch.cat([x @ found["weight"].double().T, extra], dim=1)
    nll = F.cross_entropy(logits, found["targets"], reduction="none")
    return [nll.detach(), *torch.autograd.grad(nll, (x, extra), found["upstream"].double())]


def ours(found: dict[str, Tensor], rank: int = 0, ranks: int = 1) -> list[Tensor]:
    """The same by `frozen_head_nll` with this rank's rows."""
    vocab = len(found["weight"])
    rows = padded_vocab_size(vocab, ranks) // ranks
    weight = torch.full((rows * ranks, D), torch.nan, dtype=found["weight"].dtype)
    weight[:vocab] = found["weight"]
    weight[vocab:] = 7.0  # published heads have such rows: they must not matter
    x, extra = (found[name].clone().requires_grad_() for name in ("x", "extra"))
    shard = HeadShard(weight_VD=weight[rank * rows : (rank + 1) * rows], start=rank * rows, vocab_size=vocab)
    nll = frozen_head_nll(x, extra, found["targets"], shard)
    return [nll.detach(), *torch.autograd.grad(nll, (x, extra), found["upstream"])]


@given(
    vocab=st.integers(1, 40),
    tokens=st.integers(0, 9),
    chunk=st.integers(1, 100),
    seed=st.integers(0, 1000),
)
def test_losses_and_gradients_are_those_of_all_logits(vocab, tokens, chunk, seed):
    found = draw(vocab, tokens, torch.float64, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_loss, "CHUNK_LOGITS", chunk)
        got = ours(found)
    for one, other in zip(got, plain(found), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


def test_a_sure_token_keeps_the_digits_of_its_gradient_in_bf16():
    """Where the target's probability is nearly 1 the gradient is small, not the difference of two large products."""
    found = draw(D, D, torch.bfloat16)
    found |= {"x": torch.eye(D).bfloat16(), "weight": 8 * torch.eye(D).bfloat16(), "targets": torch.arange(D)}
    found["extra"] = torch.zeros(D, X).bfloat16()
    want = plain(found)
    assert 0 < want[0].max() < 0.01
    for one, other in zip(ours(found), want, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-2, atol=0.0)


def test_no_gradient_is_made_where_none_is_wanted(monkeypatch):
    found = draw(20, 5, torch.float32)
    want = ours(found)[0]
    monkeypatch.setattr(torch, "mm", None)
    shard = HeadShard(weight_VD=found["weight"], start=0, vocab_size=20)
    with torch.no_grad():
        got = frozen_head_nll(found["x"].requires_grad_(), found["extra"], found["targets"], shard)
    assert torch.equal(got, want)
    assert torch.equal(frozen_head_nll(found["x"].detach(), found["extra"], found["targets"], shard), want)


def test_a_head_that_wants_a_gradient_is_refused():
    found = draw(20, 5, torch.float32)
    shard = HeadShard(weight_VD=found["weight"].requires_grad_(), start=0, vocab_size=20)
    with pytest.raises(ValueError, match="freeze it"):
        frozen_head_nll(found["x"], found["extra"], found["targets"], shard)


SIZES = [(37, 11), (5, 4), (64, 0)]
"""Vocabulary and tokens: padding rows, a rank with nothing but padding, a batch without a target."""


def sharded(topology: Any) -> tuple[int, list[list[Tensor]]]:
    head_loss.CHUNK_LOGITS = 40  # several chunks
    rank, size = topology.tensor_rank, topology.tensor
    return rank, [ours(draw(*sizes, torch.float64), rank, size) for sizes in SIZES]


@pytest.mark.distributed
def test_every_tensor_parallel_rank_has_the_whole_loss_and_gradient(ranks):
    for _, cases in ranks.run(sharded, world=4, tensor=4):
        for sizes, got in zip(SIZES, cases, strict=True):
            for one, other in zip(got, plain(draw(*sizes, torch.float64)), strict=True):
                torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)
