import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flamingo_dist.models.gated_block import GatedBlockConfig, GatedCrossAttentionBlock, MediaKV
from flamingo_dist.models.init import initialize_
from tests.flamingo_dist.models import oracles

B, T, M, R, D, E, H, K = 2, 7, 3, 4, 24, 12, 4, 6
TOLERANCE = 1e-10
INDEX = torch.tensor([[0, 1, 1, 2, 2, 3, 3], [0, 0, 0, 1, 1, 1, 2]])


def config(**changes) -> GatedBlockConfig:
    sizes = {"width": D, "media_width": E, "heads": H, "head_dim": K, "ffw_hidden": 4 * D}
    return GatedBlockConfig(**(sizes | changes))


def build(dtype: torch.dtype = torch.float64, **changes) -> GatedCrossAttentionBlock:
    block = GatedCrossAttentionBlock(config(**changes), dtype=dtype)
    initialize_(block, seed=0)
    return block


def inputs(dtype: torch.dtype = torch.float64, media_width: int = E) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(2)
    x = torch.randn(T, B, D, dtype=torch.float64, generator=gen).to(dtype)
    latents = torch.randn(B, M, R, media_width, dtype=torch.float64, generator=gen).to(dtype)
    return x.requires_grad_(), latents.requires_grad_()


