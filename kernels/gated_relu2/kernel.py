"""Triton kernels of the gated squared ReLU: one pass forward, one backward, 128 bits a thread and access."""

import triton
import triton.language as tl


@triton.jit
def forward_kernel(
    u_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    h_ptr: tl.tensor,
    numel: tl.tensor,
    HAS_GATE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Compute h = gate * relu(u)^2. Grid (cdiv(numel, BLOCK),).

    Pointers:
        u_ptr, h_ptr: [numel], contiguous, one dtype.
        gate_ptr: one element, any floating dtype; unused without HAS_GATE.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = at < numel
    positive = tl.maximum(tl.load(u_ptr + at, mask=real, other=0.0).to(tl.float32), 0.0)
    h = positive * positive
    if HAS_GATE:
        h *= tl.load(gate_ptr).to(tl.float32)
    tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=real)


@triton.jit
def backward_kernel(
    u_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    dh_ptr: tl.tensor,
    du_ptr: tl.tensor,
    dgate_ptr: tl.tensor,
    numel: tl.tensor,
    HAS_GATE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Compute du = 2 * gate * relu(u) * dh, and this block's part of dgate = sum of relu(u)^2 * dh.

    Grid (cdiv(numel, BLOCK),). Pointers:
        u_ptr, dh_ptr, du_ptr: [numel], contiguous, one dtype.
        gate_ptr: one element, any floating dtype; unused without HAS_GATE.
        dgate_ptr: fp32 [cdiv(numel, BLOCK)], one partial sum a program; unused without HAS_GATE.
    """
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    real = at < numel
    positive = tl.maximum(tl.load(u_ptr + at, mask=real, other=0.0).to(tl.float32), 0.0)
    dh = tl.load(dh_ptr + at, mask=real, other=0.0).to(tl.float32)
    scaled = positive * dh
    if HAS_GATE:
        tl.store(dgate_ptr + block, tl.sum(scaled * positive))
        scaled *= tl.load(gate_ptr).to(tl.float32)
    tl.store(du_ptr + at, (2.0 * scaled).to(du_ptr.dtype.element_ty), mask=real)
