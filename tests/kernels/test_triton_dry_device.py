"""The dry device tells the truth about kernels whose figures are known beforehand."""

import pytest
import torch
import triton
import triton.language as tl

from kernels.perceiver_attn import op as perceiver_attn
from kernels.perceiver_attn.tiles import Tiles
from kernels.testing.dry import ARCHITECTURES, OutOfResources, dry, odd_descriptors

pytestmark = pytest.mark.modes("dry")


@triton.jit
def _product(a, b, out, stride, N: tl.constexpr):
    rows = tl.arange(0, N)
    at = rows[:, None] * stride + rows[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def _chain(a, out, stride, steps, N: tl.constexpr):
    rows = tl.arange(0, N)
    at = rows[:, None] * stride + rows[None, :]
    total = tl.zeros((N, N), tl.float32)
    for step in range(steps):
        total += tl.dot(tl.load(a + at + step * N), tl.load(a + at + step * N * stride))
    tl.store(out + at, total)


@triton.jit
def _double(x, out, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at) * 2)


def product(n: int, dtype: torch.dtype, offset: int = 0) -> None:
    flat = torch.empty(2 * n * n + 8, dtype=dtype, device="meta")
    a, out = flat[offset : offset + n * n].view(n, n), torch.empty(n, n, device="meta")
    _product[(1,)](a, a, out, n, N=n, num_warps=4)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tensor_cores_of_each_architecture(arch):
    with dry(arch) as device:
        product(64, torch.bfloat16)
    (record,) = device.records
    assert (record.name, record.arch, record.config["N"]) == ("_product", arch, 64)
    assert [record.hmma > 0, record.hgmma > 0, record.umma > 0] == [arch == 80, arch == 90, arch == 100]
    assert record.wide_loads > 0
    if arch != 100:  # there ptxas parks 8 bytes even for this; the project's kernels find a way around it
        assert not record.spills
    assert record.smem > 0


def test_register_spills_are_seen():
    with dry(80) as device:
        _product[(1,)](*[torch.empty(64, 64, device="meta")] * 3, 64, N=64, num_warps=4, maxnreg=40)
    assert device.records[0].spills


def test_too_much_shared_memory_raises_as_on_a_gpu():
    a, out = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta"), torch.empty(64, 64, device="meta")
    with dry(80), pytest.raises(OutOfResources, match="shared memory"):
        _chain[(1,)](a, out, 4096, 64, N=64, num_stages=12)


def test_a_kernel_compiled_before_is_recorded_again():
    x = torch.empty(1 << 20, device="meta")
    for _ in range(2):
        with dry(90) as device:
            _double[(64, 2)](x, x, BLOCK=1024)
            _double[(32,)](x, x, BLOCK=1024)
        assert [launch.grid for launch in device.launches] == [(64, 2, 1), (32, 1, 1)]
        assert len(device.records) == 1
        assert device.records[0].signature == {"x": "*fp32", "out": "*fp32"}


def test_the_driver_of_before_is_restored_even_after_an_error():
    before = triton.runtime.driver._active
    with pytest.raises(ZeroDivisionError), dry(90):
        raise ZeroDivisionError
    assert triton.runtime.driver._active is before


def test_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="90"), dry(70):
        pass


SOUND = """
        /*10a0*/                   UMOV UR5, URZ ;
        /*10b0*/                   UIADD3 UR6, UP0, UR6, 0x40, URZ ;
        /*10c0*/                   UIADD3.X UR7, UR5, -0x7fffffe0, URZ, UP0, !UPT ;
        /*10d0*/                   UIADD3.X UR9, URZ, UR9, URZ, UP0, !UPT ;
        /*10e0*/              @P0  UIADD3.X UR19, UR7, URZ, URZ, UP0, !UPT ;
"""


def test_an_address_on_a_register_that_is_zero_by_chance_is_odd():
    assert odd_descriptors(SOUND) == []
    for writer in (
        "S2UR UR5, SR_CTAID.Z",
        "USHF.R.U32.HI UR5, URZ, 0x4, UR43",
        "UIADD3.64 UR4, UR4, UR8, URZ",
    ):
        (found,) = odd_descriptors(SOUND.replace("UMOV UR5, URZ", writer))
        assert found.startswith("UIADD3.X UR7, UR5, -0x7fffffe0")
    assert len(odd_descriptors(SOUND.replace("UMOV UR5, URZ", "UMOV UR6, URZ"))) == 1


def test_the_tile_that_read_illegal_addresses_on_an_h200_is_odd(monkeypatch):
    tile = Tiles(rows=64, keys=64, parts=(64, 32), warps=4, stages=1)
    monkeypatch.setattr(perceiver_attn, "forward_tiles", lambda *_: tile)
    q, kv = (torch.empty(1, rows, 16, 96, dtype=torch.bfloat16, device="meta") for rows in (64, 100))
    with dry(90) as device:
        perceiver_attn.launch_forward(q, kv, kv, q, q, None, 0)
    assert device.records[0].odd_descriptors > 0
