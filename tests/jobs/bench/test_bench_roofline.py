import pytest

from jobs.bench.roofline import cost, dense_flops, table
from jobs.bench.shapes import FUSED, LAYOUTS, PERCEIVER, XATTN, XattnShape, sweep

NAMED = {shape.name: shape for shape in XATTN}


@pytest.mark.parametrize(
    ("name", "needed", "dense", "gigabytes", "intensity", "forward", "backward"),
    [
        ("80B train", 34, 172, 1.21, 28, 0.40, 0.72),
        ("80B long", 34, 1100, 1.07, 32, 0.36, 0.63),
        ("9B train", 17, 86, 0.60, 28, 0.20, 0.36),
        ("9B long", 17, 550, 0.54, 32, 0.18, 0.31),
        ("3B long", 8.6, 275, 0.27, 32, 0.09, 0.16),
    ],
)
def test_cross_attention_figures(name, needed, dense, gigabytes, intensity, forward, backward):
    shape = NAMED[name]
    ahead, back = cost(shape, "fwd"), cost(shape, "bwd")
    assert ahead.flops / 1e9 == pytest.approx(needed, rel=0.02)
    assert dense_flops(shape) / 1e9 == pytest.approx(dense, rel=0.01)
    assert ahead.bytes / 1e9 == pytest.approx(gigabytes, abs=0.006)
    assert ahead.intensity == pytest.approx(intensity, abs=0.5)
    assert ahead.floor_ms == pytest.approx(forward, abs=0.006)
    assert back.floor_ms == pytest.approx(backward, abs=0.006)
    assert cost(shape, "fwd+bwd").bytes == ahead.bytes + back.bytes


@pytest.mark.parametrize(
    ("place", "intensity", "forward", "backward"),
    [(0, 46, 0.15, 0.30), (1, 60, 0.12, 0.24), (2, 52, 0.23, 0.46), (3, 63, 0.21, 0.41)],
)
def test_resampler_figures(place, intensity, forward, backward):
    shape = PERCEIVER[place]
    assert cost(shape, "fwd").intensity == pytest.approx(intensity, abs=0.6)
    assert cost(shape, "fwd").floor_ms == pytest.approx(forward, abs=0.006)
    assert cost(shape, "bwd").floor_ms == pytest.approx(backward, abs=0.006)


def test_a_pass_over_the_80b_stream_and_hidden():
    stream, hidden = FUSED[:2]
    assert cost(stream, "fwd").floor_ms / 4 == pytest.approx(0.089, abs=0.001)
    assert cost(hidden, "fwd").floor_ms / 2 == pytest.approx(0.36, abs=0.003)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("rows", "images"), [(256, 5), (256, 32), (40, 3), (8, 8)])
def test_spans_cover_what_their_layout_says(layout, rows, images):
    shape = XattnShape(name="", batch=2, rows=rows, images=images, heads=1, head_dim=16, layout=layout)
    spans = shape.spans()
    assert len(spans) == images
    assert all(start <= end for start, end in spans)
    index = shape.media_index()
    seen = [t for t in range(rows) if index[t]]
    first = {"text_first": rows // 4, "no_image": rows}.get(layout, 0)
    assert seen == list(range(first, rows))
    assert [index[t] for t in seen] == sorted(index[t] for t in seen)
    assert shape.seeing()[0] == 2 * len(seen)
    lengths = [end - start for start, end in spans]
    if layout == "even":
        assert max(lengths) - min(lengths) <= 1
    if layout == "skewed" and rows > 2 * images:
        assert lengths[0] >= rows // 2 - images


def test_the_sweep_begins_with_what_matters_and_repeats_nothing():
    swept = list(sweep())
    assert (swept[0].rows, swept[0].images, swept[0].layout) == (256, 5, "even")
    assert len({shape.name for shape in swept}) == len(swept)
    assert {shape.images for shape in swept} == {1, 2, 5, 8, 16, 32}
    assert {shape.layout for shape in swept} == set(LAYOUTS)
    assert {shape.head_dim for shape in swept} == {64, 128}


def test_the_table_holds_the_figures():
    assert "| 34 / 172 | 1.21 | 28 | 0.40 / 0.72 |" in table()
