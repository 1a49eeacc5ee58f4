"""The whole network against transformers' IDEFICS: logits and gradients on the same weights."""

import re
from dataclasses import replace

import pytest
import torch
from transformers import IdeficsConfig, IdeficsForVisionText2Text

from flamingo_dist.models.flamingo import Flamingo, FlamingoConfig
from flamingo_dist.models.weights import lm_shard
from flamingo_dist.parallel.topology import single_process
from tests import tiny

VOCAB, WIDTH, FEATURES = 60, 32, 24


def idefics() -> IdeficsForVisionText2Text:
    torch.manual_seed(0)
    config = IdeficsConfig(
        vocab_size=VOCAB,
        additional_vocab_size=0,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        use_resampler=True,
        qk_layer_norms=False,
        alpha_initializer="ones",
        cross_layer_interval=2,
        vision_config={
            "embed_dim": FEATURES,
            "image_size": 16,
            "patch_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
        },
        perceiver_config={
            "use_resampler": True,
            "resampler_n_latents": 4,
            "resampler_depth": 2,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "qk_layer_norms_perceiver": False,
        },
    )
    model = IdeficsForVisionText2Text(config).double().eval()
    for name, param in model.named_parameters():
        if "alpha" in name:
            torch.nn.init.uniform_(param, 0.3, 1.5)
        elif "norm" not in name and ".ln." not in name:
            torch.nn.init.normal_(param, std=0.15)
    return model


def our_config() -> FlamingoConfig:
    base = tiny.network(layers=4, every=2)
    return replace(
        base,
        lm=replace(base.lm, num_heads=4, num_kv_heads=4, head_dim=8, ffn_width=64, norm_eps=1e-6, tied=False),
        vision=replace(base.vision, tiny_width=FEATURES),
        resampler=replace(
            base.resampler,
            feature_width=FEATURES,
            width=FEATURES,
            latents=4,
            heads=2,
            head_dim=8,
            activation="relu",
        ),
        gated=replace(
            base.gated,
            media_width=FEATURES,
            heads=4,
            head_dim=8,
            ffw_hidden=64,
            activation="silu_gated",
            norm="rms",
            norm_eps=1e-6,
        ),
    )


