from dataclasses import replace
from functools import partial

import pytest
import torch

from jobs.bench import layers, networks, others, roofline, xattn
from jobs.bench.cases import expected, make_case
from jobs.bench.checking import poisoned
from jobs.bench.command import NETWORKS
from jobs.bench.compare import check, compare, core_subject
from jobs.bench.contender import Built, Contender, LeftOutError
from jobs.bench.rows import Row
from jobs.bench.shapes import LAYOUTS, AddNormShape, PerceiverShape, Relu2Shape, XattnShape
from jobs.bench.sweep import CORE
from jobs.bench.timing import Clock
from kernels.gated_xattn.reference import naive

CPU = torch.device("cpu")
XATTN = XattnShape(name="t", batch=2, rows=13, images=3, heads=2, head_dim=16, latents=8)
SHAPES = [
    PerceiverShape(name="t", media=2, features=7, heads=2, head_dim=16, latents=8),
    AddNormShape(name="t", rows=5, width=24),
    Relu2Shape(name="t", rows=5, width=24),
]
CLOCK = Clock(CPU, budget_ms=1.0, min_repeats=2, max_repeats=2)


def blank(op: str) -> Row:
    return Row(
        level="core",
        op=op,
        shape="t",
        sizes="",
        contender="",
        ours=False,
        mode="",
        dtype="float32",
        status="left out",
    )


def subject_of(shape, dtype=torch.float32):
    return core_subject(
        make_case(shape, device=CPU, dtype=dtype), blank(shape.op), partial(roofline.cost, shape)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp64_values_are_those_of_the_definition(layout):
    """Row by row and head by head, from `kernels`' naive loop, which shares no line with the benchmark's."""
    case = make_case(replace(XATTN, layout=layout), device=CPU, dtype=torch.float64)
    out = naive(*case.inputs[:3], case.index_BT, case.inputs[3])
    grads = torch.autograd.grad(out, case.inputs, case.upstream, allow_unused=True, materialize_grads=True)
    for got, want in zip(expected(case).values, (out, *grads), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name", [c.name for c in xattn.CONTENDERS if "Flex" not in c.name and "varlen" not in c.name]
)
def test_cross_attention_contenders_agree(name, layout):
    agree(next(c for c in xattn.CONTENDERS if c.name == name), replace(XATTN, layout=layout))


@pytest.mark.parametrize("name", ["B4 Flex 64", "B4 Flex 128, mask built"])
def test_flex_agrees_forward(name):
    agree(next(c for c in xattn.CONTENDERS if c.name == name), replace(XATTN, layout="text_first"))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.op)
def test_other_contenders_agree(shape):
    for contender in CORE[shape.op]:
        agree(contender, shape)


def agree(contender: Contender, shape) -> None:
    subject = subject_of(shape)
    can_run = not contender.ours and not (contender.name.startswith("B6") and shape.layout == "no_image")
    if not can_run:
        with pytest.raises(LeftOutError, match=r"Triton kernels need|no row sees"):
            contender.build(subject.case)
        return
    errors = check(subject, contender.build(subject.case))
    assert max(errors.values()) < 2e-6, errors


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("holes", [False, True])
def test_varlen_segments_lie_over_the_rows_they_serve(layout, holes):
    """The segments are checked here, their kernel runs on a GPU alone."""
    case = make_case(replace(XATTN, layout=layout), device=CPU, dtype=torch.float32)
    lengths, keys = xattn.segments(case, holes=holes)
    index = case.index_BT.flatten().tolist()
    flat = index if holes else [m for m in index if m]
    assert sum(lengths) == len(flat)
    assert sum(keys) == case.attention.batch * case.attention.images * case.attention.latents
    at = first_key = 0
    for length, count in zip(lengths, keys, strict=True):
        medium = first_key // case.attention.latents % case.attention.images + 1
        assert set(flat[at : at + length]) <= ({medium} if count else {0})
        at, first_key = at + length, first_key + count


def planted(change) -> Contender:
    def build(case) -> Built:
        def call(q, k, v, gate):
            return (change(xattn.eager_openflamingo, q, k, v, gate, case.index_BT),)

        return Built(call=call)

    return Contender(name="planted", build=build, ours=True)


