"""The image-causal mask as properties: which rows may move when a medium changes.

The numbers are those of the traps that public implementations fall into; each test names its own.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flamingo_dist.models.gated_block import GatedBlockConfig, GatedCrossAttentionBlock
from flamingo_dist.models.init import initialize_

M, R, D, E = 4, 3, 12, 8
BLOCKS: dict[bool, GatedCrossAttentionBlock] = {}
indices = st.lists(st.integers(0, M), min_size=1, max_size=10)


def block(attend_all: bool) -> GatedCrossAttentionBlock:
    if attend_all not in BLOCKS:
        config = GatedBlockConfig(
            width=D, media_width=E, heads=2, head_dim=4, ffw_hidden=16, gate_init=0.8, attend_all=attend_all
        )
        BLOCKS[attend_all] = GatedCrossAttentionBlock(config, dtype=torch.float64)
        initialize_(BLOCKS[attend_all], seed=0)
    return BLOCKS[attend_all]


def inputs(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 1, D, dtype=torch.float64, generator=gen)
    return x, torch.randn(1, M, R, E, dtype=torch.float64, generator=gen)


def of_tags(text: str) -> list[int]:
    """The media index of "x<i>y": the tag itself sees its medium, as in all public implementations."""
    count, index = 0, []
    for char in text:
        count += char == "i"
        index.append(count)
    return index


def moved(index: list[int], medium: int, *, attend_all: bool = False, size: float = 1.0) -> list[bool]:
    """Which rows change when `medium` (1..M) changes."""
    x, latents = inputs(len(index))
    other = latents.clone()
    other[:, medium - 1] += size * torch.randn(
        R, E, dtype=torch.float64, generator=torch.Generator().manual_seed(9)
    )
    run = block(attend_all)
    index_BT = torch.tensor([index])
    with torch.no_grad():
        difference = run(x, latents, index_BT) - run(x, other, index_BT)
    return difference.abs().amax(dim=(1, 2)).gt(1e-9).tolist()


@given(index=indices, medium=st.integers(1, M))
@settings(max_examples=40, deadline=None)
def test_a_medium_moves_the_rows_that_see_it_and_no_other(index, medium):
    assert moved(index, medium) == [i == medium for i in index]


@given(index=indices, medium=st.integers(1, M))
@settings(max_examples=40, deadline=None)
def test_with_attend_all_a_medium_moves_the_rows_from_it_on(index, medium):
    """Trap 1: text before the first image attended to all of them, future ones included."""
    assert moved(index, medium, attend_all=True) == [i >= medium for i in index]


@given(index=indices, attend_all=st.booleans())
@settings(max_examples=40, deadline=None)
def test_gradients_stop_where_the_values_do(index, attend_all):
    x, latents = inputs(len(index))
    latents.requires_grad_()
    out = block(attend_all)(x, latents, torch.tensor([index]))
    for row, i in enumerate(index):
        (grad,) = torch.autograd.grad(out[row].sum(), latents, retain_graph=True)
        assert torch.isfinite(grad).all()
        seen = [i >= m if attend_all else i == m for m in range(1, M + 1)]
        assert grad[0].ne(0).any(dim=2).any(dim=1).tolist() == seen


@pytest.mark.parametrize("attend_all", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_an_image_are_the_input_exactly(dtype, attend_all):
    """Traps 1, 3 and 4: a fully masked row as the mean of all values. The gated FFW still runs on it."""
    config = GatedBlockConfig(
        width=D, media_width=E, heads=2, head_dim=4, ffw_hidden=16, gate_init=0.8, attend_all=attend_all
    )
    run = GatedCrossAttentionBlock(config, dtype=dtype)
    initialize_(run, seed=0)
    x, latents = (z.to(dtype) for z in inputs(6))
    index = torch.tensor([[0, 0, 1, 0, 2, 0]])
    with torch.no_grad():
        both = run(x, latents, index)
        nn.init.zeros_(run.gate_ffw)
        attention_alone = run(x, latents, index)
    blind = index[0] == 0
    assert torch.equal(attention_alone[blind], x[blind])
    assert not torch.isclose(attention_alone[~blind], x[~blind]).all(dim=-1).any()
    assert not torch.isclose(both[blind], x[blind]).all(dim=-1).any()


@pytest.mark.parametrize("attend_all", [False, True])
def test_more_tags_than_media_raise(attend_all):
    """Trap 2: surplus rows attended uniformly to everything."""
    x, latents = inputs(2 * (M + 1))
    index = torch.tensor([of_tags("xi" * (M + 1))])
    with pytest.raises(ValueError, match=rf"from 0 to {M + 1}, but this batch has {M} media slots"):
        block(attend_all)(x, latents, index)


def test_of_consecutive_tags_the_last_alone_is_visible():
    """Trap 5: in torchtune and mllama all of the run are visible."""
    index = of_tags("xiiyyiz")
    assert index == [0, 1, 2, 2, 2, 3, 3]
    assert moved(index, 1) == [i == 1 for i in range(7)]
    assert moved(index, 2) == [i in (2, 3, 4) for i in range(7)]


def test_a_continuation_with_a_tag_sees_its_own_medium():
    """Trap 7: with cached media every new token was taken to be after the last image."""
    x, latents = inputs(8)
    index = torch.tensor([of_tags("xiyyiyiy")])
    run = block(False)
    with torch.no_grad():
        whole = run(x, latents, index)
        parts = [run(x[a:b], latents, index[:, a:b]) for a, b in ((0, 3), (3, 8))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)


@given(first=st.integers(0, 2), second=st.integers(0, 2), medium=st.integers(1, M))
@settings(max_examples=20, deadline=None)
def test_packed_documents_are_cut(first, second, medium):
    """Trap 8: text of the next document before its first image must not see this document's last one."""
    following = [first + i if i else 0 for i in of_tags("x" + "iy" * second)]
    index = [*of_tags("x" + "iy" * first), 0, 0, *following]
    assert moved(index, medium) == [i == medium for i in index]


@pytest.mark.parametrize("attend_all", [False, True])
def test_padding_slots_and_padded_text_have_no_influence(attend_all):
    x, latents = inputs(7)
    index = torch.tensor([[0, 1, 1, 2, 2, 0, 0]])
    run = block(attend_all)
    with torch.no_grad():
        want = run(x[:5], latents[:, :2], index[:, :5])
        for padding in (torch.zeros_like(latents[:, 2:]), 1e3 * latents[:, 2:]):
            padded = run(x, torch.cat((latents[:, :2], padding), dim=1), index)
            torch.testing.assert_close(padded[:5], want, rtol=1e-12, atol=1e-12)


def test_samples_of_a_batch_do_not_mix():
    x, latents = inputs(6)
    rows = torch.tensor([[0, 1, 1, 2, 3, 3], [4, 4, 0, 1, 1, 2], [0, 0, 0, 0, 0, 0]])
    run = block(False)
    with torch.no_grad():
        alone = [run(x, latents + b, rows[b : b + 1]) for b in range(3)]
        together = run(x.expand(-1, 3, -1), torch.cat([latents + b for b in range(3)]), rows)
    torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=1e-12, atol=1e-12)
