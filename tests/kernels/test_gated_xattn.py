import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import sdpa
from kernels.dispatch import gated_xattn
from kernels.gated_xattn import reference

H, K, R = 2, 4, 3
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def make(index: list[list[int]], media: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    gen = torch.Generator().manual_seed(seed)
    b, t = len(index), len(index[0])

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype).requires_grad_()

    q, k, v = rand(b, t, H, K), rand(b, media, R, H, K), rand(b, media, R, H, K)
    return q, k, v, torch.tensor(index), torch.tensor(0.7, dtype=dtype, requires_grad=True)


def run(function, q, k, v, index, gate, *, attend_all=False) -> tuple[Tensor, ...]:
    out = function(q, k, v, index, gate, attend_all=attend_all)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(out.dtype)
    # The naive loop leaves out of the graph what no row uses; the reference must not.
    missing = {"allow_unused": True, "materialize_grads": True} if function is reference.naive else {}
    return out.detach(), *torch.autograd.grad((out * weight).sum(), (q, k, v, gate), **missing)


def relative(a: Tensor, b: Tensor) -> float:
    scale = b.double().norm().item()
    return (a.double() - b.double()).norm().item() / (scale or 1.0)


# Equal groups take the grouped path, one long group the dense one, M = 1 the path without a mask.
LAYOUTS = {
    "grouped": ([[0, 1, 1, 2, 2, 3, 3, 3], [1, 1, 0, 0, 2, 2, 3, 0]], 3),
    "long group": ([[0, 2, 2, 2, 2, 2, 2, 3], [2, 2, 2, 2, 2, 2, 2, 2]], 3),
    "one medium": ([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]], 1),
    "no image at all": ([[0, 0, 0]], 2),
    "not in order": ([[3, 0, 1, 2, 1, 0, 3, 2]], 3),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("attend_all", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_reference_equals_naive_with_gradients(layout, attend_all, dtype):
    inputs = make(*LAYOUTS[layout], dtype)
    exact = [
        x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs
    ]
    got = run(gated_xattn, *inputs, attend_all=attend_all)
    want = run(reference.naive, *exact, attend_all=attend_all)
    for name, a, b in zip(("out", "dq", "dk", "dv", "dgate"), got, want, strict=True):
        assert a.dtype == dtype
        assert torch.isfinite(a).all(), name
        assert relative(a, b) < TOLERANCE[dtype], name


@given(
    index=st.lists(st.integers(0, 4), min_size=1, max_size=12),
    attend_all=st.booleans(),
    seed=st.integers(0, 10),
)
@settings(max_examples=40, deadline=None)
def test_any_index_equals_naive(index, attend_all, seed):
    inputs = make([index, index[::-1]], 4, torch.float64, seed)
    got = run(gated_xattn, *inputs, attend_all=attend_all)
    want = run(reference.naive, *inputs, attend_all=attend_all)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert not got[0][inputs[3] == 0].any()
    assert not got[1][inputs[3] == 0].any()


def test_both_paths_agree():
    q, k, v, index, _ = make(*LAYOUTS["grouped"], torch.float64)
    grouped = reference._grouped(q, k, v, index, reference._longest_group(index, 3))
    dense = reference._dense(q, k, v, index, attend_all=False)
    torch.testing.assert_close(grouped, dense, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("attend_all", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_row_is_ever_fully_masked(layout, attend_all, monkeypatch):
    """Backends disagree on such rows, and this one is too kind to them for a value to show it."""
    attention = sdpa.F.scaled_dot_product_attention

    def checked(*args: Tensor, attn_mask: Tensor | None = None, **kwargs: bool) -> Tensor:
        assert attn_mask is None or attn_mask.any(dim=-1).all()
        return attention(*args, attn_mask=attn_mask, **kwargs)

    q, k, v, index, _ = make(*LAYOUTS[layout], torch.float64)
    monkeypatch.setattr(sdpa.F, "scaled_dot_product_attention", checked)
    reference._dense(q, k, v, index, attend_all=attend_all)


def test_gradcheck():
    q, k, v, index, gate = make([[0, 1, 2, 1]], 2, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: gated_xattn(x[0], x[1], x[2], index, x[3]), (q, k, v, gate))


def test_no_gate_multiplies_by_nothing():
    q, k, v, index, _ = make(*LAYOUTS["grouped"], torch.float64)
    one = torch.ones((), dtype=torch.float64)
    assert torch.equal(gated_xattn(q, k, v, index, None), gated_xattn(q, k, v, index, one))


@pytest.mark.parametrize("attend_all", [False, True])
@pytest.mark.parametrize("bad", [3, -1])
def test_media_index_out_of_range_raises(bad, attend_all):
    q, k, v, _, gate = make([[0, 1]], 2, torch.float32)
    with pytest.raises(ValueError, match="2 media slots"):
        gated_xattn(q, k, v, torch.tensor([[0, bad]]), gate, attend_all=attend_all)


@pytest.mark.parametrize("attend_all", [False, True])
@pytest.mark.parametrize("media", [1, 2])
def test_unreadable_index_out_of_range_sees_nothing(media, attend_all):
    q, k, v, _, _ = make([[1, 1]], media, torch.float32)
    index = torch.tensor([[1, media + 1]])
    assert not reference._dense(q, k, v, index, attend_all=attend_all)[0, 1].any()


def test_no_media_slots_at_all():
    out, *grads = run(gated_xattn, *make([[0, 0]], 0, torch.float32))
    assert not out.any()
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("change", ["keys", "width", "index", "gate", "implementation"])
def test_what_does_not_fit_raises(change):
    q, k, v, index, gate = make([[0, 1]], 2, torch.float32)
    options = {}
    if change == "keys":
        k = k[:, :, :, :1]
    elif change == "width":
        q = q[..., :2]
    elif change == "index":
        index = index[:, :1]
    elif change == "gate":
        gate = gate[None]
    else:
        options = {"implementation": "cuda"}
    with pytest.raises(ValueError, match=r"must|pass|choose"):
        gated_xattn(q, k, v, index, gate, **options)


def test_runs_where_values_cannot_be_read():
    q, k, v, index, gate = (x.detach() for x in make(*LAYOUTS["grouped"], torch.float32))
    assert gated_xattn(*(x.to("meta") for x in (q, k, v, index, gate))).shape == q.shape
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v, index, gate)]
        assert gated_xattn(*fakes).shape == q.shape