class StateSource:
    """The LM's weights out of a state dict with Hugging Face's names."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.state = state

    def names(self) -> set[str]:
        return set(self.state)

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> torch.Tensor:
        value = self.state[name]
        return value[rows] if value.dim() == 1 else value[rows, columns]


RENAMES = [
    (r"^gated\.(\d+)\.gate_attn$", lambda m: f"{gate(m)}.alpha_cross_attn"),
    (r"^gated\.(\d+)\.gate_ffw$", lambda m: f"{gate(m)}.alpha_dense"),
    (r"^gated\.(\d+)\.norm_attn\.weight$", lambda m: f"{gate(m)}.input_layernorm.weight"),
    (r"^gated\.(\d+)\.norm_ffw\.weight$", lambda m: f"{gate(m)}.post_attention_layernorm.weight"),
    (r"^gated\.(\d+)\.attn\.([qkv])\.weight$", lambda m: f"{gate(m)}.cross_attn.{m[2]}_proj.weight"),
    (r"^gated\.(\d+)\.attn\.out\.weight$", lambda m: f"{gate(m)}.cross_attn.o_proj.weight"),
    (r"^gated\.(\d+)\.ffw\.(gate|up|down)\.weight$", lambda m: f"{gate(m)}.mlp.{m[2]}_proj.weight"),
    (r"^resampler\.latents$", lambda m: "model.perceiver_resampler.latents"),
    (r"^resampler\.norm\.(\w+)$", lambda m: f"model.perceiver_resampler.layer_norm.{m[1]}"),
    (
        r"^resampler\.layers\.(\d+)\.attn\.norm_features\.(\w+)$",
        lambda m: f"{block(m)}.0.context_layer_norm.{m[2]}",
    ),
    (
        r"^resampler\.layers\.(\d+)\.attn\.norm_latents\.(\w+)$",
        lambda m: f"{block(m)}.0.latents_layer_norm.{m[2]}",
    ),
    (r"^resampler\.layers\.(\d+)\.attn\.([qkv])\.weight$", lambda m: f"{block(m)}.0.{m[2]}_proj.weight"),
    (r"^resampler\.layers\.(\d+)\.attn\.out\.weight$", lambda m: f"{block(m)}.0.output_proj.weight"),
    (r"^resampler\.layers\.(\d+)\.norm_ffw\.(\w+)$", lambda m: f"{block(m)}.1.ln.{m[2]}"),
    (r"^resampler\.layers\.(\d+)\.ffw\.up\.weight$", lambda m: f"{block(m)}.1.fc.weight"),
    (r"^resampler\.layers\.(\d+)\.ffw\.down\.weight$", lambda m: f"{block(m)}.1.c_proj.weight"),
]


def gate(match: re.Match[str]) -> str:
    return f"model.gated_cross_attn_layers.{int(match[1]) // 2}"


def block(match: re.Match[str]) -> str:
    return f"model.perceiver_resampler.blocks.{match[1]}"


def their_name(name: str) -> str | None:
    for pattern, rename in RENAMES:
        match = re.match(pattern, name)
        if match:
            return rename(match)
    return None


def copy_weights(ours: Flamingo, theirs: IdeficsForVisionText2Text) -> set[str]:
    state = {n: v.detach() for n, v in theirs.state_dict().items()}
    source = StateSource(state)
    used = set()
    with torch.no_grad():
        for name, param in ours.named_parameters():
            other = their_name(name)
            if other is not None:
                param.copy_(state[other])
                used.add(other)
            elif name.startswith("lm.") and ".extra" not in name:
                shape = param.shape
                param.copy_(lm_shard(source, name[3:], shape, ours.config.lm, tp_rank=0, tp_size=1))
            else:
                param.zero_()  # frame embeddings and the extra rows: IDEFICS has none
    return used


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, VOCAB, (2, 9), generator=generator)
    index = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 2, 2, 2, 2, 2]], dtype=torch.int32)
    pixels = torch.randn(2, 2, 3, 16, 16, generator=generator, dtype=torch.float64)
    return tokens, index, pixels


def test_logits_and_gradients_equal_idefics(inputs):
    tokens, index, pixels = inputs
    theirs = idefics()
    attends = torch.nn.functional.one_hot(index.long(), 3)[..., 1:]
    expected = theirs(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        pixel_values=pixels,
        image_attention_mask=attends,
        use_cache=False,
    ).logits
    with torch.no_grad():
        features = theirs.model.vision_model(pixels.flatten(0, 1)).last_hidden_state
    with single_process():
        ours = Flamingo(our_config(), dtype=torch.float64)
        used = copy_weights(ours, theirs)
        assert {n for n, _ in theirs.named_parameters() if "gated_cross" in n or "perceiver" in n} == used
        out = ours(
            tokens,
            index,
            features.unflatten(0, (2, 2))[:, :, None],
            torch.ones(2, 2, dtype=torch.bool),
        )
        torch.testing.assert_close(out.logits_BTV[..., :VOCAB], expected.detach(), atol=1e-6, rtol=0)

        targets = tokens.roll(-1, 1)
        targets[:, -1] = -100
        # The two extra logits are 0 in ours and absent in theirs: compare on the shared vocabulary.
        loss = torch.nn.functional.cross_entropy(
            torch.cat([expected, expected.new_zeros(2, 9, 2)], -1).flatten(0, 1),
            targets.flatten(),
            reduction="sum",
        )
        nll = ours(tokens, index, latents_BMRE=out.latents_BMRE, targets_BT=targets).nll_BT.sum()
        assert float(nll) == pytest.approx(float(loss), rel=1e-5)
        loss.backward()
        nll.backward()
        their_params = dict(theirs.named_parameters())
        compared = 0
        for name, param in ours.named_parameters():
            other = their_name(name)
            if other is not None:
                # The loss is fp32 in both, as training has it.
                torch.testing.assert_close(
                    param.grad,
                    their_params[other].grad,
                    atol=1e-5,
                    rtol=1e-3,
                    msg=lambda m, n=name: f"{n}: {m}",
                )
                compared += 1
        assert compared == len(used)


def test_the_comparison_can_fail(inputs):
    tokens, index, pixels = inputs
    theirs = idefics()
    with torch.no_grad():
        features = theirs.model.vision_model(pixels.flatten(0, 1)).last_hidden_state.unflatten(0, (2, 2))
    with single_process(), torch.no_grad():
        ours = Flamingo(replace(our_config(), cross_phase="last"), dtype=torch.float64)
        assert our_config().gated_positions() == [0, 2]
        assert ours.config.gated_positions() == [1, 3]
        mask = torch.ones(2, 2, dtype=torch.bool)
        first = Flamingo(our_config(), dtype=torch.float64)
        copy_weights(first, theirs)
        state = {
            n.replace("gated.0", "gated.1").replace("gated.2", "gated.3"): v
            for n, v in first.state_dict().items()
        }
        ours.load_state_dict(state)
        a = first(tokens, index, features[:, :, None], mask).logits_BTV
        b = ours(tokens, index, features[:, :, None], mask).logits_BTV
    assert (a - b).abs().max() > 1e-2
