"""Times the kernels with other tiles than their tables': `python -m jobs.bench.tune --out FOLDER` on a GPU.

The tables (`kernels/*/tiles.py`) hold one choice for each head width, dtype and architecture. This tries others at the
paper's shapes and prints them by time, the table's own among them, so that a table can be rewritten by hand: nothing
reads the result. What differs from the table's result by more than rounding is marked, and what spills shows in the
dry-device tests once it is in the table.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from jobs.bench.cases import make_case
from jobs.bench.compare import first_line
from jobs.bench.roofline import cost
from jobs.bench.rows import environment
from jobs.bench.shapes import PERCEIVER, XATTN, PerceiverShape, Shape, XattnShape
from jobs.bench.timing import Clock, copy_bandwidth
from kernels.gated_xattn import op as xattn
from kernels.gated_xattn.tiles import Tile
from kernels.perceiver_attn import op as perceiver
from kernels.perceiver_attn.tiles import Tiles

SHAPES: tuple[Shape, ...] = (*XATTN[:3], XATTN[6], *PERCEIVER[:2])
"""What is timed: 80B and 9B, OpenFlamingo's, and the Resampler's."""


@dataclass(frozen=True)
class Trial:
    """One kernel with one tile, at one shape."""

    shape: Shape
    backward: bool
    tile: Tile | Tiles | None
    """None is the table's."""


def trials() -> Iterator[Trial]:
    """Yield what is tried, the table's choice of each kernel and shape first."""
    for shape in SHAPES:
        for backward in (False, True):
            yield Trial(shape, backward, None)
            if isinstance(shape, XattnShape):
                yield from (Trial(shape, backward, tile) for tile in xattn_tiles(shape.head_dim, backward))
            elif isinstance(shape, PerceiverShape):
                yield from (Trial(shape, backward, tile) for tile in perceiver_tiles(backward))


def xattn_tiles(width: int, backward: bool) -> Iterator[Tile]:
    """Yield tiles of the gated cross-attention's forward or backward for heads of `width`."""
    halves = [(width, 0), (width // 2, width // 2)]
    if not backward:
        for rows, parts, stages in product((64, 128), halves, (1, 2)):
            yield Tile(rows, rows // 16, parts, stages=stages)
        return
    for rows, parts, cap in product((32, 64), halves, (None, 128, 168)):
        yield Tile(rows, 4, parts, registers=cap)
    for parts in halves:
        yield Tile(64, 4, parts, stages=2)


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
        with mock.patch.object(xattn, "tiles", lambda *_: (tile, tile)):
            yield
    else:
        name = "backward_tiles" if trial.backward else "forward_tiles"
        with mock.patch.object(perceiver, name, lambda *_: tile):
            yield


def call_of(trial: Trial, shape: Shape) -> Callable[[], Any]:
    """Return what launches the trial's kernel on random inputs of `shape`."""
    case = make_case(shape, device=torch.device("cuda"), dtype=torch.bfloat16)
    inputs = [x.detach() for x in case.inputs]
    if isinstance(shape, XattnShape):
        q, k, v, gate = inputs
        assert case.index_BT is not None
        spans = xattn.media_spans(case.index_BT, shape.images)
        args = (q, k.flatten(0, 1), v.flatten(0, 1), spans, gate)
        if trial.backward:
            return lambda: xattn.backward(case.upstream[0], *args)
        return lambda: xattn.forward(*args)
    if not trial.backward:
        return lambda: perceiver.launch_forward(*inputs, None, 0)
    out, lse = perceiver.launch_forward(*inputs, None, 0)
    return lambda: perceiver.launch_backward(case.upstream[0], *inputs, None, out, lse, 0)


def small(shape: Shape) -> Shape:
    """Return a shape that compiles to the same kernel, for the compiling processes."""
    if isinstance(shape, XattnShape):
        return (
            replace(shape, batch=1) if shape.heads >= 64 else shape
        )  # few programs are split, to fp32 parts
    assert isinstance(shape, PerceiverShape)
    return replace(shape, media=1)


def kernel_of(trial: Trial) -> tuple[object, ...]:
    """Return what decides the compiled kernel: the other sizes are no part of it."""
    assert isinstance(trial.shape, XattnShape | PerceiverShape)
    return trial.shape.op, trial.shape.head_dim, trial.backward, trial.tile


def compile_one(trial: Trial) -> str:
    """Compile a trial's kernel into Triton's cache; return what went wrong."""
    try:
        with using(trial):
            call_of(trial, small(trial.shape))()
            torch.cuda.synchronize()
    except Exception as error:  # out of shared memory, or a compiler's own: a result
        return first_line(error)
    return ""


def main(arguments: list[str]) -> int:
    """Compile in many processes, then time in this one."""
    parser = argparse.ArgumentParser(prog="python -m jobs.bench.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--compile", type=int, metavar="N", help="only compile, in N processes")
    parser.add_argument("--ops", nargs="+", default=["gated_xattn", "perceiver_attn"])
    parser.add_argument("--backward", action="store_true", help="the backward kernels alone")
    parser.add_argument("--seconds", type=float, default=120.0, help="no trial begins after so many")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("No CUDA device here, so no tile is timed.")
        return 0
    found = [t for t in trials() if t.shape.op in given.ops and (t.backward or not given.backward)]
    started = time.monotonic()
    if given.compile:
        each = list({kernel_of(trial): trial for trial in reversed(found)}.values())
        with multiprocessing.get_context("spawn").Pool(given.compile) as pool:
            broken = [why for why in pool.imap_unordered(compile_one, each) if why]
        print(f"{len(each)} kernels in {time.monotonic() - started:.0f} s, {len(broken)} do not compile")
        return 0
    device = torch.device("cuda")
    clock = Clock(device, budget_ms=25.0)
    copy_rate = copy_bandwidth(clock)
    rows: list[dict[str, Any]] = []
    want: Any = None
    for trial in found:
        if time.monotonic() - started > given.seconds:
            print(f"{len(found) - len(rows)} not reached")
            break
        name = "table" if trial.tile is None else str(trial.tile)
        row: dict[str, Any] = {"shape": trial.shape.name, "backward": trial.backward, "tile": name}
        rows.append(row)
        try:
            with clock.running(), using(trial):
                call = call_of(trial, trial.shape)
                got = call()
                got = got if isinstance(got, tuple) else (got,)
                want = got if trial.tile is None else want
                row["difference"] = max(
                    float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-9))
                    for a, b in zip(got, want, strict=True)
                    if b.numel() > 1
                )
                row["ms"] = clock.measure(call).median
        except Exception as error:  # out of shared memory, or a compiler's own: a result
            row["why"] = first_line(error)
            continue
        least = cost(trial.shape, "bwd" if trial.backward else "fwd").bytes
        row["copy_share"] = least / (1e-3 * row["ms"]) / copy_rate
    given.out.mkdir(parents=True, exist_ok=True)
    results = {"environment": environment(device, copy_gb_per_s=copy_rate / 1e9), "rows": rows}
    (given.out / "tune.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for shape, backward in product(SHAPES, (False, True)):
        own = [r for r in rows if (r["shape"], r["backward"]) == (shape.name, backward) and "ms" in r]
        best = sorted(own, key=lambda r: r["ms"])
        print(f"{shape.name} {'bwd' if backward else 'fwd'}")
        for place, row in enumerate(best):
            if place < 5 or row["tile"] == "table":
                print(
                    f"  {row['ms']:.3f} ms {row['copy_share']:.0%} of a copy, {row['difference']:.0e} {row['tile']}"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
