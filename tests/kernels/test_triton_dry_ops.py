"""What the wrappers launch on a GPU: resources of the compiled kernels at the recipes' shapes.

Outputs are never looked at: nothing runs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch

from kernels.add_layernorm import op as add_layernorm
from kernels.conv_epilogue import op as conv_epilogue
from kernels.gated_relu2 import op as gated_relu2
from kernels.gated_xattn import op as gated_xattn
from kernels.perceiver_attn import op as perceiver_attn
from kernels.row_fp8 import op as row_fp8
from kernels.testing.dry import ARCHITECTURES, SHARED_MEMORY, Launch, Record, dry
from tests.kernels.golden import check_registers

pytestmark = pytest.mark.modes("dry")

F32, BF16 = torch.float32, torch.bfloat16
SHORT = {F32: "fp32", BF16: "bf16"}
GRID_LIMIT = 65535
"""Most programs along the second and third axis of a grid."""


def check_record(record: Record, key: str) -> None:
    """Hold a kernel to what every kernel has to keep."""
    assert record.smem <= SHARED_MEMORY[record.arch]
    assert not record.spills, (
        f"{record.name}: {record.stack} bytes of stack, {record.local_ops} local accesses"
    )
    assert record.atomics == 0, "an atomic addition makes sums depend on the order of programs"
    assert record.odd_descriptors == 0, "a wgmma operand may be read from the wrong place"
    check_registers(
        key.split("-")[0], f"{key}-{record.name.removesuffix('_kernel')}-sm{record.arch}", record.regs
    )


def check_grids(launches: Sequence[Launch]) -> None:
    assert launches
    assert all(launch.grid[1] <= GRID_LIMIT and launch.grid[2] <= GRID_LIMIT for launch in launches)


def launch_perceiver(
    n: int, r: int, j: int, h: int, k: int, dtype: torch.dtype, *, layers: int = 1, masked: bool = False
) -> None:
    """Forward and backward on keys and values as the network has them: views of one projection's output."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    q, latents, features = empty(n, r, h, k), empty(n, r, 2, h, k), empty(n, j, 2 * layers, h, k)
    mask = torch.empty(n, j, dtype=torch.bool, device="meta") if masked else None
    inputs = (q, features[:, :, 0], features[:, :, 1], latents[:, :, 0], latents[:, :, 1], mask)
    out, lse = perceiver_attn.launch_forward(*inputs, 0)
    perceiver_attn.launch_backward(out, *inputs, out, lse, 0)


