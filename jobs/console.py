"""Live view of a training run: a progress bar and figures on a terminal, plain lines elsewhere.

Fed with the objects of metrics.jsonl (docs/architecture.md, "Run folder"), so that a finished or remote run
can be shown from its file as well. Rank 0 alone should own one.
"""

import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True, kw_only=True)
class ConsoleConfig:
    """How progress is shown."""

    interval: float = 10.0
    """Seconds between two lines where the output is no terminal (CI, SLURM logs)."""
    memory: float = 0.9
    """Weight of the past in the running averages of loss and speed, 0 (last step alone) to below 1."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.interval < 0 or not 0 <= self.memory < 1:
            raise ValueError(
                f"ConsoleConfig has interval={self.interval}, memory={self.memory}: interval must be at "
                "least 0 and memory in [0, 1)"
            )


class Figures:
    """Running figures of a run, taken from its step objects."""

    def __init__(self, total_steps: int, *, memory: float = 0.9) -> None:
        self.total_steps = total_steps
        self.step = 0
        """Steps done, those before a resume included."""
        self.loss: dict[str, float] = {}
        """Running mean of the loss of each data set, nats a token; the bare value while it is not finite."""
        self.tokens_per_second = math.nan
        self.useful_mfu = math.nan
        """Needed operations a second over the peak."""
        self.hfu = math.nan
        """Operations a second that ran, over the peak."""
        self.seconds_per_step = math.nan
        self.data_share = math.nan
        """Share of the step time spent waiting for data."""
        self.gates: dict[str, float] = {}
        """Mean |tanh(gate)| over the blocks, for "attn" and "ffw"."""
        self.grad_norm = math.nan
        self.lr = math.nan
        self.skipped = 0
        self.bad_samples = 0
        self._memory = memory
        self._means: dict[str, float] = {}

    def update(self, record: Mapping[str, Any]) -> None:
        """Take in one "step" object."""
        self.step = int(record["step"]) + 1
        seconds = record.get("seconds", {})
        self.loss.update(
            {name: self._mean(f"loss.{name}", _number(value)) for name, value in record["loss"].items()}
        )
        self.tokens_per_second = self._mean("tokens", record.get("tokens_per_second"))
        self.useful_mfu = self._mean("useful_mfu", record.get("useful_mfu"))
        self.hfu = self._mean("hfu", record.get("hfu"))
        whole, data = self._mean("step", seconds.get("step")), self._mean("data", seconds.get("data"))
        self.seconds_per_step = whole
        self.data_share = data / whole if whole > 0 else math.nan
        self.gates = {kind: mean_magnitude(values) for kind, values in record.get("gates", {}).items()}
        self.grad_norm = _number(record.get("grad_norm"))
        self.lr = _number(record.get("lr"))
        self.skipped += int(record.get("skipped") or 0)
        self.bad_samples += int(record.get("bad_samples") or 0)

    @property
    def seconds_left(self) -> float:
        """Expected time to the last step; NaN before the first."""
        return (self.total_steps - self.step) * self.seconds_per_step

    def cells(self) -> list[tuple[str, str]]:
        """Return the figures as (label, text) pairs; what the run did not report is left out."""
        gates = " ".join(f"{kind} {value:.4f}" for kind, value in self.gates.items())
        cells = [
            ("loss", "  ".join(f"{name} {value:.4f}" for name, value in self.loss.items())),
            ("tokens/s", _text("{:,.0f}", self.tokens_per_second)),
            ("useful MFU", _text("{:.1%}", self.useful_mfu)),
            ("HFU", _text("{:.1%}", self.hfu)),
            ("step", _text("{:.2f} s", self.seconds_per_step)),
            ("data wait", _text("{:.1%}", self.data_share)),
            ("gates", gates),
            ("grad norm", _text("{:.3g}", self.grad_norm)),
            ("lr", _text("{:.2e}", self.lr)),
            ("skipped", str(self.skipped or "")),
            ("bad samples", str(self.bad_samples or "")),
        ]
        return [(label, text) for label, text in cells if text]

    def _mean(self, name: str, value: float | None) -> float:
        """Return the running mean of a figure; a value that is not finite is shown and not remembered."""
        if value is None:
            return self._means.get(name, math.nan)
        if not math.isfinite(value):
            return value
        past = self._means.get(name, value)
        self._means[name] = self._memory * past + (1 - self._memory) * value
        return self._means[name]


class TrainingConsole:
    """Shows a run while it trains; a context manager.

    On a terminal a bar and a table are redrawn in place. Elsewhere a line is written and flushed at the first
    step, every `interval` seconds and at the last step: a log that is read with `tail -f` stays current.
    """

    def __init__(
        self,
        total_steps: int,
        config: ConsoleConfig | None = None,
        *,
        stream: TextIO | None = None,
        interactive: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare the view.

        Args:
            total_steps: Steps of the whole run.
            config: How progress is shown.
            stream: Where to; standard output by default.
            interactive: Redraw in place, or write lines; by default what the stream is.
            clock: Seconds, for the interval between lines.
        """
        self._config = config or ConsoleConfig()
        self._stream = stream if stream is not None else sys.stdout
        self._console = Console(file=self._stream, highlight=False)
        self._figures = Figures(total_steps, memory=self._config.memory)
        self._interactive = self._console.is_terminal if interactive is None else interactive
        self._clock = clock
        self._last_line = -math.inf
        self._live: Live | None = None

    def __enter__(self) -> "TrainingConsole":
        """Start drawing."""
        if self._interactive:
            self._live = Live(self._draw(), console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing; the last state stays on the screen."""
        if self._live is not None:
            self._live.update(self._draw(), refresh=True)
            self._live.stop()
            self._live = None

    def update(self, record: Mapping[str, Any]) -> None:
        """Show one object of metrics.jsonl, of kind "step" or "probe"; other kinds are passed over."""
        if record.get("kind") == "probe":
            self.print(probe_line(record))
        elif record.get("kind") == "step":
            self._figures.update(record)
            if self._live is not None:
                self._live.update(self._draw())
            elif self._line_is_due():
                self._last_line = self._clock()
                self.print(step_line(self._figures))

    def print(self, line: str) -> None:
        """Write one line of text; above the drawing where there is one."""
        if self._live is not None:
            self._live.console.print(Text(line))
        else:
            print(line, file=self._stream, flush=True)

    def _line_is_due(self) -> bool:
        """Whether the plain output needs a line now."""
        last = self._figures.step >= self._figures.total_steps
        return last or self._clock() - self._last_line >= self._config.interval

    def _draw(self) -> RenderableType:
        """Bar and figures, as rich draws them."""
        figures = self._figures
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(f"step {figures.step}/{figures.total_steps}", style="bold"),
            ProgressBar(total=max(figures.total_steps, 1), completed=figures.step, width=40),
            Text(f"{duration(figures.seconds_left)} left"),
        )
        table = Table.grid(padding=(0, 2))
        for label, text in figures.cells():
            table.add_row(Text(label, style="dim"), Text(text))
        return Group(head, table)


def step_line(figures: Figures) -> str:
    """One line of plain text for a log."""
    share = figures.step / max(figures.total_steps, 1)
    cells = " | ".join(f"{label} {text}" for label, text in figures.cells())
    head = f"step {figures.step}/{figures.total_steps} {share:.0%}"
    return f"{head} | {cells} | left {duration(figures.seconds_left)}"


def probe_line(record: Mapping[str, Any]) -> str:
    """One line for a "probe" object: the losses of each data set and the ranking of candidates."""
    parts = []
    for name, losses in record.get("data", {}).items():
        gap = _number(losses.get("shuffled")) - _number(losses.get("true"))
        shown = " ".join(
            f"{kind.replace('_', ' ')} {_number(losses[kind]):.3f}"
            for kind in ("true", "shuffled", "blank", "gates_off")
            if kind in losses
        )
        parts.append(f"{name}: {shown}, gap {gap:+.3f}")
    for name, ranks in record.get("candidates", {}).items():
        parts.append(
            f"{name} candidates: top-1 {ranks['top1']:.1%} (chance {ranks['chance_top1']:.1%}), "
            f"top-5 {ranks['top5']:.1%} (chance {ranks['chance_top5']:.1%})"
        )
    return f"probe after step {record['step']} | " + " | ".join(parts)


def mean_magnitude(values: float | Iterable[Any]) -> float:
    """Mean absolute value of numbers, nested or not (gates may be one number a block or one a channel)."""
    numbers = list(_flatten(values))
    return sum(map(abs, numbers)) / len(numbers) if numbers else math.nan


def duration(seconds: float) -> str:
    """Write seconds as h:mm:ss; "?" for NaN."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(max(seconds, 0))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _flatten(values: float | Iterable[Any]) -> Iterable[float]:
    """Walk nested lists of numbers."""
    if isinstance(values, Iterable):
        for value in values:
            yield from _flatten(value)
    else:
        yield float(values)


def _number(value: float | None) -> float:
    """Read a number; None, which a file has for one that is missing or not finite, as NaN."""
    return math.nan if value is None else float(value)


def _text(form: str, value: float) -> str:
    """Format a figure; NaN, which stands for one that was not reported, as nothing."""
    return "" if math.isnan(value) else form.format(value)


def first_line(error: BaseException, *, kind: bool = False) -> str:
    """Return the first line of what an error says, after its kind if that is wanted; its kind where it says nothing."""
    name = type(error).__name__
    said = next((line.strip()[:300] for line in str(error).splitlines() if line.strip()), "")
    return f"{name}: {said}" if kind and said else said or name
