"""The wrappers of gated cross-attention compile for GPUs that are not here, and the binaries are as they should be."""

import pytest
import torch

from kernels.gated_xattn import op
from kernels.testing.dry import ARCHITECTURES, SHARED_MEMORY, Launch, dry
from tests.kernels.golden import check_registers

pytestmark = pytest.mark.modes("dry")

B, T, M = 8, 2048, 32
SHAPES = {  # heads, width, latents
    "smoke": (4, 16, 8),
    "3B": (16, 128, 64),
    "9B": (32, 128, 64),
    "80B": (64, 128, 64),
}
# Heads in two parts are the ones that spill: on every architecture.
WIDTHS = [(64, 90), (128, 90), *((width, arch) for width in (80, 96) for arch in ARCHITECTURES)]


def launches(
    arch: int, heads: int, width: int, latents: int, dtype: torch.dtype, batch: int = B, media: int = M
) -> list[Launch]:
    """What forward and backward launch for tensors laid out as the network has them."""
    q = torch.empty(T, batch, heads, width, dtype=dtype, device="meta").transpose(0, 1)
    k, v = torch.empty(2, batch * media, latents, heads, width, dtype=dtype, device="meta")
    index = torch.empty(batch, T, dtype=torch.int32, device="meta")
    gate = torch.empty((), dtype=dtype, device="meta")
    with dry(arch) as device:
        spans = op.media_spans(index, media)
        out = op.forward(q, k, v, spans, gate)
        op.backward(out, q, k, v, spans, gate)
    return device.launches


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_full_size(arch, shape, dtype):
    heads, width, latents = SHAPES[shape]
    found = launches(arch, heads, width, latents, dtype)
    # 64 rows an image: on sm_90 those of at most a tile have a backward kernel of their own.
    short = ["xattn_backward_short"] * (arch == 90 and dtype == torch.bfloat16 and shape != "smoke")
    names = [launch.record.name for launch in found]
    assert names == ["media_spans", "xattn_forward", *short, "xattn_backward"]
    assert {launch.grid[:2] for launch in found[1:]} == {(heads, B * M)}
    for launch in found[1:]:
        gate(launch, f"{shape}")
    if short:
        assert programs_at_once(found[2].record) >= 3, "what a kernel of its own is for"
        alone = launches(arch, heads, width, latents, dtype, media=M // 4)
        assert [launch.record.name for launch in alone] == ["media_spans", "xattn_forward", "xattn_backward"]
        gate(alone[2], f"{shape}, long images alone")


@pytest.mark.parametrize("latents", [16, 64, 128])
@pytest.mark.parametrize(("width", "arch"), WIDTHS)
def test_widths_and_latents(width, arch, latents):
    for launch in launches(arch, 8, width, latents, torch.bfloat16)[1:]:
        gate(launch, f"K{width} R{latents}")


@pytest.mark.parametrize("width", [80, 96, 128])
def test_few_latents(width):
    """17 to 32 of them: the tiles of 64 spilled 32 to 288 bytes."""
    for launch in launches(90, 8, width, 32, torch.bfloat16)[1:]:
        gate(launch, f"K{width} R32")


def gate(launch: Launch, label: str) -> None:
    record, half = launch.record, launch.record.signature["q"] != "*fp32"
    assert max(launch.grid[1:]) <= 65535
    assert record.smem <= SHARED_MEMORY[record.arch]
    assert record.stack == record.local_ops == 0, record
    config = record.config
    if min(config["BLOCK_M"], config["BLOCK_R"]) * config["K1"] >= 8 * 32 * config["num_warps"]:
        assert record.wide_loads > 0
        assert record.wide_stores > 0
    assert record.atomics == 0
    assert record.odd_descriptors == 0, "a wgmma operand may be read from the wrong place"
    if half:
        assert record.tensor_core_ops > 0
        # A tile of 64 rows or more gets the architecture's own instruction, a smaller one mma.sync.
        if config["BLOCK_M"] >= 64 and config["BLOCK_R"] >= 64:
            assert {80: record.hmma, 90: record.hgmma, 100: record.umma}[record.arch] > 0
        if label in ("3B", "9B", "80B"):
            assert programs_at_once(record) >= 2, (
                "one program's loads have to overlap with another's arithmetic"
            )
    else:
        assert record.tensor_core_ops == 0, "fp32 is exact unless the user allows TF32"
    check_registers(
        "gated_xattn", f"sm_{record.arch} {record.name} {record.signature['q'][1:]} {label}", record.regs
    )


def programs_at_once(record) -> int:
    """How many programs registers and shared memory let share a processor."""
    registers = 65536 // (-(-record.regs // 8) * 8 * 32 * record.config["num_warps"])
    return min(registers, (SHARED_MEMORY[record.arch] + 1024) // (record.smem + 1024))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_few_images_share_their_spans_among_programs(arch):
    found = launches(arch, 4, 128, 64, torch.bfloat16, batch=1)
    names = [launch.record.name for launch in found]
    assert names == ["media_spans", "xattn_forward", "xattn_backward", "sum_chunks", "sum_chunks"]
    assert [launch.grid for launch in found[1:3]] == [(4, M, 3)] * 2
    gate(found[1], "shared spans")
    gate(found[2], "shared spans")


def test_tf32_where_the_user_allows_it():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        found = launches(90, 16, 64, 64, torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)
    assert found[1].record.tensor_core_ops > 0
