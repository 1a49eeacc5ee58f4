import base64
import io
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jobs.report import read_run, record_environment, summarise, write_report, write_summary
from jobs.report.charts import MOST_POINTS, bins, smooth, thin
from jobs.report.pictures import embed

BLOCKS = 6


def step(number: int, loss: float, **changes: Any) -> dict[str, Any]:
    record = {
        "kind": "step",
        "step": number,
        "time": 1000.0 + 2 * number,
        "loss": {"pairs": loss, "docs": loss + 1},
        "tokens": {"pairs": 310, "docs": 700},
        "grad_norm": 0.5 + 1 / (number + 1),
        "lr": 1e-4 * min(1, (number + 1) / 20),
        "gates": {
            "attn": [0.002 * number * (block + 1) / BLOCKS for block in range(BLOCKS)],
            "ffw": [-0.001 * number * (block + 1) / BLOCKS for block in range(BLOCKS)],
        },
        "seconds": {"data": 0.1, "step": 2.0, "forward_backward": 1.5, "optimizer": 0.2, "checkpoint": 0.1},
        "tokens_per_second": 500.0,
        "skipped": 0,
        "bad_samples": 0,
    }
    return {**record, **changes}


def probe(number: int) -> dict[str, Any]:
    true = 5 - number / 50
    losses = {"true": true, "shuffled": true + number / 100, "blank": true + number / 90, "gates_off": 6.1}
    ranks = {
        "top1": number / 400,
        "top5": number / 200,
        "chance_top1": 0.05,
        "chance_top5": 0.25,
        "count": 64,
    }
    return {
        "kind": "probe",
        "step": number,
        "data": {"pairs": {**losses, "tokens": 1234}, "docs": {**losses, "tokens": 99}},
        "candidates": {"pairs": ranks},
    }


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 24), (shade, 120, 200)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw = random.Random(0)
    records = [probe(0)]
    for number in range(100):
        records.append(step(number, 6 * math.exp(-number / 40) + draw.random()))
        if number % 20 == 19:
            records.append(probe(number + 1))
    write_lines(tmp_path / "metrics.jsonl", records)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png(10))
    samples = [
        {
            "dataset": "pairs",
            "key": "a",
            "image": "images/a.png",
            "caption": "a <cat>",
            "generated": "a dog",
            "shots": 0,
        },
        {
            "dataset": "pairs",
            "key": "b",
            "image": base64.b64encode(png(90)).decode(),
            "caption": "b",
            "generated": "c",
        },
    ]
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    (tmp_path / "config.json").write_text(
        json.dumps({"steps": 100, "note": "</pre><script>alert(1)</script>"})
    )
    (tmp_path / "phases.json").write_text(json.dumps({"setup": 3.0, "train": 200.0}))
    skips = [
        {"key": str(k), "shard": "s.tar", "cause": "corrupt image", "dataset": "pairs"} for k in range(3)
    ]
    write_lines(tmp_path / "quarantine.jsonl", skips)
    record_environment(tmp_path, recipe="demo")
    return tmp_path


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def summary_of(path: Path) -> dict[str, Any]:
    return json.loads(write_summary(path).read_text())


