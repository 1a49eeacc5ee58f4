"""The dry device: ordinary kernel launches compile for a GPU that is not there, and are not run.

A stand-in for Triton's driver. The project's own wrappers choose dtypes, strides, alignment and tiles, so what is
compiled is what a GPU would get; meta tensors allow the shapes of the largest network. Each launch is recorded with
the figures of its binary (registers, spills, shared memory, tensor-core instructions, width of loads), read with the
tools in Triton's own wheel. Outputs are left as they were allocated: look at launches, never at values.

It leans on internals of Triton that are the same in 3.6 and 3.7; the tests run on both.
"""

import contextlib
import itertools
import re
import subprocess
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.errors import CompilationError
from triton.runtime.driver import driver
from triton.runtime.errors import OutOfResources

__all__ = [
    "ARCHITECTURES",
    "CompilationError",
    "DryDriver",
    "Launch",
    "OutOfResources",
    "Record",
    "dry",
    "odd_descriptors",
]

SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes of shared memory that one block may have, by architecture."""

ARCHITECTURES = tuple(SHARED_MEMORY)
"""Architectures that the dry device can stand for: A100, H100 and H200, B200."""

PROCESSORS = 132
"""Streaming multiprocessors that the dry device claims to have."""

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

_INSTRUCTIONS = {
    "hgmma": r"\bHGMMA\.",  # wgmma, sm_90
    "hmma": r"\bHMMA\.",  # mma.sync, sm_80 and small tiles elsewhere
    "umma": r"\bUTC\w*MMA",  # tcgen05.mma, sm_100
    "local_ops": r"\b(?:LDL|STL)\b",  # spills
    "wide_loads": r"\b(?:LDG\.E\S*\.128|LDGSTS\S*\.128|UTMALDG|UBLKCP)",
    "async_loads": r"\b(?:LDGSTS|UTMALDG|UBLKCP)\b",
    "wide_stores": r"\b(?:STG\.E\S*\.128|UTMASTG)",
    "atomics": r"\b(?:ATOMG|RED\.E|ATOM\.E)",
}


@dataclass(frozen=True, kw_only=True)
class Record:
    """Figures of one compiled kernel: one specialisation on dtypes, alignment and compile-time arguments."""

    name: str
    """Name of the kernel's function."""
    arch: int
    """Architecture it is compiled for, 10 * major + minor."""
    config: dict[str, Any]
    """Compile-time arguments by name, with `num_warps` and `num_stages`."""
    signature: dict[str, str]
    """Types of the run-time arguments by name, as Triton writes them."""
    regs: int
    """Registers of a thread."""
    stack: int
    """Bytes of local memory of a thread: spills, or arrays that are indexed at run time."""
    smem: int
    """Bytes of shared memory of a block."""
    hgmma: int
    """wgmma instructions (sm_90)."""
    hmma: int
    """mma.sync instructions."""
    umma: int
    """tcgen05.mma instructions (sm_100)."""
    local_ops: int
    """Loads from and stores to local memory."""
    wide_loads: int
    """Loads of 128 bits a thread, asynchronous ones included."""
    async_loads: int
    """Loads that go to shared memory without passing through registers."""
    wide_stores: int
    """Stores of 128 bits a thread."""
    atomics: int
    """Atomic operations on global memory."""
    odd_descriptors: int
    """Addresses of wgmma operands that are put together from a register that nothing set to zero, see
    `odd_descriptors`: with the ptxas of Triton 3.6 and 3.7, wrong results or an illegal address on an H100."""

    @property
    def tensor_core_ops(self) -> int:
        """Tensor-core instructions of any generation."""
        return self.hgmma + self.hmma + self.umma

    @property
    def spills(self) -> bool:
        """Whether anything lies in local memory: not a byte of it is used by the kernels here."""
        return self.stack > 0 or self.local_ops > 0


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch that a GPU would have run."""

    record: Record
    grid: tuple[int, int, int]
    args: tuple[Any, ...]
    """Run-time and compile-time arguments in the order of the kernel's parameters."""


_compiled: dict[int, Record] = {}
"""Every kernel that any dry device of this process compiled, by the handle that its launches carry."""

_handles = itertools.count(1)


class _Utils:
    """What Triton calls to load a binary and to learn about the device."""

    def __init__(self, owner: "DryDriver") -> None:
        self._owner = owner

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Return the properties that Triton asks for."""
        return {
            "max_shared_mem": SHARED_MEMORY[self._owner.arch],
            "max_num_regs": 65536,
            "multiprocessor_count": PROCESSORS,
            "warpSize": 32,
        }

    def load_binary(
        self, name: str, cubin: bytes, shared: int, device: int
    ) -> tuple[int, int, int, int, int]:
        """Record the figures of `cubin` and return (module, function, registers, spills, most threads)."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
            code = _tool("nvdisasm", "-c", file.name)
        regs, stack = (_number(rf"\b{key}:(\d+)", usage) for key in ("REG", "STACK"))
        counts = {key: len(re.findall(pattern, code)) for key, pattern in _INSTRUCTIONS.items()}
        handle = next(_handles)
        config, signature = self._owner.pending
        _compiled[handle] = Record(
            name=name,
            arch=self._owner.arch,
            config=config,
            signature=signature,
            regs=regs,
            stack=stack,
            smem=shared,
            odd_descriptors=len(odd_descriptors(code)),
            **counts,
        )
        return 0, handle, regs, stack, 1024


_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s+(.*?)\s*;")
_UNIFORM = re.compile(r"UR(\d+)")


