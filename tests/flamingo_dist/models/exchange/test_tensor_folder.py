"""Slices of stored tensors are those that tensor parallelism cuts."""

import pytest
import torch

from flamingo_dist.models.exchange.rules import Rule, absent, check_tensors, same, stacked, their_shapes
from flamingo_dist.models.exchange.tensors import read_slice, write_tensors
from flamingo_dist.models.init import ParamTag
from flamingo_dist.models.weights.safetensors import SafetensorsSource


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize(("dim", "stride"), [(None, 1), (0, 1), (0, 2), (1, 1)])
def test_a_rank_reads_its_slice(tmp_path, dim, stride, tp_size):
    whole = torch.randn(16, 8)
    write_tensors(tmp_path, [("w", whole)])
    expected = [whole] * tp_size
    if dim is not None:
        cut = [matrix.chunk(tp_size, dim=dim) for matrix in whole.chunk(stride, dim=dim)]
        expected = [torch.cat([part[r] for part in cut], dim=dim) for r in range(tp_size)]
    tag = ParamTag(partition_dim=dim, stride=stride)
    for rank in range(tp_size):
        found = read_slice(SafetensorsSource(str(tmp_path)), "w", tag, tp_rank=rank, tp_size=tp_size)
        assert torch.equal(found, expected[rank])


def test_rows_that_do_not_divide_leave_the_last_rank_fewer(tmp_path):
    whole = torch.arange(7.0)
    write_tensors(tmp_path, [("w", whole)])
    tag = ParamTag(partition_dim=0)
    parts = [read_slice(SafetensorsSource(str(tmp_path)), "w", tag, tp_rank=r, tp_size=4) for r in range(4)]
    assert [part.tolist() for part in parts] == [[0, 1], [2, 3], [4, 5], [6]]


def test_files_end_at_the_size_that_was_asked_for(tmp_path):
    tensors = [(str(i), torch.full((10,), float(i))) for i in range(5)]
    write_tensors(tmp_path, tensors, shard_bytes=80)
    assert [f.name for f in sorted(tmp_path.glob("*.safetensors"))] == [
        f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    folder = SafetensorsSource(str(tmp_path))
    assert all(torch.equal(folder.read(name), value) for name, value in tensors)


def test_every_tensor_of_both_sides_is_in_a_rule():
    rules = [
        same("a", "x"),
        stacked(("k", "v"), "kv"),
        absent("zero", (3,)),
        Rule(ours=("row",), theirs=("column",), to_theirs=lambda t: [t[0].T]),
    ]
    ours = {
        n: torch.Size(s) for n, s in {"a": [2], "k": [3, 4], "v": [3, 4], "zero": [3], "row": [1, 5]}.items()
    }
    wanted = {"x": torch.Size([2]), "kv": torch.Size([6, 4]), "column": torch.Size([5, 1])}
    assert their_shapes(rules, ours) == wanted
    check_tensors(wanted, wanted, "here")
    with pytest.raises(ValueError, match=r"no correspondence is known for \['new'\]"):
        their_shapes(rules, ours | {"new": torch.Size([1])})
    with pytest.raises(ValueError, match=r"missing \['x'\].*surplus \['y'\].*kv has shape \(5,\) instead of"):
        check_tensors(
            {"y": torch.Size([2]), "kv": torch.Size([5]), "column": wanted["column"]}, wanted, "here"
        )


def test_a_value_that_the_other_layout_cannot_hold_is_an_error():
    rule = absent("frames", (2,))
    assert rule.to_theirs([torch.zeros(2)]) == []
    with pytest.raises(ValueError, match="frames is not zero"):
        rule.to_theirs([torch.ones(2)])