# Media, latents, features, heads, head width. The resampler is the same in the 3B, 9B and 80B recipes, with the heads
# that table 5 counts; the paper's text, IDEFICS and what was measured have heads of 96.
PERCEIVER = {
    "smoke": (8, 8, 64, 4, 16),
    "paper": (320, 64, 100, 16, 96),
    "recipes": (320, 64, 100, 16, 128),
}
PERCEIVER_WIDE = {
    "latents128": (64, 128, 800, 16, 96),
    "head64": (64, 64, 800, 8, 64),
    "head80": (64, 64, 800, 16, 80),
    "head128": (64, 64, 800, 16, 128),
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", SHORT, ids=SHORT.get)
@pytest.mark.parametrize("shape", PERCEIVER)
def test_perceiver_attn_at_the_recipes_shapes(shape, dtype, arch):
    with dry(arch) as device:
        launch_perceiver(*PERCEIVER[shape], dtype)
    check_grids(device.launches)
    forward, backward = device.records
    for record in (forward, backward):
        check_record(record, f"perceiver_attn-{shape}-{SHORT[dtype]}")
        assert record.tensor_core_ops > 0
        if shape != "smoke":
            assert record.wide_loads > 0
            assert record.wide_stores > 0
    if shape != "smoke" and arch == 90 and dtype == BF16:
        assert forward.hgmma > 0
        assert forward.hmma == 0
        assert backward.hgmma > 0
        assert backward.hmma == 0


@pytest.mark.parametrize(
    ("shape", "arch"), [*((shape, 90) for shape in PERCEIVER_WIDE), ("latents128", 80), ("head64", 80)]
)
def test_perceiver_attn_at_other_widths(shape, arch):
    with dry(arch) as device:
        launch_perceiver(*PERCEIVER_WIDE[shape], BF16)
    for record in device.records:
        check_record(record, f"perceiver_attn-{shape}-bf16")
        assert (record.hgmma if arch == 90 else record.hmma) > 0
        assert record.wide_loads > 0


def test_perceiver_attn_of_one_long_video_fills_the_machine():
    with dry(90) as device:
        launch_perceiver(1, 64, 30 * 225, 16, 96, BF16, masked=True)
    forward, combine, backward = device.launches
    assert forward.grid == backward.grid == (16, 1, 13)
    assert combine.grid == (64, 1, 1)
    for launch in device.launches:
        check_record(launch.record, "perceiver_attn-video-bf16")


def test_perceiver_attn_on_keys_shared_by_layers_keeps_wide_loads():
    with dry(90) as device:
        launch_perceiver(320, 64, 100, 16, 96, BF16, layers=6)
    assert all(record.wide_loads > 10 for record in device.records)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", SHORT, ids=SHORT.get)
@pytest.mark.parametrize("gated", [True, False], ids=["gate", "no gate"])
def test_gated_relu2(gated, dtype, arch):
    """One specialisation serves every size; the largest hidden layer has more than 2^31 bytes."""
    gate = torch.empty((), dtype=dtype, device="meta") if gated else None
    with dry(arch) as device:
        for rows, width in (
            (64 * 256, 4 * 8192),
            (64 * 256, 4 * 4096),
            (8 * 2048, 4 * 2048),
            (320 * 64, 4 * 1536),
        ):
            u = torch.empty(rows, width, dtype=dtype, device="meta")
            gated_relu2.launch_forward(u, gate)
            gated_relu2.launch_backward(u, u, gate)
    check_grids(device.launches)
    assert device.launches[0].grid == (64 * 256 * 4 * 8192 // gated_relu2.BLOCK, 1, 1)
    assert len(device.records) == 2
    for record in device.records:
        check_record(record, f"gated_relu2-{'gate' if gated else 'plain'}-{SHORT[dtype]}")
        assert record.wide_loads > 0
        assert record.wide_stores > 0
        assert record.regs <= 64, "more would leave room for too few programs to hide the memory's latency"


# Images, channels, side: from the stem to the last grid of NFNet-F6 at 320 pixels, and one of more than 2^31 elements.
GRIDS = ((64, 16, 160), (64, 128, 80), (64, 256, 80), (160, 1536, 20), (16, 3072, 10), (4096, 256, 80))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", SHORT, ids=SHORT.get)
def test_conv_epilogue(dtype, arch):
    with dry(arch) as device:
        for images, channels, side in GRIDS:
            shape = (images, channels, side, side)
            grid = torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)
            vector = torch.empty(channels, dtype=dtype, device="meta")
            gate = torch.empty(images, channels, dtype=dtype, device="meta")
            conv_epilogue.launch_bias_gelu(grid, vector)
            conv_epilogue.launch_gated_residual(grid, vector, grid, vector, gate, activate=True)
            conv_epilogue.launch_gated_residual(grid, None, grid, vector, gate, activate=True)
            conv_epilogue.launch_gated_residual(grid, None, grid, vector, gate, activate=False)
    check_grids(device.launches)
    assert device.launches[-1].grid == (4096 * 80 * 80 // 32 * 2, 1, 1)
    for record in device.records:
        config = record.config
        pieces = [
            f"columns{config['COLUMNS']}",
            *(["bias"] if config.get("HAS_RESIDUAL_BIAS") else []),
            *(["activated"] if config.get("ACTIVATE") else []),
            SHORT[dtype],
        ]
        check_record(record, "conv_epilogue-" + "-".join(pieces))
        assert record.wide_loads > 0
        assert record.wide_stores > 0
        assert record.regs <= 64, "more would leave room for too few programs to hide the memory's latency"


# Widths that frozen layers of the recipes read and write, cut by tensor parallelism or not: 64 is the smoke recipe's,
# 2048 to 32768 are Chinchilla's streams and hidden layers from 3B to 80B, 28672 the hidden layer of LLaMA 70B.
ROWS = [
    *((width, BF16, 90) for width in (64, 2048, 8192, 28672, 32768)),
    *((width, BF16, 100) for width in (2048, 32768)),
    (32768, F32, 90),
]


@pytest.mark.parametrize(("width", "dtype", "arch"), ROWS, ids=str)
def test_row_fp8(width, dtype, arch):
    assert arch >= row_fp8.FIRST_ARCH
    with dry(arch) as device:
        x = torch.empty(64 * 2048, width, dtype=dtype, device="meta")
        row_fp8.launch(x, None)
        row_fp8.launch(x, torch.empty(width, device="meta"))
    check_grids(device.launches)
    assert device.launches[0].grid == (64 * 2048, 1, 1)
    for record, kind in zip(device.records, ("plain", "factor"), strict=True):
        check_record(record, f"row_fp8-{width}-{kind}-{SHORT[dtype]}")
        assert record.regs * 32 * record.config["num_warps"] <= 65536
        if width >= 2048:
            assert record.wide_loads > 0
            assert record.wide_stores > 0


NORM_DTYPES = {"bf16": (BF16, BF16), "fp32": (F32, F32), "stream32": (F32, BF16)}
# 1536: the resampler; 2048, 4096, 8192: the 3B, 9B and 80B language models; 64: smoke.
NORM_CASES = [
    *((width, name, arch) for width in (1536, 8192) for name in ("bf16", "fp32") for arch in ARCHITECTURES),
    *((width, "bf16", 90) for width in (2048, 4096)),
    *((width, "stream32", 90) for width in (1536, 8192)),
    (64, "fp32", 90),
]


@pytest.mark.parametrize(("width", "name", "arch"), NORM_CASES, ids=str)
def test_add_layernorm(width, name, arch):
    launch_norm(width, name, arch, gated=False)


@pytest.mark.parametrize(("name", "arch"), [("bf16", 90), ("fp32", 80), ("stream32", 100)])
def test_add_layernorm_with_a_gate(name, arch):
    launch_norm(add_layernorm.MAX_GATED_WIDTH, name, arch, gated=True)


def launch_norm(width: int, name: str, arch: int, *, gated: bool) -> None:
    stream, branch = NORM_DTYPES[name]
    rows = 64 * 256
    x, a = (torch.empty(rows, width, dtype=dtype, device="meta") for dtype in (stream, branch))
    vector = torch.empty(width, dtype=branch, device="meta")
    gate = vector if gated else None
    with dry(arch) as device:
        y, z, mean, rstd = add_layernorm.launch_forward(x, a, vector, vector, gate, 1e-5)
        add_layernorm.launch_backward(y, z, y, a, vector, gate, mean, rstd)
    check_grids(device.launches)
    for record in device.records:
        check_record(record, f"add_layernorm-{width}{'-gate' * gated}-{name}")
        assert record.regs * 32 * record.config["num_warps"] <= 65536
        if width >= 1536:
            assert record.wide_loads > 0
            assert record.wide_stores > 0


def test_every_launch_is_on_the_device_of_its_tensors(monkeypatch):
    """Tensors on a GPU that is not the current one: without the guard a kernel runs on the current one's stream."""
    guarded = 0

    @contextmanager
    def guard(_: torch.Tensor) -> Iterator[None]:
        nonlocal guarded
        before = len(device.launches)
        yield
        guarded += len(device.launches) - before

    monkeypatch.setattr(torch.cuda, "device_of", guard)
    x, vector = torch.empty(4, 64, dtype=BF16, device="meta"), torch.empty(64, dtype=BF16, device="meta")
    q, k = torch.empty(1, 64, 2, 16, device="meta"), torch.empty(2, 8, 2, 16, device="meta")
    features = torch.empty(1, 2048, 2, 16, device="meta")
    with dry(90) as device:
        y, z, mean, rstd = add_layernorm.launch_forward(x, x, vector, vector, None, 1e-5)
        add_layernorm.launch_backward(y, z, y, x, vector, None, mean, rstd)
        gated_relu2.launch_backward(gated_relu2.launch_forward(x, None), x, None)
        image = torch.empty(1, 16, 4, 4, device="meta", memory_format=torch.channels_last)
        row_fp8.launch(x, None)
        conv_epilogue.launch_bias_gelu(image, vector[:16])
        conv_epilogue.launch_gated_residual(image, None, image, vector[:16], vector[None, :16], activate=True)
        spans = gated_xattn.media_spans(torch.empty(1, 64, dtype=torch.int64, device="meta"), 2)
        out = gated_xattn.forward(q, k, k, spans, None)
        gated_xattn.backward(out, q, k, k, spans, None, chunks=2)
        inputs = (k, features.expand(2, -1, -1, -1), features.expand(2, -1, -1, -1), k, k, None)
        out, lse = perceiver_attn.launch_forward(*inputs, 0)
        perceiver_attn.launch_backward(out, *inputs, out, lse, 0)
    names = {launch.record.name for launch in device.launches}
    assert {"combine_kernel", "sum_chunks", "media_spans", "xattn_forward", "xattn_backward"} <= names
    assert guarded == len(device.launches) >= 15
