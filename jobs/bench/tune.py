"""Times the attention kernels with other tiles than their tables': `python -m jobs.bench.tune --out FOLDER` on a GPU.

The tables (`kernels/*/tiles.py`) hold one choice for each head width, dtype and architecture. This tries others at the
paper's shapes, writes tune.json and prints the quickest beside the table's own, so that a person can rewrite a table:
nothing reads the result. How far a result is from the table's tile is written beside its time; what a kernel needs
(registers, spills, sound wgmma operands) the tests on the dry device say once it is in the table.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby, product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from jobs.bench.cases import make_case
from jobs.bench.checking import error_of
from jobs.bench.roofline import cost
from jobs.bench.rows import environment
from jobs.bench.shapes import PERCEIVER, TINY, XATTN, PerceiverShape, Shape, XattnShape
from jobs.bench.timing import Clock, copy_bandwidth
from jobs.console import first_line
from kernels.gated_xattn import op as xattn
from kernels.gated_xattn.tiles import Tile
from kernels.perceiver_attn import op as perceiver
from kernels.perceiver_attn.tiles import Tiles

SHAPES: tuple[Shape, ...] = (*XATTN[:3], XATTN[6], *PERCEIVER[:2])
"""What is timed: 80B and 9B, OpenFlamingo's, and the Resampler's."""
SHOWN = 5
"""Tiles that the terminal shows of each kernel and shape, beside the table's."""


@dataclass(frozen=True)
class Trial:
    """One kernel with one tile, at one shape."""

    shape: Shape
    backward: bool
    tile: Tile | Tiles | None
    """None is the table's."""

    @property
    def kernel(self) -> tuple[object, ...]:
        """What decides the compiled kernel: the other sizes are no part of it."""
        assert isinstance(self.shape, XattnShape | PerceiverShape), self.shape
        return self.shape.op, self.shape.head_dim, self.backward, self.tile


def trials(tiny: bool) -> Iterator[Trial]:
    """Yield what is tried, the table's choice of each kernel and shape first; `tiny` is for Triton's interpreter."""
    for shape, backward in product((TINY[1], TINY[2]) if tiny else SHAPES, (False, True)):
        yield Trial(shape, backward, None)
        tiles: Iterator[Tile | Tiles] = iter(())
        if isinstance(shape, XattnShape):
            tiles = iter([Tile(32, 4, (16, 0))]) if tiny else xattn_tiles(shape.head_dim, backward)
        elif tiny:
            tiles = iter([Tiles(rows=16, keys=32, parts=(16, 0), warps=4, stages=1)])
        else:
            tiles = perceiver_tiles(backward)
        yield from (Trial(shape, backward, tile) for tile in tiles)


