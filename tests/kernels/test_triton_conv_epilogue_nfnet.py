"""NFNet on the kernels gives what it gives on torch's operators."""

import pytest
import torch
from torch import Tensor

from flamingo_dist.models.vision import VisionConfig, VisionEncoder, build_vision
from kernels import dispatch_fused
from kernels.conv_epilogue import op as conv_epilogue_op
from tests.kernels.interpreting import poisoned, relative

pytestmark = pytest.mark.modes("interpret", "cuda")


def nfnet(device: str, dtype: str) -> VisionEncoder:
    """The tiny network with biases, which drawn weights have none of."""
    encoder = build_vision(VisionConfig(name="nfnet-tiny", image_size=64, dtype=dtype))
    gen = torch.Generator().manual_seed(2)
    for name, buffer in encoder.named_buffers():
        if name.endswith("bias"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=gen))
    encoder.fuse()
    return encoder.to(device)


def encode(encoder: VisionEncoder, device: str, monkeypatch: pytest.MonkeyPatch, *, fused: bool) -> Tensor:
    """Features; `fused` decides instead of the device, and everything must fit the kernels."""

    def launches(implementation: str, what: str, tensor: Tensor, reason: str | None) -> bool:
        assert (implementation, reason) == ("auto", None), f"{what}: {reason}"
        return fused

    pixels = torch.randint(0, 256, (3, 3, 64, 64), generator=torch.Generator().manual_seed(1))
    with monkeypatch.context() as patch:
        patch.setattr(dispatch_fused, "launches", launches)
        with poisoned():
            return encoder(pixels.to(device, torch.uint8))


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """On a GPU convolutions of fp32 would be in TF32, and 2e-3 apart with and without their bias (H200)."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nfnet_gives_what_it_gives_on_torchs_operators(dtype, device, monkeypatch):
    encoder = nfnet(device, dtype)
    got, want = (encode(encoder, device, monkeypatch, fused=fused) for fused in (True, False))
    assert got.isfinite().all()
    if dtype == "float32":
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    else:
        exact_ = encode(nfnet(device, "float32"), device, monkeypatch, fused=False)
        assert relative(got, exact_) < 2.5 * relative(want, exact_), "the interpreter truncates to bf16"


def test_compiled_blocks_leave_the_fusing_to_the_compiler(device, monkeypatch):
    encoder = nfnet(device, "float32")
    want = encode(encoder, device, monkeypatch, fused=True)
    torch._dynamo.reset()
    for block in encoder.repeated_blocks():
        block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    launched = []
    monkeypatch.setattr(conv_epilogue_op, "launch_gated_residual", lambda *given: launched.append(given))
    got = encode(encoder, device, monkeypatch, fused=True)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert not launched