class Page(HTMLParser):
    """Tags, addresses and headings of a page; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_summary(folder: Path) -> None:
    summary = summary_of(folder)
    assert summary["steps"] == 100
    assert summary["recipe"] == "demo"
    assert summary["grounding_gap_nats"] == pytest.approx({"pairs": 1.0, "docs": 1.0})
    assert summary["held_out_loss"]["pairs"] == pytest.approx(
        {"true": 3.0, "shuffled": 4.0, "blank": 3 + 100 / 90, "gates_off": 6.1}
    )
    assert summary["candidates"]["pairs"]["top1"] == 0.25
    assert summary["step_0_minus_bare_lm_nats"] == pytest.approx({"pairs": -1.1, "docs": -1.1})
    assert summary["data_wait_share"] == pytest.approx(0.05)
    assert summary["checkpoint_stall_share"] == pytest.approx(0.05)
    assert summary["tokens_per_second"] == pytest.approx(500)
    assert summary["seconds"] == {"setup": 3.0, "train": 200.0}
    assert (summary["skipped_steps"], summary["bad_samples"]) == (0, 3)
    assert summary["final_loss"] == read_run(folder).steps[-1]["loss"]
    assert set(summary["versions"]) == {
        "python", "torch", "deepspeed", "megatron-core", "ray", "transformers", "webdataset"
    }  # fmt: skip


def test_report_is_one_self_contained_page(folder: Path) -> None:
    text = write_report(folder).read_text()
    page = Page(text)
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert page.tags.count("svg") == 6
    assert page.tags.count("img") == 2
    assert "script" not in page.tags, "what the run holds is escaped"
    for heading in (
        "Loss",
        "Grounding",
        "Candidate names",
        "Gates",
        "Optimizer",
        "Speed",
        "Held-out samples",
    ):
        assert f"<h2>{heading}</h2>" in text
    for shown in ("a <cat>", "corrupt image", "Resolved configuration", "+1.000", "demo", "torch"):
        assert shown in page.text
    ids = re.findall(r'<clipPath id="([^"]+)"', text)
    assert len(ids) == len(set(ids)), "pictures must not share ids"


def test_pictures_follow_light_and_dark(folder: Path) -> None:
    text = write_report(folder).read_text()
    assert "prefers-color-scheme: dark" in text
    assert "currentColor" in text
    assert "#0a0b0c" not in text


def test_an_empty_run_gives_nothing_and_invents_nothing(tmp_path: Path) -> None:
    summary = summary_of(tmp_path)
    assert summary["steps"] == 0
    told = {key for key, value in summary.items() if value is not None}
    assert told == {"steps", "skipped_steps", "bad_samples", "unreadable_lines"}
    assert Page(write_report(tmp_path).read_text()).tags.count("svg") == 0


@pytest.mark.parametrize("count", [1, 2, 3])
def test_short_runs_without_probe(tmp_path: Path, count: int) -> None:
    write_lines(tmp_path / "metrics.jsonl", [step(number, 3.0) for number in range(count)])
    summary = summary_of(tmp_path)
    assert summary["grounding_gap_nats"] is None
    assert (summary["data_wait_share"] is None) == (count == 1), "the first step does not count"
    assert "Grounding" not in write_report(tmp_path).read_text()


def test_of_a_repeated_step_the_last_counts(tmp_path: Path) -> None:
    first = [step(number, 9.0, bad_samples=1) for number in range(6)]
    resumed = [step(number, 2.0, skipped=1) for number in range(4, 8)]
    records = [*first[:5], probe(5), first[5], resumed[0], probe(5), *resumed[1:]]
    write_lines(tmp_path / "metrics.jsonl", records)
    run = read_run(tmp_path)
    assert [record["step"] for record in run.steps] == list(range(8))
    assert [record["loss"]["pairs"] for record in run.steps] == [9.0] * 4 + [2.0] * 4
    assert len(run.probes) == 1
    summary = summarise(run)
    assert (summary["bad_samples"], summary["skipped_steps"]) == (4, 4)


def test_a_branch_that_was_left_behind_does_not_count(tmp_path: Path) -> None:
    """A resume from step 4 after step 9, and an end before the old branch's."""
    first = [
        probe(0),
        *(step(n, 9.0) for n in range(4)),
        probe(4),
        *(step(n, 9.0) for n in range(4, 9)),
        probe(9),
    ]
    gone_back = [step(4, 2.0), step(5, 2.0)]
    write_lines(tmp_path / "metrics.jsonl", [*first, *gone_back])
    run = read_run(tmp_path)
    assert [(r["step"], r["loss"]["pairs"]) for r in run.steps] == [
        *((n, 9.0) for n in range(4)),
        (4, 2.0),
        (5, 2.0),
    ]
    assert [record["step"] for record in run.probes] == [0, 4], (
        "the probe at 4 is of the weights that went on"
    )
    summary = summarise(run)
    assert (summary["steps"], summary["last_step"]) == (6, 5)
    # Gone back to step 4 to end there: nothing but a probe is written. Then from the beginning.
    write_lines(tmp_path / "metrics.jsonl", [*first, *gone_back, probe(4)])
    run = read_run(tmp_path)
    assert ([r["step"] for r in run.steps], [r["step"] for r in run.probes]) == ([0, 1, 2, 3], [0, 4])
    write_lines(tmp_path / "metrics.jsonl", [*first, probe(0), step(0, 1.0)])
    run = read_run(tmp_path)
    assert (len(run.steps), len(run.probes)) == (1, 1)


def test_data_sets_may_take_turns(tmp_path: Path) -> None:
    """With round-robin mixing a step has the loss of one data set."""
    records = [
        {**step(number, 0.0), "loss": {("pairs", "docs")[number % 2]: float(number)}} for number in range(41)
    ]
    write_lines(tmp_path / "metrics.jsonl", records)
    summary = summary_of(tmp_path)
    assert summary["final_loss"] == {"pairs": 40.0, "docs": 39.0}
    assert summary["final_loss_mean"] == {"pairs": 31.0, "docs": 30.0}
    assert Page(write_report(tmp_path).read_text()).tags.count("svg") == 4