def odd_descriptors(code: str) -> list[str]:
    """Return the instructions that add the upper half of a wgmma descriptor to a register that need not be zero.

    A 64-bit descriptor holds an operand's place in shared memory below, swizzle and stride above. Its sum is two
    instructions, and the second, `UIADD3.X d, a, upper half, URZ, carry`, needs `a` to be zero: it is sound after
    `UMOV a, URZ`. ptxas 12.8 also takes a register that is known to be zero where the code stands, such as
    the number of a share after `if share == 0`, and then uses that register for the operand's place as well: the
    product reads other memory. Seen on an H200 and, after that, in the binary; so what is not sound is counted.

    Args:
        code: SASS as nvdisasm writes it.
    """
    written: dict[str, str] = {}
    odd = []
    for operation, operands in _LINE.findall(code):
        target, *sources = (part.strip() for part in operands.split(","))
        if operation == "UIADD3.X" and any(_is_upper_half(source) for source in sources):
            registers = [source for source in sources if _UNIFORM.fullmatch(source)]
            if any(written.get(register) != "UMOV URZ" for register in registers):
                odd.append(f"{operation} {operands}")
        found = _UNIFORM.fullmatch(target)
        if found and operation.startswith(("U", "R2UR", "S2UR")):
            written[target] = " ".join([operation, *sources])
            if ".64" in operation or ".WIDE" in operation:
                written[f"UR{int(found[1]) + 1}"] = operation
    return odd


def _is_upper_half(operand: str) -> bool:
    """Whether an immediate operand has a swizzle in its two highest bits."""
    if re.fullmatch(r"-?0x[0-9a-f]{8}", operand) is None:
        return False
    return (int(operand, 16) & 0xFFFFFFFF) >> 30 != 0


class DryDriver:
    """Stands in for Triton's driver; `launches` holds what was launched while it was active."""

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.launches: list[Launch] = []
        self.utils = _Utils(self)
        self.pending: tuple[dict[str, Any], dict[str, str]] = ({}, {})

    @property
    def records(self) -> list[Record]:
        """Figures of the kernels that were launched, each once, in the order of their first launch."""
        return list({id(launch.record): launch.record for launch in self.launches}.values())

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        """Return what Triton calls for each launch of a kernel; it calls `load_binary` right after this."""
        names = src.fn.arg_names
        config = {names[path[0]]: value for path, value in src.constants.items() if len(path) == 1}
        config.update(num_warps=metadata.num_warps, num_stages=metadata.num_stages)
        signature = {name: kind for name, kind in src.signature.items() if kind != "constexpr"}
        self.pending = (config, signature)

        def launch(x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            # packed metadata, launch metadata and two hooks come before the kernel's own arguments. A kernel
            # that an earlier dry device compiled is launched through this closure too: ask who is active now.
            active = driver.active
            assert isinstance(active, DryDriver), "a dry kernel was launched outside of `dry()`"
            active.launches.append(Launch(record=_compiled[function], grid=(x, y, z), args=tuple(rest[4:])))

        return launch

    def get_current_target(self) -> GPUTarget:
        """Return what to compile for."""
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        """Return the architecture: Triton keeps a cache of kernels for each device index."""
        return self.arch

    def set_current_device(self, device: int) -> None:
        """Do nothing."""

    def get_current_stream(self, device: int) -> int:
        """Return the default stream."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Return where tensors are."""
        return torch.device("cpu")

    def get_device_interface(self) -> types.SimpleNamespace:
        """Return what stands for `torch.cuda`."""
        return types.SimpleNamespace(synchronize=lambda *args: None)

    def map_python_to_cpp_type(self, kind: str) -> str:
        """Return the type unchanged: there is no launcher in C."""
        return kind

    def get_benchmarker(self) -> Callable[..., Sequence[float]]:
        """Return a benchmark that runs (compiles) its subject once and finds all equal."""

        def benchmark(call: Callable[[], Any], quantiles: Any = None, **_: Any) -> Sequence[float]:
            call()
            return [1.0, 1.0, 1.0]

        return benchmark

    def get_empty_cache_for_benchmark(self) -> None:
        """Return no cache."""

    def clear_cache(self, cache: None) -> None:
        """Do nothing."""


@contextlib.contextmanager
def dry(arch: int = 90) -> Iterator[DryDriver]:
    """Let launches compile for `arch` instead of running, on CPU and meta tensors, inside the block.

    The driver that was active before, or none, is restored afterwards. Autograd's backward must be called inside
    the block too.

    Args:
        arch: 10 * major + minor of the compute capability, one of `ARCHITECTURES`.

    Raises:
        ValueError: an architecture whose limits are not known here.
        RuntimeError: Triton interprets in this process.
        OutOfResources: (inside the block) a kernel needs more shared or tensor memory than a block may have.
    """
    if arch not in SHARED_MEMORY:
        raise ValueError(f"arch={arch} is not known; choose one of {ARCHITECTURES}, or add its limits.")
    if triton.knobs.runtime.interpret:
        raise RuntimeError("the dry device compiles; run it in a process without TRITON_INTERPRET.")
    before, device = driver._active, DryDriver(arch)
    driver.set_active(device)
    try:
        yield device
    finally:
        driver._active = before


def _tool(name: str, *arguments: str) -> str:
    """Run one of the tools in Triton's wheel and return what it prints."""
    done = subprocess.run([str(_BIN / name), *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def _number(pattern: str, text: str) -> int:
    """Return the number that `pattern` finds."""
    found = re.search(pattern, text)
    assert found is not None, f"cuobjdump printed nothing like {pattern}:\n{text}"
    return int(found[1])
