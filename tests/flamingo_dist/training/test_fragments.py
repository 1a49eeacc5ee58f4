"""Ranges of flattened slices lie where they should in the whole tensor."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from flamingo_dist.models.init import ParamTag
from flamingo_dist.training.fragments import Fragment, Slice, boxes_of_range


def slices(whole: torch.Tensor, tag: ParamTag, tp_size: int) -> list[torch.Tensor]:
    """Cut as tensor parallelism cuts."""
    dim = tag.partition_dim
    if dim is None:
        return [whole] * tp_size
    parts = [matrix.chunk(tp_size, dim=dim) for matrix in whole.chunk(tag.stride, dim=dim)]
    return [torch.cat([part[rank] for part in parts], dim=dim) for rank in range(tp_size)]


@st.composite
def layouts(draw):
    tp_size, dp_size = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 3, 5]))
    shape = draw(st.lists(st.integers(1, 4), min_size=0, max_size=3))
    dim = draw(st.sampled_from([None, *range(len(shape))]))
    stride = draw(st.sampled_from([1, 2])) if dim is not None else 1
    if dim is not None:
        shape[dim] *= tp_size * stride
    return tuple(shape), ParamTag(partition_dim=dim, stride=stride), tp_size, dp_size


@given(layouts())
def test_the_fragments_of_all_ranks_are_the_tensor_once(layout):
    shape, tag, tp_size, dp_size = layout
    whole = torch.arange(math.prod(shape)).view(shape)
    seen = torch.zeros(shape, dtype=torch.int64)
    for tp_rank, part in enumerate(slices(whole, tag, tp_size)):
        place = Slice(shape=tuple(part.shape), tag=tag, tp_rank=tp_rank, tp_size=tp_size)
        assert place.whole == shape
        size = -(-part.numel() // dp_size)  # as ZeRO cuts a flattened parameter
        for flat in range(0, part.numel(), size):
            fragment = Fragment(part.flatten()[flat : flat + size], flat, place)
            for chunk in fragment.__create_chunk_list__():
                where = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
                assert torch.equal(fragment.view_at(chunk.offsets), whole[where])
                seen[where] += 1
    assert (seen == (tp_size if tag.partition_dim is None else 1)).all()


def test_views_write_into_the_range():
    flat = torch.zeros(5)
    fragment = Fragment(flat, 2, Slice(shape=(3, 3), tag=ParamTag(), tp_rank=0, tp_size=1))
    assert list(boxes_of_range((3, 3), 2, 7)) == [((0, 2), (1, 1)), ((1, 0), (1, 3)), ((2, 0), (1, 1))]
    fragment.view_at((1, 0)).fill_(7)
    assert flat.tolist() == [0, 7, 7, 7, 0]