def test_first_step_is_left_out_of_times(tmp_path: Path) -> None:
    slow = {"data": 50.0, "step": 100.0}
    records = [step(0, 3.0, seconds=slow, tokens_per_second=1.0)]
    records += [step(1, 3.0, seconds={"data": 1.0, "step": 2.0}, tokens_per_second=300.0)]
    records += [step(2, 3.0, seconds={"data": 0.0, "step": 8.0}, tokens_per_second=100.0)]
    write_lines(tmp_path / "metrics.jsonl", records)
    summary = summary_of(tmp_path)
    assert summary["data_wait_share"] == pytest.approx(0.1)
    assert summary["tokens_per_second"] == pytest.approx((300 * 2 + 100 * 8) / 10)
    assert summary["checkpoint_stall_share"] is None


def test_mfu_is_told_with_its_peak(tmp_path: Path) -> None:
    peak = {"kind": "peak", "tflops": 0.4, "source": "measured"}
    seconds = {"data": 0.0, "step": 2.0}
    steps = [step(n, 3.0, seconds=seconds, useful_mfu=0.2 + 0.1 * n, hfu=0.3 + 0.1 * n) for n in range(3)]
    write_lines(tmp_path / "metrics.jsonl", [peak, *steps])
    summary = summary_of(tmp_path)
    assert summary["useful_mfu"] == pytest.approx(0.35)
    assert summary["hfu"] == pytest.approx(0.45)
    assert (summary["peak_tflops"], summary["peak_source"]) == (0.4, "measured")
    page = Page(write_report(tmp_path).read_text())
    assert "useful MFU (of 0.4 TFLOP/s, measured)" in page.text
    assert "share of the peak" in page.text


def test_a_torn_line_and_nan_are_survived(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [step(number, 3.0) for number in range(3)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st\n' + json.dumps(step(3, math.nan, grad_norm=math.inf)) + "\n")
    summary = summary_of(tmp_path)
    assert (summary["steps"], summary["unreadable_lines"]) == (4, 1)
    assert summary["final_loss"]["pairs"] is None
    assert "1 lines of the run" in Page(write_report(tmp_path).read_text()).text


def test_null_stands_for_a_number_that_was_not_finite(tmp_path: Path) -> None:
    """As the run writes it: JSON has no NaN."""
    bad = {**step(2, 0.0), "loss": {"pairs": None, "docs": 2.0}, "grad_norm": None, "skipped": 1}
    lost = probe(3)
    lost["data"]["pairs"]["true"] = None
    write_lines(tmp_path / "metrics.jsonl", [step(0, 3.0), step(1, 5.0), bad, lost])
    summary = summary_of(tmp_path)
    assert summary["final_loss"] == {"pairs": None, "docs": 2.0}
    assert summary["final_loss_mean"] == {"pairs": 4.0, "docs": 4.0}
    assert summary["grounding_gap_nats"]["pairs"] is None
    assert summary["skipped_steps"] == 1
    assert Page(write_report(tmp_path).read_text()).tags.count("svg") == 6


def test_total_of_the_phases_is_taken_where_it_was_measured(tmp_path: Path) -> None:
    (tmp_path / "phases.json").write_text(json.dumps({"encode": 30.0, "train": 60.0, "total": 120.0}))
    text = Page(write_report(tmp_path).read_text()).text
    assert "train0:01:0050.0%total0:02:00100.0%" in text


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        write_report(tmp_path / "nothing")


def test_images_outside_the_run_folder_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "secret.png").write_bytes(png(1))
    assert embed(tmp_path / "run", "../secret.png") is None
    assert embed(tmp_path / "run", "missing.png") is None
    (tmp_path / "run" / "text.png").write_text("no image")
    assert embed(tmp_path / "run", "text.png") is None


@settings(deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=60))
def test_smoothing_stays_between_the_extremes(values: list[float]) -> None:
    found = smooth(values)
    assert len(found) == len(values)
    assert found[0] == values[0]
    assert min(values) - 1e-9 <= found.min() <= found.max() <= max(values) + 1e-9


@settings(deadline=None)
@given(st.integers(1, 5000))
def test_thinning_keeps_the_ends(count: int) -> None:
    x, y = thin(list(range(count)), [float(value) for value in range(count)])
    assert len(x) == min(count, MOST_POINTS)
    assert (x[0], x[-1], y[-1]) == (0, count - 1, count - 1)


def test_bins_keep_the_mean() -> None:
    _, (column,) = bins(list(range(1000)), [[1.0, 3.0] * 500], count=100)
    assert len(column) == 100
    assert column.mean() == pytest.approx(2.0)