def xattn_tiles(width: int, backward: bool) -> Iterator[Tile]:
    """Yield tiles of the gated cross-attention's forward or backward for heads of `width`."""
    halves = [(width, 0), (width // 2, width // 2)]
    if not backward:
        for rows, parts, stages in product((64, 128), halves, (1, 2)):
            yield Tile(rows, rows // 16, parts, stages=stages)
        return
    for parts, cap, stages, dv_first in product(halves, (None, 168), (1, 2), (False, True)):
        yield Tile(64, 4, parts, registers=cap, stages=stages, dv_first=dv_first)
    for cap in (None, 128):
        yield Tile(32, 4, halves[0], registers=cap)


def perceiver_tiles(backward: bool) -> Iterator[Tiles]:
    """Yield tiles of the Resampler's forward or backward, heads of 96."""
    for keys, warps, stages in product((32, 64), (4, 8) if backward else (4,), (1, 2, 3)):
        yield Tiles(rows=64, keys=keys, parts=(64, 32), warps=warps, stages=stages)
        if backward:
            yield Tiles(rows=64, keys=keys, parts=(128, 0), warps=warps, stages=stages)


@contextmanager
def using(trial: Trial) -> Iterator[None]:
    """Put the trial's tile in the place of the table's inside."""
    tile = trial.tile
    if tile is None:
        yield
    elif isinstance(tile, Tile):
        with mock.patch.object(xattn, "tiles", return_value=(tile, tile)):
            yield
    else:
        name = "backward_tiles" if trial.backward else "forward_tiles"
        with mock.patch.object(perceiver, name, return_value=tile):
            yield


def call_of(trial: Trial, shape: Shape, device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    """Return what launches the trial's kernel on random inputs of `shape`."""
    case = make_case(shape, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    inputs = [x.detach() for x in case.inputs]
    (upstream,) = case.upstream
    if isinstance(shape, XattnShape):
        q, k, v, gate = inputs
        assert case.index_BT is not None, "cross-attention has one"
        args = (q, k.flatten(0, 1), v.flatten(0, 1), xattn.media_spans(case.index_BT, shape.images), gate)
        if trial.backward:
            return lambda: xattn.backward(upstream, *args)
        return lambda: (xattn.forward(*args),)
    q, k_feat, v_feat, k_lat, v_lat = inputs
    attended = (q, k_feat, v_feat, k_lat, v_lat, None)
    if not trial.backward:
        return lambda: perceiver.launch_forward(*attended, 0)
    out, lse = perceiver.launch_forward(*attended, 0)
    return lambda: perceiver.launch_backward(upstream, *attended, out, lse, 0)


def compile_one(trial: Trial) -> str:
    """Compile a trial's kernel into Triton's cache by running it at a small size; return what went wrong."""
    shape = trial.shape
    if isinstance(shape, PerceiverShape):
        shape = replace(shape, media=1)
    elif isinstance(shape, XattnShape) and shape.heads >= 64:  # fewer programs are split, into fp32 parts
        shape = replace(shape, batch=1)
    try:
        with using(trial):
            call_of(trial, shape, torch.device("cuda"))()
            torch.cuda.synchronize()
    except Exception as error:  # out of shared memory, or a compiler's own: a result
        return first_line(error, kind=True)
    return ""


def time_some(some: Sequence[Trial], device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """Return a row for each trial, up to the first that the GPU does not survive; none begins after `seconds`.

    The first must be the table's: the others' results are compared with its.
    """
    started = time.monotonic()
    clock = Clock(device, budget_ms=25.0)
    copy_rate = copy_bandwidth(clock)
    rows: list[dict[str, Any]] = []
    want: tuple[Tensor, ...] = ()
    for trial in some:
        if rows and time.monotonic() - started > seconds:
            break
        name = "table" if trial.tile is None else str(trial.tile)
        row: dict[str, Any] = {
            "shape": trial.shape.name,
            "op": trial.shape.op,
            "backward": trial.backward,
            "tile": name,
        }
        rows.append(row)
        try:
            with clock.running(), using(trial):
                call = call_of(trial, trial.shape, device)
                got = call()
                want = want or got
                row["difference"] = max(
                    error_of(a, b, float(b.float().norm())) for a, b in zip(got, want, strict=True) if b.dim()
                )
                row["ms"] = clock.measure(call).median
        except Exception as error:  # out of shared memory, a compiler's own, or an illegal address: a result
            row["why"] = first_line(error, kind=True)
            if "illegal" in row["why"]:
                break
            continue
        least = cost(trial.shape, "bwd" if trial.backward else "fwd").bytes
        row["copy_share"] = least / (1e-3 * row["ms"]) / copy_rate
    return rows


def time_all(found: Sequence[Trial], device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """Time one kernel and shape after the other, each in a process of its own: an illegal address ends only that."""
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for _, group in groupby(found, key=lambda trial: (trial.shape, trial.backward)):
            table, *rest = group
            again = False
            while rest or not again:
                left = seconds - (time.monotonic() - started)
                if left <= 0:
                    return rows
                new = pool.apply(time_some, ([table, *rest], device, left))
                rows += new[1:] if again else new
                lost = "illegal" in new[-1].get("why", "") and len(new) > 1
                rest, again = (rest[len(new) - 1 :] if lost else []), True
    return rows


def main(arguments: list[str]) -> int:
    """Compile in many processes, or time in one after the other."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.bench.tune", description="Times other tiles than the kernels' tables hold."
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of tune.json")
    parser.add_argument("--compile", type=int, metavar="N", help="only compile, in N processes")
    parser.add_argument("--ops", nargs="+", default=["gated_xattn", "perceiver_attn"], help="default: both")
    parser.add_argument("--backward", action="store_true", help="the backward kernels alone")
    parser.add_argument("--seconds", type=float, default=120.0, help="no trial begins after so many")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a CPU, to test this module")
    given = parser.parse_args(arguments)
    if not given.tiny and not torch.cuda.is_available():
        print("No CUDA device here, so no tile is timed.")
        return 0
    device = torch.device("cpu" if given.tiny else "cuda")
    found = [t for t in trials(given.tiny) if t.shape.op in given.ops and (t.backward or not given.backward)]
    if given.compile:
        each = list({trial.kernel: trial for trial in reversed(found)}.values())
        with multiprocessing.get_context("spawn").Pool(given.compile) as pool:
            broken = [why for why in pool.imap_unordered(compile_one, each) if why]
        print(f"{len(each)} kernels, {len(broken)} do not run: {', '.join(sorted(set(broken)))}")
        return 0
    rows = time_all(found, device, given.seconds)
    given.out.mkdir(parents=True, exist_ok=True)
    results = {"environment": environment(device), "not_reached": len(found) - len(rows), "rows": rows}
    (given.out / "tune.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for line in lines(rows):
        print(line)
    return 0


def lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield what the terminal says: of each kernel and shape the quickest tiles, and the table's."""
    for (op, shape, backward), group in groupby(
        rows, key=lambda row: (row["op"], row["shape"], row["backward"])
    ):
        yield f"{op} {shape}, {'backward' if backward else 'forward'}"
        timed = sorted((row for row in group if "ms" in row), key=lambda row: row["ms"])
        for place, row in enumerate(timed):
            if place < SHOWN or row["tile"] == "table":
                yield (
                    f"  {row['ms']:.3f} ms, {row['copy_share']:.0%} of a copy, {row['difference']:.0e} from the "
                    f"table's result: {row['tile']}"
                )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
