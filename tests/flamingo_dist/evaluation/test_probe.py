from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flamingo_dist.evaluation.probe import other_media, probe
from tests.flamingo_dist.inference.fake_flamingo import FakeFlamingo, Output

IMAGE = 11


@dataclass(frozen=True, kw_only=True)
class SampleBatch:
    tokens_BT: Tensor
    loss_mask_BT: Tensor
    media_index_BT: Tensor
    media: Tensor
    media_mask_BM: Tensor


def make_batch(counts: list[int], *, seed: int = 0, slots: int = 3, length: int = 9) -> SampleBatch:
    """Samples of `counts` media each: `<image>` tags early, text afterwards, the last tokens padding."""
    generator = torch.Generator().manual_seed(seed)
    size = len(counts)
    tokens = torch.randint(1, 11, (size, length), generator=generator)
    mask = torch.zeros(size, slots, dtype=torch.bool)
    for row, count in enumerate(counts):
        tokens[row, 1 : 1 + 2 * count : 2] = IMAGE
        mask[row, :count] = True
    loss_mask = tokens != IMAGE
    loss_mask[:, 0] = False
    loss_mask[::2, -2:] = False
    media = torch.randn(size, slots, 1, 4, 3, generator=generator).half() * mask[:, :, None, None, None]
    return SampleBatch(
        tokens_BT=tokens,
        loss_mask_BT=loss_mask,
        media_index_BT=(tokens == IMAGE).cumsum(1).int(),
        media=media,
        media_mask_BM=mask,
    )


def nll_sum(model: FakeFlamingo, batch: SampleBatch) -> tuple[float, int]:
    """The loss computed the long way: token by token from the logits."""
    logits = model(batch.tokens_BT, batch.media_index_BT, batch.media, batch.media_mask_BM).logits_BTV
    log_probs = logits.log_softmax(-1)
    total, count = 0.0, 0
    for row, place in batch.loss_mask_BT.nonzero().tolist():
        total -= float(log_probs[row, place - 1, batch.tokens_BT[row, place]])
        count += 1
    return total, count


MASKS = st.integers(2, 6).flatmap(
    lambda size: st.integers(1, 4).flatmap(
        lambda slots: st.lists(
            st.lists(st.booleans(), min_size=slots, max_size=slots), min_size=size, max_size=size
        )
    )
)


@settings(deadline=None)
@given(MASKS)
def test_no_sample_gets_its_own_media(mask: list[list[bool]]) -> None:
    donor, slot, found = other_media(torch.tensor(mask))
    for sample, row in enumerate(mask):
        lenders = [other for other in range(len(mask)) if other != sample and any(mask[other])]
        assert bool(found[sample]) == bool(lenders)
        if lenders:
            assert int(donor[sample]) in lenders
            # The k-th real medium becomes the k-th of the lender, whose media repeat where it has fewer.
            taken = [int(slot[sample, place]) for place in range(len(row)) if row[place]]
            offered = [place for place, real in enumerate(mask[int(donor[sample])]) if real]
            assert taken == [offered[rank % len(offered)] for rank in range(len(taken))]


def test_full_batches_are_rolled() -> None:
    donor, slot, _ = other_media(torch.ones(4, 2, dtype=torch.bool))
    assert donor.tolist() == [1, 2, 3, 0]
    assert slot.tolist() == [[0, 1]] * 4


def test_the_four_losses_are_what_they_say() -> None:
    model = FakeFlamingo().eval()
    batches = [make_batch([1, 2, 3], seed=1), make_batch([1, 1], seed=2, length=12)]
    result = probe(model, batches)

    def mean(changed: list[SampleBatch]) -> float:
        sums = [nll_sum(model, batch) for batch in changed]
        return sum(total for total, _ in sums) / sum(count for _, count in sums)

    def exchanged(batch: SampleBatch) -> SampleBatch:
        donor, slot, _ = other_media(batch.media_mask_BM)
        return replace(batch, media=batch.media[donor[:, None], slot])

    assert result.tokens == sum(int(batch.loss_mask_BT.sum()) for batch in batches)
    assert result.true == pytest.approx(mean(batches), rel=1e-5)
    assert result.shuffled == pytest.approx(mean([exchanged(batch) for batch in batches]), rel=1e-5)
    blanks = [replace(batch, media=torch.zeros_like(batch.media)) for batch in batches]
    assert result.blank == pytest.approx(mean(blanks), rel=1e-5)
    with model.gates_off():
        assert result.gates_off == pytest.approx(mean(batches), rel=1e-5)
    assert len({result.true, result.shuffled, result.blank, result.gates_off}) == 4
    assert result.grounding_gap_nats == result.shuffled - result.true
    assert set(result.as_dict()) == {"true", "shuffled", "blank", "gates_off", "tokens"}


def test_ranks_add_their_sums() -> None:
    """Two ranks of unequal token counts give what one rank with both batches gives."""
    model = FakeFlamingo().eval()
    batches = [make_batch([1, 2], seed=1), make_batch([1, 1], seed=2, length=14)]
    sums: list[Tensor] = []

    def keep(total: Tensor) -> Tensor:
        sums.append(total)
        return total

    for batch in batches:
        probe(model, [batch], reduce_sum=keep)
    assert probe(model, [batches[0]], reduce_sum=lambda total: total + sums[1]) == probe(model, batches)


def test_every_batch_makes_the_same_calls() -> None:
    """An emptied sample, or a batch without media, must not change what the ranks run together."""
    model = FakeFlamingo()
    full = make_batch([1, 2])
    empty = replace(make_batch([0, 2]), loss_mask_BT=torch.zeros_like(full.loss_mask_BT))
    probe(model, [full])
    expected = list(model.calls)
    model.calls.clear()
    with pytest.raises(ValueError, match="no token"):
        probe(model, [empty])
    assert model.calls == expected


def test_a_sample_that_nobody_can_lend_to_counts_nowhere() -> None:
    model = FakeFlamingo().eval()
    lonely = make_batch([2, 0])
    result = probe(model, [lonely])
    assert result.tokens == int(lonely.loss_mask_BT[1].sum())
    assert result.true == pytest.approx(result.shuffled), "the sample that counts has no media of its own"


def test_what_masked_positions_hold_does_not_matter() -> None:
    class Poisoned(FakeFlamingo):
        def forward(self, *args: Any, **kwargs: Any) -> Output:
            output = super().forward(*args, **kwargs)
            assert output.nll_BT is not None
            poisoned = torch.where(batch.loss_mask_BT.roll(-1, 1), output.nll_BT, torch.nan)
            return Output(None, poisoned, output.latents_BMRE)

    batch = make_batch([1, 2, 1])
    assert probe(Poisoned(), [batch]) == probe(FakeFlamingo(), [batch])


def test_one_sample_and_no_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="batches of at least 2"):
        probe(FakeFlamingo(), [make_batch([1])])
    with pytest.raises(ValueError, match="no batches"):
        probe(FakeFlamingo(), [])


def test_gates_can_be_given_apart_from_the_model() -> None:
    entered = []

    @contextmanager
    def off() -> Iterator[None]:
        entered.append(True)
        yield

    model = FakeFlamingo().eval()
    result = probe(lambda *args, **kwargs: model(*args, **kwargs), [make_batch([1, 1])], gates_off=off)
    assert entered == [True]
    assert result.gates_off == pytest.approx(result.true)
