import io
import math
from typing import Any

import pytest

from jobs.console import ConsoleConfig, Figures, TrainingConsole, duration, mean_magnitude, probe_line


def step(number: int, **changes: Any) -> dict[str, Any]:
    record = {
        "kind": "step",
        "step": number,
        "time": 1000.0 + number,
        "loss": {"pairs": 3.0, "docs": 2.0},
        "tokens": {"pairs": 310, "docs": 500},
        "grad_norm": 0.8,
        "lr": 1e-4,
        "gates": {"attn": [0.1, -0.3], "ffw": [0.0, 0.02]},
        "seconds": {"data": 0.1, "step": 2.0, "forward_backward": 1.7, "optimizer": 0.2, "checkpoint": 0.0},
        "tokens_per_second": 812.0,
        "skipped": 0,
        "bad_samples": 0,
    }
    return {**record, **changes}


PROBE = {
    "kind": "probe",
    "step": 100,
    "data": {"pairs": {"true": 2.6, "shuffled": 3.2, "blank": 3.3, "gates_off": 6.1, "tokens": 1234}},
    "candidates": {
        "pairs": {"top1": 0.2, "top5": 0.5, "chance_top1": 0.05, "chance_top5": 0.25, "count": 64}
    },
}


def test_plain_lines_come_at_the_start_at_intervals_and_at_the_end() -> None:
    now, stream = [0.0], io.StringIO()
    with TrainingConsole(100, ConsoleConfig(interval=10), stream=stream, clock=lambda: now[0]) as console:
        for number in range(100):
            now[0] = number * 0.9
            console.update(step(number))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("step 1/100 1% | loss pairs 3.0000  docs 2.0000 | tokens/s 812 | step 2.00 s")
    assert "data wait 5.0% | gates attn 0.2000 ffw 0.0100 | grad norm 0.8 | lr 1.00e-04" in lines[0]
    assert lines[0].endswith("left 0:03:18")
    assert lines[-1].startswith("step 100/100 100%")
    assert "\x1b" not in stream.getvalue(), "no escape codes in a log"


def test_mfu_and_hfu_stand_side_by_side_where_a_run_reports_them() -> None:
    figures = Figures(10)
    figures.update(step(0, useful_mfu=0.31, hfu=0.42))
    assert {("useful MFU", "31.0%"), ("HFU", "42.0%")} <= set(figures.cells())
    figures = Figures(10)
    figures.update(step(0))
    assert not {label for label, _ in figures.cells()} & {"useful MFU", "HFU"}


def test_plain_lines_are_flushed() -> None:
    class Stream(io.StringIO):
        flushed = ""

        def flush(self) -> None:
            self.flushed = self.getvalue()

    stream = Stream()
    with TrainingConsole(5, stream=stream) as console:
        console.update(step(0))
        assert "step 1/5" in stream.flushed


def test_terminal_shows_bar_figures_and_probe() -> None:
    stream = io.StringIO()
    with TrainingConsole(4, stream=stream, interactive=True) as console:
        for number in range(4):
            console.update(step(number))
        console.update(PROBE)
    shown = stream.getvalue()
    assert "step 4/4" in shown
    assert "data wait" in shown
    assert "gap +0.600" in shown.replace("\n", " ")


def test_probe_line() -> None:
    assert probe_line(PROBE) == (
        "probe after step 100 | pairs: true 2.600 shuffled 3.200 blank 3.300 gates off 6.100, gap +0.600 | "
        "pairs candidates: top-1 20.0% (chance 5.0%), top-5 50.0% (chance 25.0%)"
    )


def test_loss_is_averaged_over_time() -> None:
    figures = Figures(10, memory=0.5)
    for number, value in enumerate([4.0, 2.0, 1.0]):
        figures.update(step(number, loss={"pairs": value}))
    assert figures.loss["pairs"] == pytest.approx(2.0)


def test_a_loss_that_is_not_finite_is_shown_and_forgotten() -> None:
    figures = Figures(10, memory=0.5)
    figures.update(step(0, loss={"pairs": 4.0}))
    figures.update(step(1, loss={"pairs": math.nan}, skipped=1))
    assert math.isnan(figures.loss["pairs"])
    assert ("skipped", "1") in figures.cells()
    figures.update(step(2, loss={"pairs": 2.0}))
    assert figures.loss["pairs"] == pytest.approx(3.0)


def test_null_in_a_file_is_not_a_number() -> None:
    figures = Figures(10)
    figures.update(step(0, loss={"pairs": None}, grad_norm=None))
    assert ("loss", "pairs nan") in figures.cells()
    assert "gap +nan" in probe_line({"step": 1, "data": {"pairs": {"true": None, "shuffled": 1.0}}})


def test_a_resumed_run_counts_its_earlier_steps() -> None:
    figures = Figures(100)
    figures.update(step(79))
    assert (figures.step, figures.seconds_left) == (80, pytest.approx(40.0))


def test_figures_that_are_missing_are_left_out() -> None:
    figures = Figures(10)
    figures.update({"kind": "step", "step": 0, "loss": {"pairs": 1.0}})
    assert figures.cells() == [("loss", "pairs 1.0000")]


def test_small_parts() -> None:
    assert mean_magnitude([[0.1, -0.1], [-0.4, 0.4]]) == pytest.approx(0.25)
    assert math.isnan(mean_magnitude([]))
    assert (duration(3723.4), duration(math.nan)) == ("1:02:03", "?")
    with pytest.raises(ValueError, match="memory=1"):
        ConsoleConfig(memory=1)
