import csv
import gzip
import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from flamingo_dist.models.flamingo import Flamingo
from flamingo_dist.parallel.topology import single_process
from jobs.bench import command
from jobs.bench.profiling import Line, summarise
from tests import tiny

BLANK = Line(network="n", contender="c", kind="", name="", ms=0.0)


def recorded(checkpointing):
    """Events of one forward and backward of a tiny network on pixels."""
    with single_process():
        model = Flamingo(
            tiny.network(gate_init=0.5), dtype=torch.float32, activation_checkpointing=checkpointing
        )
        for value in model.parameters():
            torch.nn.init.normal_(value, std=0.02)
        batch = tiny.batch("pairs", 0)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            out = model(
                batch.tokens_BT,
                batch.media_index_BT,
                batch.media,
                batch.media_mask_BM,
                targets_BT=batch.targets(),
            )
            out.nll_BT.sum().backward()
    return list(profiler.events())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_operation_belongs_to_one_part(checkpointing):
    events = recorded(checkpointing)
    lines = summarise(events, BLANK, steps=2, on_gpu=False, wall=1.0)
    parts = {(x.name, x.direction): x for x in lines if x.kind == "part"}
    both = {
        (name, way)
        for name in ("resampler", "gated blocks", "frozen LM", "loss")
        for way in ("forward", "backward")
    }
    again = {(name, "recompute") for name in ("gated blocks", "frozen LM")} if checkpointing else set()
    others = {("other", ""), ("other", "backward")}
    # No backward and no recomputation of the encoder; of gradients' sums nobody is the maker.
    assert set(parts) - others == both | again | {("vision encoder", "forward")}
    assert sum(x.calls for x in parts.values()) == pytest.approx(len(events) / 2)
    assert sum(x.ms for x in parts.values()) == pytest.approx(
        sum(e.self_cpu_time_total for e in events) / 2e3
    )
    assert sum(x.share for x in parts.values()) == pytest.approx(1)
    # By count, as a first call that starts threads or waits for a core weighs more than its work.
    assert parts["other", "backward"].calls < 0.1 * len(events) / 2


def test_matrix_products_are_found_where_they_are_made():
    events = recorded(False)
    lines = {}
    for name in ("frozen LM", "gated blocks"):
        made = [e for e in events if e.name == "aten::mm"]
        lines[name] = len([e for e in made if _range_of(e) == name])
    # Query-key-value, projection, two of the FFW; q, k, v, out, up, down.
    assert lines == {"frozen LM": 3 * 4, "gated blocks": 2 * 6}


def _range_of(event):
    while event is not None and not event.is_user_annotation:
        event = event.cpu_parent
    return event.name if event else None


def test_a_tiny_profile_goes_the_whole_way(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    given = [
        "step",
        "--device",
        "cpu",
        "--tiny",
        "--pixels",
        "--compiled",
        "--fp8",
        "--recompute",
        "selective",
    ]
    given += ["--profile", "--out", str(tmp_path)]
    assert command.main(given) == 0
    rows = json.loads((tmp_path / "step-pixels.json").read_text())["rows"]
    status = {r["contender"]: r["status"] for r in rows}
    compiled, fp8 = "frozen blocks compiled", "frozen products in fp8"
    timed = dict.fromkeys(("reference", compiled, fp8, f"{compiled}, {fp8}"), "timed")
    assert status == timed | {"triton": "left out"}
    errors = {r["contender"]: r["worst_error"] for r in rows}
    assert errors[compiled] < 1e-5
    assert 0 < errors[fp8] < 2e-2, "fp8 rounds, and not much"
    assert errors[f"{compiled}, {fp8}"] == pytest.approx(errors[fp8], rel=0.1)
    with (tmp_path / "profile.csv").open() as file:
        lines = list(csv.DictReader(file))
    lines = [x for x in lines if x["contender"] == "reference"]
    named = {x["name"]: float(x["ms"]) for x in lines if x["kind"] == "part"}
    assert {"data", "vision encoder", "resampler", "gated blocks", "frozen LM", "loss", "optimizer"} <= set(
        named
    )
    again = [x["name"] for x in lines if x["direction"] == "recompute"]
    assert sorted(again) == ["frozen LM", "gated blocks"]
    whole = {x["name"]: float(x["ms"]) for x in lines if x["kind"] == "whole"}
    assert 0 < whole["busy"] <= whole["wall"]
    with gzip.open(tmp_path / "trace-smoke-reference.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"frozen LM", "vision encoder", "aten::mm"} <= names
    page = (tmp_path / "profile.md").read_text()
    assert "## smoke, frozen blocks compiled" in page
    assert page.count("| frozen LM | backward |") == 4, "the compiled blocks' backward is theirs"


def test_pixels_are_refused_where_features_are_all_there_is(capsys):
    assert command.main(["step", "--device", "cpu", "--tiny", "--pixels", "--networks", "3b"]) == 0
    from jobs.bench.step import StepConfig

    with pytest.raises(ValueError, match="3b-idefics takes ready features"):
        StepConfig(device=torch.device("cuda"), pixels=True)
    with pytest.raises(ValueError, match="--fuse-encoder, but no encoder runs"):
        StepConfig(device=torch.device("cuda"), fuse_encoder=True)
