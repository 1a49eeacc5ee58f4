"""Committed register counts of compiled kernels, one file a kernel: golden_registers/<kernel>.json.

`KERNEL_GOLDEN=write KMODE=dry pytest tests/kernels` (one process) writes what it finds instead of comparing.
"""

import json
import os
from pathlib import Path

import triton

FOLDER = Path(__file__).parent / "golden_registers"
TOLERANCE = 0.10
WRITE = os.environ.get("KERNEL_GOLDEN") == "write"


def check_registers(kernel: str, key: str, regs: int) -> None:
    """Compare with the committed count for this version of Triton; a count nobody committed is an error."""
    path = FOLDER / f"{kernel}.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    version = ".".join(triton.__version__.split("+")[0].split(".")[:3])
    if WRITE:
        table.setdefault(version, {})[key] = regs
        path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
        return
    assert version in table, (
        f"no golden registers for triton {version} in {path.name}; see tests/kernels/golden.py"
    )
    assert key in table[version], (
        f"{key} is not in {path.name} for triton {version}; see tests/kernels/golden.py"
    )
    expected = table[version][key]
    assert abs(regs - expected) <= TOLERANCE * expected, (
        f"{key}: {regs} registers, committed {expected} (tolerance {TOLERANCE:.0%}). Fewer is welcome, more costs "
        "occupancy: find out why, then write the table anew with KERNEL_GOLDEN=write."
    )
