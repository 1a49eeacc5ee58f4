"""The gated cross-attention kernels against the fp64 reference: interpreter on a CPU, natively on a GPU."""

import dataclasses

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels.dispatch import gated_xattn
from kernels.gated_xattn import kernel, kernel_short, op
from kernels.gated_xattn.tiles import WIDTHS
from tests.kernels.interpreting import Mutant, assert_mutant_is_caught, in_both_orders, relative
from tests.kernels.xattn_cases import LAYOUTS, Case, check, got

pytestmark = pytest.mark.modes("interpret", "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_and_gradients(layout, dtype, device):
    rows, spans = LAYOUTS[layout]
    check(Case(rows=rows, spans=spans, dtype=dtype, width=32, latents=16, device=device))


@pytest.mark.parametrize("latents", [1, 16, 17, 64, 128])
def test_numbers_of_latents(latents, device):
    check(Case(rows=21, spans=[(1, 18)], heads=1, latents=latents, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", WIDTHS)
def test_head_widths(width, dtype, device):
    check(Case(rows=21, spans=[(1, 18), (18, 20)], heads=1, width=width, dtype=dtype, device=device))


@pytest.mark.parametrize("gate", [None, 0.0, -1.0, 1e-4])
def test_gates(gate, device):
    case = Case(rows=21, spans=[(1, 18), (18, 20)], gate=gate, dtype=torch.float16, device=device)
    check(case)
    if gate == 0.0:
        out, dq, dk, dv, dgate = got(case)
        assert not any(x.any() for x in (out, dq, dk, dv))
        assert dgate != 0


@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize("layout", ["odd lengths", "empty images", "skewed", "long hole"])
def test_shared_spans_equal_whole_ones(layout, chunks, device):
    rows, spans = LAYOUTS[layout]
    case = Case(rows=rows, spans=spans, device=device)
    check(case, chunks)
    for a, b in zip(got(case, chunks)[:2], got(case, 1)[:2], strict=True):
        assert torch.equal(a, b), "out and dq do not depend on who computes them"
    for a, b in zip(got(case, chunks)[2:], got(case, 1)[2:], strict=True):
        assert relative(a, b) < 1e-5


SHORT = [(0, 16), (16, 33), (40, 45), (45, 45), (45, 62), (70, 71), (75, 91)]
"""Images of a tile of 16 rows, and of more; times four for a GPU's tile of 64."""


def short_case(device, width=16, **given) -> Case:
    """Mean of the rows below a tile, so that a kernel of its own computes the images that fit one."""
    if device == "cpu":
        return Case(rows=100, spans=SHORT, heads=1, width=width, device=device, **given)
    spans = [(4 * start, 4 * end) for start, end in SHORT]
    given = {"latents": 64, "dtype": torch.bfloat16, "width": max(width, 64), "heads": 64} | given
    return Case(rows=400, spans=spans, device=device, **given)


@pytest.mark.parametrize("width", [16, 64, 80, 96, 128])
@pytest.mark.parametrize("gate", [None, -0.7])
def test_short_images_beside_long_ones(gate, width, device, monkeypatch):
    ran = []
    launcher = kernel_short.xattn_backward_short
    monkeypatch.setattr(
        kernel_short, "xattn_backward_short", Recording(launcher, lambda grid: ran.append(grid))
    )
    case = short_case(device, width, gate=gate)
    check(case, 1)
    if device == "cpu" or torch.cuda.get_device_capability() == (9, 0):
        assert ran


class Recording:
    """A kernel that tells the grids it is launched with."""

    def __init__(self, launcher, tell) -> None:
        self.launcher, self.tell = launcher, tell

    def __getitem__(self, grid):
        self.tell(grid)
        return self.launcher[grid]


@st.composite
def any_spans(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    cuts = sorted(draw(st.lists(st.integers(0, 40), min_size=2, max_size=8)))
    return cuts[-1] + draw(st.integers(0, 20)) or 1, list(zip(cuts[::2], cuts[1::2], strict=False))


@given(layout=any_spans(), chunks=st.integers(1, 3), seed=st.integers(0, 5))
@example(
    layout=(43, [(9, 9), (11, 14), (24, 40)]), chunks=1, seed=3
)  # the gate's gradient cancels to a hundredth
@settings(max_examples=12, deadline=None)
def test_any_spans(device, layout, chunks, seed):
    rows, spans = layout
    check(Case(rows=rows, spans=spans, heads=1, seed=seed, device=device), chunks)


@given(
    rows=st.lists(st.lists(st.integers(0, 4), min_size=7, max_size=7).map(sorted), min_size=1, max_size=2),
    data=st.data(),
)
@settings(max_examples=20, deadline=None)
def test_spans_of_any_media_index(device, rows, data):
    index = torch.tensor(rows, dtype=torch.int32)
    for row in index:  # holes: text of the next document before its first image
        for t in data.draw(st.sets(st.integers(0, 6), max_size=2)):
            if t in (0, 6) or row[t] != row[t - 1] or row[t] != row[t + 1]:
                row[t] = 0
    spans = op.media_spans(index.to(device), 4).tolist()
    flat = [bound for span in spans for bound in span]
    assert flat == sorted(flat)
    assert 0 <= flat[0] <= flat[-1] <= index.numel()
    for number, (start, end) in enumerate(spans):
        sample, medium = divmod(number, 4)
        seeing = (index[sample] == medium + 1).nonzero().flatten() + 7 * sample
        assert list(range(start, end)) == seeing.tolist()


def test_long_media_index_is_read_in_blocks(device):
    index = torch.zeros(2, 2500, dtype=torch.int64, device=device)
    index[0, 1020:1030], index[0, 2400:], index[1, 5:2050] = 1, 3, 2
    spans = op.media_spans(index.T.contiguous().T, 3).tolist()
    assert spans == [[1020, 1030], [1030, 1030], [2400, 2500], [2500, 2500], [2505, 4550], [4550, 4550]]


BATCH = torch.tensor([[0, 1, 1, 0, 3, 3, 3], [2, 2, 2, 2, 2, 0, 0]])


def batch(device: str, *, sequence_first: bool = False) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(0)
    shapes = [(2, 7, 2, 16), (2, 3, 5, 2, 16), (2, 3, 5, 2, 16)]
    made = [torch.randn(*shape, generator=gen).to(device) for shape in shapes]
    if sequence_first:
        made[0] = made[0].transpose(0, 1).contiguous().transpose(0, 1)
    made.append(torch.tensor(0.6, device=device))
    return [x.requires_grad_() for x in made]


def outcome(implementation, inputs, index):
    q, k, v, gate = inputs
    out = gated_xattn(q, k, v, index, gate, implementation=implementation)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
    return out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)


@pytest.mark.parametrize("sequence_first", [False, True])
def test_dispatch_gives_the_same_either_way(sequence_first, device):
    inputs, index = batch(device, sequence_first=sequence_first), BATCH.to(device)
    got = in_both_orders(lambda: outcome("triton", inputs, index))
    for a, b in zip(got, outcome("reference", inputs, index), strict=True):
        assert relative(a, b) < 1e-5
        assert a.dtype == b.dtype
    if sequence_first:
        assert got[0].stride() == got[1].stride() == inputs[0].stride(), "the caller's layout is kept"


def test_padding_media_have_no_influence(device):
    inputs, index = batch(device), BATCH.to(device)
    before = outcome("triton", inputs, index)
    with torch.no_grad():
        for x in inputs[1:3]:
            x[0, 1], x[1, 0], x[1, 2] = 1e4, float("inf"), float("nan")
    for a, b in zip(before, outcome("triton", inputs, index), strict=True):
        assert torch.equal(a, b)


def test_awkward_strides(device):
    """Expanded and last-axis-strided inputs are read right, whatever copy that needs."""
    q, k, v, spans, gate, _ = Case(rows=20, spans=[(2, 19)], device=device).inputs()
    plain = op.forward(q[None], k, v, spans, gate), *op.backward(q[None], q[None], k, v, spans, gate)
    strange = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q[None], k, v)]
    assert [x.stride(-1) != 1 for x in strange] == [True] * 3
    for a, b in zip(
        plain, (op.forward(*strange, spans, gate), *op.backward(q[None], *strange, spans, gate)), strict=True
    ):
        assert torch.equal(a, b)
    ones = torch.ones((), device=device).expand(1, *q.shape)
    for a, b in zip(
        op.backward(ones, q[None], k, v, spans, gate),
        op.backward(ones.contiguous(), q[None], k, v, spans, gate),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", ["no media", "no rows", "no samples"])
def test_empty_batches(shape, device):
    b, t, m = {"no media": (2, 3, 0), "no rows": (2, 0, 2), "no samples": (0, 3, 2)}[shape]
    shapes = [(b, t, 2, 16), (b, m, 5, 2, 16), (b, m, 5, 2, 16), ()]
    inputs = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]
    index = torch.zeros(b, t, dtype=torch.int32, device=device)
    out, *grads = in_both_orders(lambda: outcome("triton", inputs, index))
    assert out.shape == (b, t, 2, 16)
    assert not any(x.any() for x in (out, *grads))
    assert [g.shape for g in grads] == [x.shape for x in inputs]


def test_varlen_is_differentiable(device):
    case = Case(rows=30, spans=[(1, 12), (15, 30)], device=device)
    q, k, v, spans, gate, do = case.inputs()
    leaves = [x.detach().requires_grad_() for x in (q, k, v, gate)]
    out = op.gated_xattn_varlen(*leaves[:3], spans, leaves[3])
    for a, b in zip((out, *torch.autograd.grad(out, leaves, do)), got(case), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("change", ["backwards", "beyond", "dtype", "keys", "mixed", "gate", "queries"])
def test_what_does_not_fit_raises(change, device):
    q, k, v, spans, gate, _ = Case(rows=20, spans=[(2, 9), (9, 19)], device=device).inputs()
    if device == "cuda" and change in ("backwards", "beyond"):
        pytest.skip("values on an accelerator are not read")
    if change == "backwards":
        spans = spans.flip(0)
    elif change == "beyond":
        spans = spans + 5
    elif change == "dtype":
        spans = spans.float()
    elif change == "keys":
        k = k[:, :2]
    elif change == "mixed":
        k = k.half()
    elif change == "gate":
        gate = gate[None]
    else:
        q = q[None]
    with pytest.raises(ValueError, match="must"):
        op.gated_xattn_varlen(q, k, v, spans, gate)


def test_rows_out_of_order_raise(device):
    if device == "cuda":
        pytest.skip("values on an accelerator are not read")
    inputs = batch(device)
    with pytest.raises(ValueError, match="reference"):
        outcome("triton", inputs, BATCH.flip(1))
    with pytest.raises(ValueError, match="3 media slots"):
        outcome("triton", inputs, BATCH + 2)
    q, k, v, _, gate, _ = Case(rows=20, spans=[(2, 9)], device=device).inputs()
    with pytest.raises(ValueError, match="border"):
        op.check(q.view(2, 10, 2, 16), k, v, torch.tensor([[5, 15]]), gate)


MUTANTS = [
    Mutant("padding latents are seen", "[None, :] < R, s", "[None, :] < BLOCK_R, s"),
    Mutant("no gate in the output", "factor = (g / total)[:, None]", "factor = (1.0 / total)[:, None]"),
    Mutant("no gate in dq and dk", "g_scale = scale * gate_of(gate, HAS_GATE)", "g_scale = scale"),
    Mutant("no gate in dv", "dv1 * g,", "dv1,"),
    Mutant("no scale in the scores", "s *= qk_scale", "s *= 1.4426950408889634"),
    Mutant("delta left out", "(p * (dp - delta[:, None]))", "(p * dp)"),
    Mutant(
        "tail rows of a span dropped",
        "return lo, tl.minimum(lo + rows, end)",
        "return lo, tl.minimum(lo + rows, end // BLOCK_M * BLOCK_M)",
    ),
    Mutant(
        "rows of the next span are written",
        "store_tile(dq_rows + t * dq_t, row, inside, dq_t, 0, dq1",
        "store_tile(dq_rows + t * dq_t, row, row < B * T - first, dq_t, 0, dq1",
    ),
    Mutant("all images write one dk", "tl.cast(image, tl.int64) * dk_i", "tl.cast(0, tl.int64) * dk_i"),
    Mutant("chunks write one part", "wide = tl.cast(chunk, tl.int64)", "wide = tl.cast(0, tl.int64)"),
    Mutant("chunks are not summed", "for chunk in range(CHUNKS):", "for chunk in range(1):"),
    Mutant(
        "holes left unwritten",
        "_zero_rows(x, before, tl.load(spans + image * 2)",
        "_zero_rows(x, before, before",
    ),
    Mutant("rows after the last span left unwritten", "image == IMAGES - 1:", "image == IMAGES:"),
    Mutant("gate gradient of the last tile alone", "g_rows += delta", "g_rows = delta"),
]


SHORT_MUTANTS = [
    Mutant("no gate in dq and dk of a short image", "g_scale = g * scale", "g_scale = scale"),
    Mutant("no gate in dv of a short image", "p_T, do1, g, lat", "p_T, do1, 1.0, lat"),
    Mutant("delta left out of a short image", "(p * (dp - delta[:, None]))", "(p * dp)"),
    Mutant(
        "a short image's last row dropped", "inside = row < end - start", "inside = row < end - start - 1"
    ),
    Mutant("rows beyond a short image", "inside = row < end - start", "inside = row < B * T - start"),
    Mutant("a full tile is nobody's", "(end - start <= BLOCK_M)", "(end - start < BLOCK_M)"),
    Mutant("all short images write one dv", "dv += tl.cast(image, tl.int64)", "dv += tl.cast(0, tl.int64)"),
    Mutant(
        "holes before short images left unwritten", "spans, image, IMAGES, B", "spans, image * 0, IMAGES, B"
    ),
]


def short_ones() -> None:
    """The check that every mutant of the kernel of short images has to fail."""
    check(dataclasses.replace(short_case("cpu"), latents=3), 1)


def everything() -> None:
    """The check that every mutant has to fail: holes, odd lengths, several tiles, chunks."""
    case = Case(rows=60, spans=[(3, 3), (5, 42), (42, 51)], heads=1, latents=3)
    check(case, 1)
    check(dataclasses.replace(case, seed=1), 2)


@pytest.mark.modes("interpret")
def test_the_mutants_check_passes_without_a_mutant():
    everything()


@pytest.mark.modes("interpret")  # planted faults may write anywhere
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught(mutant, monkeypatch, tmp_path):
    assert_mutant_is_caught(mutant, op, "kernel", everything, monkeypatch, tmp_path)


@pytest.mark.modes("interpret")
def test_the_short_mutants_check_passes_without_a_mutant():
    short_ones()


@pytest.mark.modes("interpret")
@pytest.mark.parametrize("mutant", SHORT_MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_of_short_images_is_caught(mutant, monkeypatch, tmp_path):
    assert_mutant_is_caught(mutant, op, "kernel_short", short_ones, monkeypatch, tmp_path)


def test_a_mutant_that_does_not_fit_is_an_error(monkeypatch, tmp_path):
    with pytest.raises(AssertionError, match="bring it up to date"):
        assert_mutant_is_caught(
            Mutant("x", "no such text", ""), op, "kernel", everything, monkeypatch, tmp_path
        )
    assert op.kernel is kernel
