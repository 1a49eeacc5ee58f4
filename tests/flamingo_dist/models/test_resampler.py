import itertools

import pytest
import torch
from torch import nn

from flamingo_dist.models.init import initialize_
from flamingo_dist.models.resampler import PerceiverResampler, ResamplerConfig, interpolate_frames
from tests.flamingo_dist.models import oracles

N, F, S, E = 3, 2, 5, 16
TOLERANCE = 1e-10


def config(**changes) -> ResamplerConfig:
    sizes = {"feature_width": E, "width": E, "depth": 2, "latents": 4, "heads": 2, "head_dim": 6, "frames": 3}
    return ResamplerConfig(**(sizes | changes))


def build(dtype: torch.dtype = torch.float64, **changes) -> PerceiverResampler:
    resampler = PerceiverResampler(config(**changes), dtype=dtype)
    initialize_(resampler, seed=0)
    return resampler


def features(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def compare(ours: PerceiverResampler, theirs: nn.Module, pairs: list, run_theirs) -> None:
    """Forward, every parameter's gradient, the input's, and the temporal embeddings'."""
    x = features(N, F, S, E).requires_grad_()
    y = x.detach().clone().requires_grad_()
    frames = ours.frame_embeddings.detach().clone().requires_grad_()
    got = ours(x)
    want = run_theirs((y + frames[:F, None]).flatten(1, 2))
    torch.testing.assert_close(got, want, rtol=TOLERANCE, atol=TOLERANCE)
    weight = torch.linspace(-1, 1, got.numel(), dtype=torch.float64).view_as(got)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    oracles.assert_same_gradients(pairs, TOLERANCE)
    for mine, other in ((x, y), (ours.frame_embeddings, frames)):
        torch.testing.assert_close(mine.grad, other.grad, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("activation", ["gelu", "sqrelu"])
def test_equals_flamingo_pytorch(activation):
    lucid = pytest.importorskip("flamingo_pytorch")
    ours = build(activation=activation)
    theirs = lucid.PerceiverResampler(dim=E, depth=2, dim_head=6, heads=2, num_latents=4).double()
    oracles.randomise(theirs)
    nn.init.zeros_(theirs.media_pos_emb)
    if activation == "sqrelu":
        for _, ffw in theirs.layers:
            ffw[2] = oracles.SquaredReLU()
    pairs = list(oracles.lucid_resampler(ours, theirs))
    oracles.copy_from(pairs, ours, except_for=("frame_embeddings",))
    compare(ours, theirs, pairs, lambda x: theirs(x)[:, 0])


@pytest.mark.parametrize("qk_norm", [False, True])
def test_equals_idefics(qk_norm):
    idefics = pytest.importorskip("transformers.models.idefics.perceiver")
    from transformers import IdeficsConfig

    hf = IdeficsConfig(vision_config={"embed_dim": E}, perceiver_config={"qk_layer_norms_perceiver": qk_norm})
    theirs = idefics.IdeficsPerceiverResampler(hf, E, 2, 2, 6, 4).double()
    oracles.randomise(theirs)
    ours = build(activation="relu", qk_norm=qk_norm)
    pairs = list(oracles.idefics_resampler(ours, theirs))
    oracles.copy_from(pairs, ours, except_for=("frame_embeddings",))
    compare(ours, theirs, pairs, theirs)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_shared_feature_kv_is_the_same_function_of_the_same_parameters(qk_norm, norm):
    changes = {"depth": 3, "feature_width": 10, "qk_norm": qk_norm, "norm": norm}
    plain, shared = build(**changes), build(**changes, shared_feature_kv=True)
    oracles.randomise(plain)  # scales and shifts other than 1 and 0
    shared.load_state_dict(plain.state_dict(), strict=True)
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    got, want = [], []
    for resampler, found in ((shared, got), (plain, want)):
        x = features(N, F, S, 10).requires_grad_()
        out = resampler(x, mask)
        (out * torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)).sum().backward()
        found += [("out", out.detach()), ("features", x.grad)]
        found += [(name, param.grad) for name, param in resampler.named_parameters()]
    for (name, a), (_, b) in zip(got, want, strict=True):
        assert b.any(), name
        assert (a - b).norm() <= 1e-12 * max(b.norm(), 1e-2), (name, (a - b).norm() / b.norm())


def test_projects_features_of_another_width():
    ours, same = build(feature_width=10), build()
    same.load_state_dict({k: v for k, v in ours.state_dict().items() if k != "project.weight"})
    x = features(N, F, S, 10)
    torch.testing.assert_close(ours(x), same(x @ ours.project.weight.T), rtol=1e-12, atol=1e-12)


def test_every_parameter_gets_a_gradient():
    ours = build(feature_width=10, frames=F)
    ours(features(N, F, S, 10)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in ours.parameters())


def test_media_do_not_mix():
    ours, x = build(), features(N, F, S, E)
    alone = torch.cat([ours(x[i : i + 1]) for i in range(N)])
    torch.testing.assert_close(ours(x), alone, rtol=1e-12, atol=1e-12)


def test_order_of_frames_matters_through_the_temporal_embeddings_alone():
    ours, x = build(frames_std=1.0), features(N, 3, S, E)
    swapped = x[:, [1, 0, 2]]
    assert (ours(x) - ours(swapped)).abs().max() > 1e-2
    nn.init.zeros_(ours.frame_embeddings)
    torch.testing.assert_close(ours(x), ours(swapped), rtol=1e-12, atol=1e-12)


def test_padded_frames_have_no_influence():
    ours, x = build(), features(N, 3, S, E)
    mask = torch.tensor([[True, True, False]]).expand(N, -1)
    torch.testing.assert_close(ours(x, mask), ours(x[:, :2]), rtol=1e-12, atol=1e-12)


def test_an_image_has_the_first_embedding_and_a_short_clip_the_first_ones():
    embeddings = features(8, E)
    assert torch.equal(interpolate_frames(embeddings, 1), embeddings[:1])
    assert torch.equal(interpolate_frames(embeddings, 8), embeddings)


def test_more_frames_are_interpolated_linearly():
    embeddings = features(8, E)
    want = nn.functional.interpolate(embeddings.T[None], size=30, mode="linear", align_corners=True)[0].T
    torch.testing.assert_close(interpolate_frames(embeddings, 30), want, rtol=1e-6, atol=1e-6)
    assert torch.equal(interpolate_frames(embeddings, 15)[::2], embeddings)
    assert interpolate_frames(embeddings.bfloat16(), 30).dtype == torch.bfloat16


def test_thirty_frames_run_after_training_at_eight():
    assert build(frames=8)(features(1, 30, S, E)).shape == (1, 4, E)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_result_has_the_dtype_of_the_parameters(dtype, stored):
    ours = build(dtype)
    out = ours(features(N, F, S, E).to(stored))
    assert out.dtype == dtype
    exact = build()
    exact.load_state_dict({k: v.double() for k, v in ours.state_dict().items()})
    want = exact(features(N, F, S, E).to(stored).to(dtype).double())
    assert (out - want).norm() / want.norm() < (2e-2 if dtype == torch.bfloat16 else 1e-5)


def test_checkpoint_keys_are_parameters_only_and_load_strictly():
    ours, other = build(), build()
    assert set(ours.state_dict()) == {n for n, _ in ours.named_parameters()}
    other.load_state_dict(ours.state_dict(), strict=True)


def test_builds_and_runs_on_the_meta_device_at_paper_size():
    with torch.device("meta"):
        paper = PerceiverResampler(ResamplerConfig(feature_width=3072), dtype=torch.bfloat16)
        assert paper(torch.empty(2, 8, 100, 3072)).shape == (2, 64, 1536)
    assert {p.device.type for p in paper.parameters()} == {"meta"}
    # Six layers of 12 E^2, latents, temporal embeddings, the projection from 3072 channels and the norms.
    weights = 6 * 12 * 1536**2 + (64 + 8) * 1536 + 3072 * 1536
    assert sum(p.numel() for p in paper.parameters()) == weights + (6 * 3 + 1) * 2 * 1536


@pytest.mark.parametrize(
    ("field", "value"),
    [("width", 0), ("frames", 0), ("activation", "swish"), ("implementation", "cuda"), ("norm", "batch")],
)
def test_bad_configuration_raises(field, value):
    with pytest.raises(ValueError, match=field):
        build(**{field: value})


def test_bad_inputs_raise():
    with pytest.raises(ValueError, match="feature_width"):
        build()(features(N, F, S, E + 1))
    with pytest.raises(ValueError, match="one temporal embedding"):
        build(frames=1)(features(N, F, S, E))
    with pytest.raises(ValueError, match="frame_mask_NF"):
        build()(features(N, F, S, E), torch.ones(N, F + 1, dtype=torch.bool))


def test_initialisation_depends_on_name_and_seed_alone():
    first, again, other = build(), build(), PerceiverResampler(config(), dtype=torch.float64)
    initialize_(other, seed=1)
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(a, c) == ("norm" in name), name
    draws = [p for n, p in first.named_parameters() if "norm" not in n]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(draws, 2) if a.shape == b.shape)


def test_initialisation_names_what_it_cannot_fill():
    untagged = nn.Sequential(nn.Linear(2, 2, bias=False))
    with pytest.raises(ValueError, match=r"0\.weight"):
        initialize_(untagged, seed=0)
