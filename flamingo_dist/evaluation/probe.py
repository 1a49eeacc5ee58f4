"""Grounding probe: whether the loss needs the images.

A falling loss alone does not show that the network looks: it also falls while the adapter learns the form of
the texts. The probe runs the same held-out tokens four times: with their own media, with another sample's
media, with blank media, and with the gates off (the bare language model). `shuffled - true` is what the right
image is worth.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import Tensor

from flamingo_dist.inference.calls import Forward, ReduceSum, alone, evaluating, next_token_targets
from flamingo_dist.models.vocabulary import IGNORE


class ProbeBatch(Protocol):
    """Held-out samples of one data set, as torch tensors on the model's device; a training batch fits."""

    @property
    def tokens_BT(self) -> Tensor:  # noqa: N802
        """int64 [B, T]."""

    @property
    def loss_mask_BT(self) -> Tensor:  # noqa: N802
        """Bool [B, T], True where the token carries loss as a target."""

    @property
    def media_index_BT(self) -> Tensor:  # noqa: N802
        """int32 [B, T], phi."""

    @property
    def media(self) -> Tensor:
        """Pixels uint8 [B, M, F, 3, H, W] or features float16 [B, M, F, S, C]."""

    @property
    def media_mask_BM(self) -> Tensor:  # noqa: N802
        """Bool [B, M]."""


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """Mean negative log-likelihood in nats a loss token, over all ranks."""

    true: float
    """With the sample's own media."""
    shuffled: float
    """With the media of other samples of the batch."""
    blank: float
    """With media of zeros: black images, or zero features."""
    gates_off: float
    """Without cross-attention layers: the bare language model."""
    tokens: int
    """Loss tokens behind each mean."""

    @property
    def grounding_gap_nats(self) -> float:
        """What the right image is worth: shuffled - true."""
        return self.shuffled - self.true

    def as_dict(self) -> dict[str, float]:
        """Return the fields as metrics.jsonl holds them."""
        return asdict(self)


def probe(
    model: Forward,
    batches: Iterable[ProbeBatch],
    *,
    reduce_sum: ReduceSum = alone,
    gates_off: Callable[[], AbstractContextManager[object]] | None = None,
) -> ProbeResult:
    """Run the probe on the held-out batches of one data set.

    Every batch costs two calls with media and two with latents, whatever it holds; ranks stay in step when
    each brings the same number of batches. Sums run over tokens, so a batch weighs what it holds.

    Args:
        model: `Flamingo.forward`: the module or the engine around it.
        batches: Held-out batches, at least two samples each.
        reduce_sum: Sum over the data-parallel ranks of a float64 tensor [5] on the model's device.
        gates_off: Context manager that switches the gates off; `model.gates_off` by default.

    Returns:
        The four mean losses.

    Raises:
        ValueError: A batch of one sample, or no loss token on any rank.
    """
    off = gates_off if gates_off is not None else model.gates_off  # type: ignore[attr-defined]
    total: Tensor | None = None
    with evaluating(model):
        for batch in batches:
            sums = _probe_batch(model, batch, off)
            total = sums if total is None else total + sums
    if total is None:
        raise ValueError("probe() got no batches: hold out at least one batch of two samples for each rank")
    *sums_of_nll, tokens = reduce_sum(total).tolist()
    if tokens == 0:
        raise ValueError(
            "probe() met no token that carries loss and has another sample's media to compare with"
        )
    true, shuffled, blank, bare = (value / tokens for value in sums_of_nll)
    return ProbeResult(true=true, shuffled=shuffled, blank=blank, gates_off=bare, tokens=round(tokens))


def other_media(media_mask_BM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Choose for every medium one of another sample of the batch.

    Each sample takes its media from the next sample that has any (a roll over the batch). Where that one has
    fewer, its media repeat: an image left blank would make the "shuffled" loss partly a "blank" one.

    Args:
        media_mask_BM: bool [B, M], which slots hold a real medium.

    Returns:
        donor_B int64 [B], the sample that gives (never the sample itself, unless no other has media),
        slot_BM int64 [B, M], its slot for each slot, and found_B bool [B], whether there is such a donor.

    Raises:
        ValueError: B is 1.
    """
    samples, slots = media_mask_BM.shape
    if samples < 2:
        raise ValueError(
            f"the grounding probe got a batch of {samples} sample: shuffling needs another sample's media, "
            "give batches of at least 2"
        )
    mask = media_mask_BM.tolist()
    real = [[slot for slot in range(slots) if mask[sample][slot]] for sample in range(samples)]
    donors, chosen, found = [], [], []
    for sample in range(samples):
        others = [(sample + step) % samples for step in range(1, samples)]
        donor = next((other for other in others if real[other]), sample)
        donors.append(donor)
        found.append(donor != sample)
        # Counted over the sample's own real media, so that its k-th medium gets the donor's k-th.
        ranks = [max(sum(mask[sample][: slot + 1]) - 1, 0) for slot in range(slots)]
        chosen.append(
            [real[donor][rank % len(real[donor])] if real[donor] else slot for slot, rank in enumerate(ranks)]
        )
    device = media_mask_BM.device
    return (
        torch.tensor(donors, device=device),
        torch.tensor(chosen, device=device),
        torch.tensor(found, device=device),
    )


def _probe_batch(
    model: Forward, batch: ProbeBatch, gates_off: Callable[[], AbstractContextManager[object]]
) -> Tensor:
    """Sum the negative log-likelihood of one batch in the four ways.

    Returns:
        float64 [5]: true, shuffled, blank, gates off, number of tokens.
    """
    donor_B, slot_BM, found_B = other_media(batch.media_mask_BM)
    # A sample that no other can lend media to (the rest of its batch was emptied) counts in none of the four
    # sums.
    head = (batch.tokens_BT, batch.media_index_BT)
    targets_BT = next_token_targets(batch.tokens_BT, batch.loss_mask_BT & found_B[:, None])
    counted_BT = targets_BT != IGNORE

    def total(nll_BT: Tensor) -> Tensor:
        # torch.where: a masked position may hold anything, NaN included.
        return torch.where(counted_BT, nll_BT.double(), 0.0).sum()

    true = model(*head, batch.media, batch.media_mask_BM, targets_BT=targets_BT)
    # Media are resampled one by one, so exchanging latents is exchanging media, without a second run of the
    # encoder.
    latents_BMRE = true.latents_BMRE[donor_B[:, None], slot_BM]
    shuffled = model(*head, None, batch.media_mask_BM, latents_BMRE=latents_BMRE, targets_BT=targets_BT)
    blank = model(*head, torch.zeros_like(batch.media), batch.media_mask_BM, targets_BT=targets_BT)
    with gates_off():
        bare = model(*head, None, batch.media_mask_BM, latents_BMRE=true.latents_BMRE, targets_BT=targets_BT)
    return torch.stack(
        [*(total(output.nll_BT) for output in (true, shuffled, blank, bare)), counted_BT.double().sum()]
    )