FAULTS = {
    "no gate": lambda f, q, k, v, g, i: f(q, k, v, torch.ones_like(g), i)[0] + 0 * g,
    "gate without a gradient": lambda f, q, k, v, g, i: f(q, k, v, g.detach(), i)[0] + 0 * g,
    "the image before": lambda f, q, k, v, g, i: f(q, k.roll(1, 1), v.roll(1, 1), g, i)[0],
    "a row left unwritten": lambda f, q, k, v, g, i: torch.cat(
        [f(q, k, v, g, i)[0][:, :-1], torch.empty_like(q[:, :1])], 1
    ),
    "dv of one image lost": lambda f, q, k, v, g, i: f(q, k, torch.cat([v[:, :1].detach(), v[:, 1:]], 1), g, i)[0],
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_contender_gets_no_speed(fault):
    rows = compare(subject_of(XATTN), [planted(FAULTS[fault])], CLOCK, 1e9, {})
    assert len(rows) == 3
    for row in rows:
        assert row.status == "refused"
        assert row.median_ms is None
        assert row.gb_per_s is None
        assert "wrong:" in row.reason


def test_a_right_contender_gets_one_and_a_red_test_takes_it():
    right = planted(lambda f, *inputs: f(*inputs)[0])
    subject = subject_of(XATTN)
    timed = compare(subject, [right], CLOCK, 1e9, {})
    assert [row.status for row in timed] == ["timed"] * 3
    assert all(row.median_ms > 0 and row.gb_per_s > 0 and row.copy_share > 0 for row in timed)
    assert timed[2].saved_mb > 0
    refused = compare(subject, [right], CLOCK, 1e9, {"gated_xattn": "2 of its tests failed"})
    assert [(row.status, row.median_ms) for row in refused] == [("refused", None)] * 3
    assert "2 of its tests failed" in refused[0].reason


def test_what_breaks_is_a_reason_not_an_end():
    def build(case) -> Built:
        raise RuntimeError("first line\nsecond")

    rows = compare(subject_of(XATTN), [Contender(name="broken", build=build)], CLOCK, 1e9, {})
    assert {(row.status, row.reason) for row in rows} == {("left out", "RuntimeError: first line")}


def test_poison_is_lifted_afterwards():
    with poisoned(CPU, 0):
        assert torch.empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("shape", [replace(XATTN, width=32, media_width=24, layout="text_first"), SHAPES[0]])
def test_layers_agree_and_a_wrong_core_is_refused(shape):
    subject = layers.layer_subject(shape, CPU, torch.float32, blank(shape.op))
    table = layers.XATTN if shape.op == "gated_xattn" else layers.PERCEIVER
    for contender in table:
        if not contender.ours and not contender.compiled and "B5" not in contender.name:
            errors = check(subject, contender.build(subject.case))
            assert max(errors.values()) < 1e-5, (contender.name, errors)
    if shape.op == "gated_xattn":
        wrong = partial(layers._layer_with_core, build=planted(FAULTS["the image before"]).build)
        rows = compare(subject, [Contender(name="planted", build=wrong)], CLOCK, 1e9, {})
        assert {row.status for row in rows} == {"refused"}


def test_networks_are_those_of_the_recipes():
    from jobs.recipes.large import flamingo_3b, flamingo_9b, flamingo_80b
    from jobs.recipes.smoke import smoke

    assert networks.network("smoke") == smoke().model
    for name, recipe in (("3b", flamingo_3b), ("9b", flamingo_9b), ("80b-tp8", flamingo_80b)):
        whole, measured = recipe().model, networks.network(name, recipe().model.lm.num_layers)
        cut = {"80b-tp8": 8}.get(name, 1)
        shares = {
            "lm": ("vocab_size", "num_heads", "num_kv_heads", "ffn_width"),
            "gated": ("heads", "ffw_hidden"),
            "resampler": ("heads",),
        }
        for part, names in shares.items():
            theirs = getattr(whole, part)
            slices = {field: getattr(theirs, field) // cut for field in names}
            assert replace(theirs, **slices) == getattr(measured, part)
        assert measured.cross_every == whole.cross_every
        blocks = whole.lm.num_layers if cut == 1 else whole.cross_every
        assert networks.network(name).lm.num_layers == blocks, "a step is of the whole network where it fits"
    assert set(NETWORKS) == set(networks.NETWORKS) - {"smoke", "smoke-idefics"}


def test_resampler_contenders_start_with_ours():
    assert all(table[0].ours for table in (*CORE.values(), layers.XATTN, layers.PERCEIVER))
    assert not any(contender.ours for contender in others.PERCEIVER[1:])
