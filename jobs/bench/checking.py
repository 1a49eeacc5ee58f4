"""No speed without numbers that are right: every contender against fp64, and the verdict of the kernels' tests."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from jobs.bench.cases import Expected
from jobs.bench.shapes import OPS, UNTIMED

TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Largest ||got - want|| / scale, for each output and gradient. Wider than the kernels' own tests: bf16 baselines round
the scores, and a core that drops a factor or a row is off by far more."""


def error_of(got: Tensor | None, want: Tensor, scale: float) -> float:
    """Return ||got - want|| / scale; a missing tensor, another shape and any NaN are infinitely wrong.

    Args:
        got: any shape, or None.
        want: fp64, the same shape.
        scale: what the error is measured against; absolute where it is 0.
    """
    if got is None or got.shape != want.shape:
        return float("inf")
    error = float((got.detach().double() - want).norm()) / (scale if scale > 1e-12 else 1.0)
    return float("inf") if error != error else error


def errors_of(got: Sequence[Tensor | None], want: Expected) -> dict[str, float]:
    """Return the error of each output and gradient by its name.

    Args:
        got: outputs, then gradients, shapes of those wanted; fewer where there is no backward.
        want: the fp64 values.
    """
    triples = zip(want.names, want.values, want.scales, strict=True)
    return {
        name: error_of(mine, value, scale) for mine, (name, value, scale) in zip(got, triples, strict=False)
    }


def verdict(errors: dict[str, float], tolerance: float) -> str:
    """Return why a contender gets no speed, or an empty string."""
    wrong = [f"{name} {error:.1e}" for name, error in errors.items() if not error <= tolerance]
    return f"wrong: {', '.join(wrong)} (allowed {tolerance:.0e})" if wrong else ""


@contextmanager
def poisoned(device: torch.device, expected_bytes: int) -> Iterator[None]:
    """Inside, memory that torch hands out holds NaN until it is written, as far as that can be arranged.

    On a CPU torch fills every empty tensor. On CUDA the allocator's free memory is filled once, on entry: the
    other way would change which kernels torch takes, and make it compile again.

    Args:
        device: where the tensors will be.
        expected_bytes: what will be allocated, about.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
        count = int(min(2 * expected_bytes, free // 2)) // 4
        blocks = [torch.full((size,), float("nan"), device=device) for size in (count, *[2**16] * 16) if size]
        del blocks
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def red_ops(junit: Path) -> dict[str, str]:
    """Return the operations whose tests do not allow a speed, with the reason.

    Args:
        junit: pytest's JUnit file of the kernels' tests on this machine. An operation needs a passed test in a file
            named after it, and none that failed there, or elsewhere under its name or under no kernel's.

    Raises:
        ValueError: there is no such file.
    """
    if not junit.exists():
        raise ValueError(f"--tests {junit}: there is no such file; write it with pytest --junitxml={junit}.")
    passed, failed = dict.fromkeys(OPS, 0), dict.fromkeys(OPS, 0)
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        where = f"{case.get('classname', '')} {case.get('file', '')}"
        if any(f"test_triton_{op}" in where for op in UNTIMED):
            continue
        outcomes = {child.tag for child in case}
        own = [op for op in OPS if f"test_{op}" in where or f"test_triton_{op}" in where]
        if outcomes & {"failure", "error"}:
            # Tests of the network or of all operators name the operation in their parameters, or mean every one.
            for op in own or [op for op in OPS if op in case.get("name", "")] or OPS:
                failed[op] += 1
        elif "skipped" not in outcomes:
            for op in own:
                passed[op] += 1
    red = {op: f"{failed[op]} of its tests failed ({junit.name})" for op in OPS if failed[op]}
    return red | {
        op: f"no test of it passed ({junit.name})" for op in OPS if not failed[op] and not passed[op]
    }
