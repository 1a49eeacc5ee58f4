"""Which implementation runs where; without Triton's interpreter."""

import pytest
import torch

from kernels import dispatch
from kernels.config import have_triton
from kernels.dispatch import gated_xattn, launches

CPU, META = torch.empty(1), torch.empty(1, device="meta")


class OnCuda:
    """As much of a CUDA tensor as the choice looks at."""

    device = torch.device("cuda")


def inputs(width: int = 16) -> tuple[torch.Tensor, ...]:
    q, k = torch.randn(1, 4, 2, width), torch.randn(1, 2, 3, 2, width)
    return q, k, k, torch.tensor([[0, 1, 1, 2]]), torch.tensor(0.5)


def test_auto_is_the_reference_on_a_cpu():
    torch.manual_seed(0)
    a = gated_xattn(*inputs())
    torch.manual_seed(0)
    assert torch.equal(a, gated_xattn(*inputs(), implementation="reference"))


def test_auto_takes_triton_on_cuda_where_the_kernel_can(monkeypatch):
    monkeypatch.setattr(dispatch, "can_launch", lambda tensor: True)
    assert launches("auto", "f", OnCuda(), None)
    assert not launches("auto", "f", OnCuda(), "too wide")
    assert not launches("auto", "f", CPU, None), "not even under the interpreter"
    assert not launches("reference", "f", OnCuda(), None)
    monkeypatch.setattr(dispatch, "can_launch", lambda tensor: False)
    assert not launches("auto", "f", OnCuda(), None), "without Triton"


@pytest.mark.parametrize("width", [16, 24])
def test_triton_on_a_plain_cpu_says_what_it_needs(width):
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1" if have_triton else "not installed"):
        gated_xattn(*inputs(width), implementation="triton")


@pytest.mark.skipif(not have_triton, reason="triton is not installed (it exists for Linux alone)")
def test_triton_refuses_what_the_kernel_cannot_take(monkeypatch):
    monkeypatch.setattr(dispatch, "can_launch", lambda tensor: True)
    changes = {"width": "head width 24", "dtype": "float64", "latents": "129 latents", "mixed": "share dtype"}
    for change, reason in changes.items():
        q, k, v, index, gate = inputs(24 if change == "width" else 16)
        if change == "dtype":
            q, k, v, gate = (x.double() for x in (q, k, v, gate))
        if change == "mixed":
            k = k.double()
        if change == "latents":
            k = v = torch.randn(1, 2, 129, 2, 16)
        with pytest.raises(ValueError, match=f"{reason}.*'auto'"):
            gated_xattn(q, k, v, index, gate, implementation="triton")


def test_attend_all_stays_on_the_reference():
    q, k, v, index, gate = inputs()
    got = gated_xattn(q, k, v, index, gate, attend_all=True, implementation="triton")
    assert torch.equal(got, gated_xattn(q, k, v, index, gate, attend_all=True))


@pytest.mark.skipif(not have_triton, reason="triton is not installed (it exists for Linux alone)")
def test_shapes_alone_suffice_for_triton():
    meta = [x.to("meta") for x in inputs()]
    assert gated_xattn(*meta, implementation="triton").shape == (1, 4, 2, 16)


def test_unknown_implementation_is_refused_even_where_it_changes_nothing():
    for attend_all in (False, True):
        with pytest.raises(ValueError, match="auto, reference, triton"):
            gated_xattn(*inputs(), attend_all=attend_all, implementation="cuda")


def test_shapes_that_are_none_of_attention_are_told():
    q, k, v, index, gate = inputs()
    for implementation in ("auto", "reference"):
        with pytest.raises(ValueError, match=r"queries are \(4, 2, 16\); they must be \[B, T, H, K\]"):
            gated_xattn(q[0], k, v, index, gate, implementation=implementation)
        with pytest.raises(ValueError, match="media_index_BT is torch.float32; it must be an integer"):
            gated_xattn(q, k, v, index.float(), gate, implementation=implementation)
        with pytest.raises(ValueError, match=r"must be \[N, R, H, K\]"):
            dispatch.perceiver_attn(q[0], q, q, q, q, implementation=implementation)


@pytest.mark.skipif(not have_triton, reason="triton is not installed (it exists for Linux alone)")
def test_the_varlen_function_says_what_it_needs():
    from kernels.gated_xattn.op import gated_xattn_varlen

    q, k = torch.randn(6, 1, 16), torch.randn(1, 4, 1, 16)
    with pytest.raises(ValueError, match="cannot run on cpu; it needs CUDA"):
        gated_xattn_varlen(q, k, k, torch.tensor([[0, 6]]), None)
