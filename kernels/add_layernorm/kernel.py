"""Triton kernels of the residual addition with LayerNorm: every tensor is read once and written once."""

import triton
import triton.language as tl


@triton.jit
def forward_kernel(
    x_ptr: tl.tensor,
    a_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    y_ptr: tl.tensor,
    z_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_GATE: tl.constexpr,
) -> None:
    """Compute y = x + gate * a and z = LayerNorm(y), one row a program. Grid (N,).

    Pointers, all contiguous:
        x_ptr, y_ptr: [N, D], one dtype.
        a_ptr: [N, D].
        z_ptr: [N, D], dtype of the weight.
        weight_ptr, bias_ptr: [D].
        gate_ptr: [D]; unused without HAS_GATE.
        mean_ptr, rstd_ptr: fp32 [N], mean and 1 / sqrt(variance + eps) of the rows of y.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    real = column < D
    at = row * D + column
    y = tl.load(x_ptr + at, mask=real, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + at, mask=real, other=0.0).to(tl.float32)
    if HAS_GATE:
        a *= tl.load(gate_ptr + column, mask=real, other=0.0).to(tl.float32)
    # The norm sees the stream as it is stored, so that the backward, which reads it, sees the same.
    stored = (y + a).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + at, stored, mask=real)
    y = stored.to(tl.float32)
    mean = tl.sum(y) / D
    centred = tl.where(real, y - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred) / D + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    weight = tl.load(weight_ptr + column, mask=real, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=real, other=0.0).to(tl.float32)
    z = centred * rstd * weight + bias
    tl.store(z_ptr + at, z.to(z_ptr.dtype.element_ty), mask=real)


@triton.jit
def backward_kernel(
    dy_ptr: tl.tensor,
    dz_ptr: tl.tensor,
    y_ptr: tl.tensor,
    a_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    da_ptr: tl.tensor,
    partials_ptr: tl.tensor,
    rows: tl.tensor,
    rows_a_program: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_GATE: tl.constexpr,
    SEPARATE: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Gradients of the rows that this program owns, and its sums over them for the vectors. Grid (programs,).

    The next rows are on their way to shared memory while this one is worked on: a wide row leaves room for one
    program a processor alone, so nothing else would hide the latency.

    Pointers, all contiguous:
        dy_ptr, y_ptr, dx_ptr: [N, D], dtype of the stream.
        dz_ptr: [N, D], dtype of the weight.
        a_ptr: [N, D]; unused without HAS_GATE.
        weight_ptr: [D].
        gate_ptr: [D]; unused without HAS_GATE.
        mean_ptr, rstd_ptr: fp32 [N].
        da_ptr: [N, D] in the dtype of a; written with SEPARATE alone, where dx cannot stand for it.
        partials_ptr: fp32 [2 or 3, programs, D]: the sums for the weight, the bias and, with HAS_GATE, the gate.
    """
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    real = column < D
    weight = tl.load(weight_ptr + column, mask=real, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_D], tl.float32)
    dbias = tl.zeros([BLOCK_D], tl.float32)
    dgate = tl.zeros([BLOCK_D], tl.float32)
    first = program * rows_a_program
    last = tl.minimum(first + rows_a_program, rows)
    for row in tl.range(first, last, num_stages=STAGES):
        at = row * D + column
        dy = tl.load(dy_ptr + at, mask=real, other=0.0).to(tl.float32)
        dz = tl.load(dz_ptr + at, mask=real, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + at, mask=real, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        normed = tl.where(real, (y - tl.load(mean_ptr + row)) * rstd, 0.0)
        dweight += dz * normed
        dbias += dz
        if SEPARATE:  # two more results take registers: read the weight again instead of keeping it
            weight = tl.load(weight_ptr + column, mask=real, other=0.0).to(tl.float32)
        dnormed = dz * weight
        along = tl.sum(dnormed * normed) / D
        shift = tl.sum(dnormed) / D
        dx = dy + rstd * (dnormed - normed * along - shift)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=real)
        if HAS_GATE:
            dgate += tl.where(real, dx * tl.load(a_ptr + at, mask=real, other=0.0).to(tl.float32), 0.0)
            dx *= tl.load(gate_ptr + column, mask=real, other=0.0).to(tl.float32)  # to spare registers
        if SEPARATE:
            tl.store(da_ptr + at, dx.to(da_ptr.dtype.element_ty), mask=real)
    part = partials_ptr + program * D + column
    stride = tl.num_programs(0).to(tl.int64) * D
    tl.store(part, dweight, mask=real)
    tl.store(part + stride, dbias, mask=real)
    if HAS_GATE:
        tl.store(part + 2 * stride, dgate, mask=real)