def compare(ours: nn.Module, pairs: list, run_theirs) -> None:
    """Forward, every parameter's gradient and both inputs'."""
    x, latents = inputs(media_width=ours.config.media_width)
    y, media = (z.detach().clone().requires_grad_() for z in (x, latents))
    got = ours(x, latents, INDEX)
    want = run_theirs(y.transpose(0, 1), media).transpose(0, 1)
    torch.testing.assert_close(got, want, rtol=TOLERANCE, atol=TOLERANCE)
    weight = torch.linspace(-1, 1, got.numel(), dtype=torch.float64).view_as(got)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    oracles.assert_same_gradients(pairs, TOLERANCE)
    for mine, other in ((x, y), (latents, media)):
        torch.testing.assert_close(mine.grad, other.grad, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("activation", ["gelu", "sqrelu"])
def test_equals_flamingo_pytorch(activation):
    lucid = pytest.importorskip("flamingo_pytorch")
    theirs = lucid.GatedCrossAttentionBlock(dim=D, dim_head=K, heads=H).double()
    # Its keys and values read media of the LM's width.
    oracles.randomise(theirs)
    if activation == "sqrelu":
        theirs.ff[2] = oracles.SquaredReLU()
    ours = build(media_width=D, activation=activation)
    pairs = list(oracles.lucid_block(ours, theirs))
    oracles.copy_from(pairs, ours)
    locations = torch.diff(INDEX, prepend=torch.zeros(B, 1, dtype=INDEX.dtype)).bool()
    assert torch.equal(locations.cumsum(1), INDEX)
    compare(ours, pairs, lambda x, media: theirs(x, media, locations))


def exact_rms_norm(self, x: Tensor) -> Tensor:
    """IDEFICS' RMSNorm with its variance in the input's dtype instead of fp32."""
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.mark.parametrize("gate", ["scalar", "vector"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_equals_idefics(gate, qk_norm, monkeypatch):
    idefics = pytest.importorskip("transformers.models.idefics.modeling_idefics")
    monkeypatch.setattr(idefics.IdeficsRMSNorm, "forward", exact_rms_norm)
    hf = idefics.IdeficsConfig(
        hidden_size=D,
        num_attention_heads=H,
        intermediate_size=40,
        alpha_type="float" if gate == "scalar" else "vector",
        qk_layer_norms=qk_norm,
        rms_norm_eps=1e-6,
        vision_config={"embed_dim": E},
        attn_implementation="sdpa",
    )
    theirs = idefics.IdeficsGatedCrossAttentionLayer(hf, layer_idx=0).double()
    oracles.randomise(theirs)
    ours = build(
        ffw_hidden=40, activation="silu_gated", norm="rms", norm_eps=1e-6, gate=gate, qk_norm=qk_norm
    )
    pairs = list(oracles.idefics_block(ours, theirs))
    oracles.copy_from(pairs, ours)
    visible = INDEX[:, :, None] == torch.arange(1, M + 1)
    mask = torch.zeros(visible.shape, dtype=torch.float64)
    mask = mask.masked_fill(~visible, torch.finfo(torch.float64).min).repeat_interleave(R, dim=-1)[:, None]

    def run_theirs(x: Tensor, media: Tensor) -> Tensor:
        gates = visible.any(-1).double()
        return theirs(
            x,
            image_hidden_states=media.flatten(1, 2),
            image_attention_mask=mask,
            cross_attention_gate=gates,
        )

    compare(ours, pairs, run_theirs)


@pytest.mark.parametrize("gate", ["scalar", "vector"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_gates_return_the_input_bit_for_bit_and_get_gradients(dtype, gate):
    block = build(dtype, gate=gate)
    x, latents = inputs(dtype)
    out = block(x, latents, INDEX)
    assert torch.equal(out, x)
    (out * torch.randn_like(out)).sum().backward()
    assert block.gate_attn.grad.any()
    assert block.gate_ffw.grad.any()
    assert not block.attn.out.weight.grad.any()


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_stream_keeps_its_dtype_and_branches_have_the_parameters(stream, parameters):
    block = build(parameters, gate_init=0.5)
    x, latents = inputs(stream)
    out = block(x, latents, INDEX)
    assert out.dtype == stream
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == parameters for p in block.parameters())
    assert all(torch.isfinite(p.grad).all() for p in block.parameters())
    exact = build(gate_init=0.5)
    exact.load_state_dict({k: v.double() for k, v in block.state_dict().items()})
    want = exact(x.double(), latents.double(), INDEX)
    low = torch.bfloat16 in (stream, parameters)
    assert (out - want).norm() / want.norm() < (1e-2 if low else 1e-6)


@pytest.mark.parametrize("activation", ["sqrelu", "gelu", "relu", "silu_gated"])
def test_every_parameter_gets_a_gradient(activation):
    block = build(gate_init=0.5, qk_norm=True, activation=activation)
    x, latents = inputs()
    block(x, latents, INDEX).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in block.parameters())


def test_batch_without_any_image_keeps_every_parameter_in_the_graph():
    """All ranks run the same backward collectives, whatever their batch holds."""
    block = build(gate_init=0.5)
    x, latents = inputs()
    block(x, latents, torch.zeros_like(INDEX)).sum().backward()
    assert all(p.grad is not None for p in block.parameters())
    assert latents.grad is not None
    assert not latents.grad.any()


def test_cached_media_give_the_same_rows():
    block, cache = build(gate_init=0.5), MediaKV()
    x, latents = inputs()
    whole = block(x, latents, INDEX)
    steps = [block(x[:3], latents, INDEX[:, :3], media_kv=cache)]
    # A row after the cache is filled may still see another medium than the last one.
    steps += [block(x[t : t + 1], None, INDEX[:, t : t + 1], media_kv=cache) for t in range(3, T)]
    torch.testing.assert_close(torch.cat(steps), whole, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="MediaKV"):
        block(x, None, INDEX)


@pytest.mark.parametrize(("gate", "shape"), [("scalar", ()), ("vector", (D,))])
def test_gates_for_logging(gate, shape):
    block = build(torch.bfloat16, gate=gate, gate_init=0.5)
    before = block.gates()
    block(*inputs(torch.bfloat16), INDEX)
    nn.init.constant_(block.gate_attn, 3.0)
    for attn, ffw in (before, block.gates()):
        assert attn.shape == ffw.shape == shape
        assert attn.dtype == torch.float32
        assert not attn.requires_grad
        torch.testing.assert_close(attn, torch.full(shape, 0.4621), atol=2e-3, rtol=0)


def test_partitioned_gates_without_a_forward_raise():
    block = build()
    block.gate_attn.data = torch.empty(0)
    with pytest.raises(RuntimeError, match="ZeRO-3"):
        block.gates()
    with pytest.raises(ValueError, match="gate_attn"):
        initialize_(block, seed=0)


def test_runs_without_real_values():
    with torch.device("meta"):
        block = GatedCrossAttentionBlock(
            GatedBlockConfig(width=8192, media_width=1536, heads=64, head_dim=128, ffw_hidden=32768),
            dtype=torch.bfloat16,
        )
        assert {p.device.type for p in block.parameters()} == {"meta"}
        x = torch.empty(256, 2, 8192, dtype=torch.bfloat16)
        latents = torch.empty(2, 5, 64, 1536, dtype=torch.bfloat16)
        assert block(x, latents, torch.empty(2, 256, dtype=torch.int32)).shape == x.shape
    with FakeTensorMode():
        fake = GatedCrossAttentionBlock(config())
        out = fake(torch.empty(T, B, D), torch.empty(B, M, R, E), torch.empty(B, T, dtype=torch.int32))
        out.sum().backward()
        assert fake.attn.k.weight.grad.shape == (H * K, E)


def test_checkpoint_keys_are_parameters_only_and_load_strictly():
    block, other = build(qk_norm=True), build(qk_norm=True)
    assert set(block.state_dict()) == {n for n, _ in block.named_parameters()}
    other.load_state_dict(block.state_dict(), strict=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [("heads", 0), ("gate", "tensor"), ("activation", "swish"), ("implementation", "x"), ("norm", "batch")],
)
def test_bad_configuration_raises(field, value):
    with pytest.raises(ValueError, match=field):
        build(**{field: value})
