"""Hugging Face's IDEFICS (`IdeficsForVisionText2Text`): configuration and tensors, both ways.

IDEFICS is Flamingo with a gated block before every n-th LLaMA block (the first of each n), RMSNorm and SwiGLU in it,
ReLU in the resampler, no frame embeddings, and additional rows of the vocabulary for `<fake_token_around_image>` (id V)
and `<image>` (id V + 1). Ours are `<image>` (V) and `<EOC>` (V + 1): the two change places, `<EOC>` standing for the
fake token, which comes before an image as `<EOC>` does. What stands after them keeps its id: `<end_of_utterance>`
(V + 2) of the instruct models.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flamingo_dist.models.exchange.rules import Rule, absent, same
from flamingo_dist.models.flamingo import FlamingoConfig
from flamingo_dist.models.gated_block import GatedBlockConfig
from flamingo_dist.models.lm_config import LMConfig
from flamingo_dist.models.resampler import ResamplerConfig
from flamingo_dist.models.vision import VisionConfig

VISION_PREFIX = "model.vision_model."
"""Before the names of the vision tower, which are CLIP's."""
IGNORED = ("rotary_emb.inv_freq", "embeddings.position_ids")
"""Ends of the names of derived buffers, which old files hold."""
FAKE_TOKEN, IMAGE_TOKEN = "<fake_token_around_image>", "<image>"
"""The first two additional tokens, by the names of the published tokenizers."""
_RESAMPLER_EPS = 1e-5
_NEEDED_TOKENS = 2

# Fields that say how a network starts or runs, not what it computes.
_FREE = {
    "lm": {"weights", "extra_like", "tied"},
    "resampler": {"init_std", "latents_std", "frames_std", "frames", "shared_feature_kv", "implementation"},
    "gated": {"init_std", "gate_init", "implementation"},
}


def network_config(stated: Mapping[str, Any], vision: VisionConfig) -> FlamingoConfig:
    """Return the network that IDEFICS' `config.json` describes.

    Args:
        stated: the contents of `config.json`.
        vision: the encoder; its width must be the tower's.

    Raises:
        ValueError: naming an option that has no counterpart here.
    """
    _check_options(stated)
    heads, width = stated["num_attention_heads"], stated["hidden_size"]
    perceiver, tower = stated["perceiver_config"], stated["vision_config"]
    eps = stated.get("rms_norm_eps", 1e-6)
    features = tower.get("embed_dim") or tower["hidden_size"]
    alpha = stated.get("alpha_type", "float")
    return FlamingoConfig(
        lm=LMConfig(
            vocab_size=stated["vocab_size"],
            num_layers=stated["num_hidden_layers"],
            width=width,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=width // heads,
            ffn_width=stated["intermediate_size"],
            norm_eps=eps,
            rope_base=_rope(stated).get("rope_theta", 10000.0),
            tied=False,
            further_tokens=max(0, stated.get("additional_vocab_size", 0) - _NEEDED_TOKENS),
        ),
        vision=vision,
        resampler=ResamplerConfig(
            feature_width=features,
            width=features,
            depth=perceiver["resampler_depth"],
            latents=perceiver["resampler_n_latents"],
            heads=perceiver["resampler_n_heads"],
            head_dim=perceiver["resampler_head_dim"],
            activation="relu",
            frames=1,
            norm_eps=_RESAMPLER_EPS,
            qk_norm=perceiver.get("qk_layer_norms_perceiver", False),
        ),
        gated=GatedBlockConfig(
            width=width,
            media_width=features,
            heads=heads,
            head_dim=width // heads,
            ffw_hidden=stated["intermediate_size"],
            activation="silu_gated",
            norm="rms",
            norm_eps=eps,
            gate="vector" if alpha == "vector" else "scalar",
            gate_init=1.0 if stated.get("alpha_initializer", "zeros") == "ones" else 0.0,
            qk_norm=stated.get("qk_layer_norms", False),
        ),
        cross_every=stated["cross_layer_interval"],
        cross_phase="first",
    )


def _rope(stated: Mapping[str, Any]) -> Mapping[str, Any]:
    return stated.get("rope_parameters") or {}


def _check_options(stated: Mapping[str, Any]) -> None:
    """Refuse what our network does not have."""
    resampled = stated.get("use_resampler", False)
    extra = stated.get("additional_vocab_size", 0)
    every, layers = stated["cross_layer_interval"], stated["num_hidden_layers"]
    refused = [
        ("model_type", stated.get("model_type"), stated.get("model_type") == "idefics", "'idefics'"),
        ("use_resampler", resampled, bool(resampled), "true: blocks read latents"),
        (
            "additional_vocab_size",
            extra,
            extra == 0 or extra >= _NEEDED_TOKENS,
            f"0, or {_NEEDED_TOKENS} or more",
        ),
        (
            "hidden_act",
            stated.get("hidden_act", "silu"),
            stated.get("hidden_act", "silu") == "silu",
            "'silu'",
        ),
        (
            "alpha_type",
            stated.get("alpha_type"),
            stated.get("alpha_type", "float") in ("float", "vector"),
            "...",
        ),
        ("rope_parameters.rope_type", _rope(stated).get("rope_type"), _is_plain_rope(stated), "'default'"),
        ("cross_layer_interval", every, layers % every == 0, f"a divisor of num_hidden_layers={layers}"),
    ]
    for name, value, is_known, allowed in refused:
        if not is_known:
            raise ValueError(
                f"IDEFICS option {name}={value!r} has no counterpart here; it must be {allowed}."
            )


def _is_plain_rope(stated: Mapping[str, Any]) -> bool:
    return _rope(stated).get("rope_type", "default") == "default"


def idefics_config(config: FlamingoConfig, tower: Mapping[str, Any]) -> dict[str, Any]:
    """Return IDEFICS' `config.json` for a network.

    Args:
        config: the network.
        tower: IDEFICS' `vision_config` of the vision tower.

    Raises:
        ValueError: naming an option of the network that IDEFICS has not.
    """
    lm, resampler, gated = config.lm, config.resampler, config.gated
    stated = {
        "model_type": "idefics",
        "architectures": ["IdeficsForVisionText2Text"],
        "vocab_size": lm.vocab_size,
        "additional_vocab_size": lm.extra_tokens,
        "hidden_size": lm.width,
        "intermediate_size": lm.ffn_width,
        "num_hidden_layers": lm.num_layers,
        "num_attention_heads": lm.num_heads,
        "hidden_act": "silu",
        "rms_norm_eps": lm.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": lm.rope_base},
        "tie_word_embeddings": False,
        "alpha_type": "vector" if gated.gate == "vector" else "float",
        "alpha_initializer": "zeros",
        "cross_layer_interval": config.cross_every,
        "qk_layer_norms": gated.qk_norm,
        "use_resampler": True,
        "perceiver_config": {
            "use_resampler": True,
            "resampler_n_latents": resampler.latents,
            "resampler_depth": resampler.depth,
            "resampler_n_heads": resampler.heads,
            "resampler_head_dim": resampler.head_dim,
            "qk_layer_norms_perceiver": resampler.qk_norm,
        },
        "vision_config": dict(tower),
    }
    _check_representable(config, stated)
    return stated


def _check_representable(config: FlamingoConfig, stated: Mapping[str, Any]) -> None:
    """Read the configuration back: what comes out different, IDEFICS cannot say."""
    width = stated["vision_config"]["embed_dim"]
    if (config.resampler.feature_width, config.resampler.width) != (width, width):
        raise ValueError(
            f"resampler.width={config.resampler.width} and resampler.feature_width={config.resampler.feature_width}: "
            f"IDEFICS has neither a map between them nor another width than its vision tower's, {width}."
        )
    again = network_config(stated, config.vision)
    for part, free in _FREE.items():
        ours, theirs = getattr(config, part), getattr(again, part)
        for field in dataclasses.fields(ours):
            given, only = getattr(ours, field.name), getattr(theirs, field.name)
            if field.name not in free and given != only:
                raise ValueError(
                    f"{part}.{field.name}={given!r} does not exist in IDEFICS, which has {only!r} there."
                )
    if config.cross_phase != again.cross_phase:
        raise ValueError(f"cross_phase={config.cross_phase!r}: IDEFICS' blocks stand 'first' of every n.")


def rules(config: FlamingoConfig, *, additional: bool = True) -> list[Rule]:
    """Return how our parameters and IDEFICS' tensors stand for each other, the vision tower left out.

    Args:
        config: the network, with an untied head.
        additional: whether IDEFICS has additional tokens, `additional_vocab_size` of them.
    """
    found = [
        same("lm.vocabulary.frozen.weight", "model.embed_tokens.weight"),
        same("lm.vocabulary.frozen_head.weight", "lm_head.weight"),
        same("lm.final_norm.weight", "model.norm.weight"),
    ]
    extra = {
        "lm.vocabulary.extra.weight": "model.embed_tokens.additional_embedding.weight",
        "lm.vocabulary.extra_head.weight": "lm_head.additional_fc.weight",
    }
    for ours, theirs in extra.items():
        found.append(
            Rule(ours=(ours,), theirs=(theirs,), to_ours=_swap_rows, to_theirs=_swap_rows)
            if additional
            else absent(ours, (config.lm.extra_tokens, config.lm.width))
        )
    for i in range(config.lm.num_layers):
        found += _lm_block(config.lm, f"lm.layers.{i}.", f"model.layers.{i}.")
    for n, i in enumerate(config.gated_positions()):
        found += _gated_block(config.gated, f"gated.{i}.", f"model.gated_cross_attn_layers.{n}.")
    return found + _resampler(config.resampler)


def _swap_rows(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Let the first two rows change places."""
    return [torch.cat([tensors[0][:2].flip(0), tensors[0][2:]])]


def _lm_block(lm: LMConfig, ours: str, theirs: str) -> list[Rule]:
    qkv = tuple(f"{theirs}self_attn.{letter}_proj.weight" for letter in "qkv")
    gate_up = tuple(f"{theirs}mlp.{part}_proj.weight" for part in ("gate", "up"))

    def fuse(tensors: Sequence[Tensor]) -> list[Tensor]:  # for each head its query, key and value rows
        return [torch.cat([t.unflatten(0, (lm.num_heads, -1)) for t in tensors], dim=1).flatten(0, 1)]

    def part(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [t.flatten(0, 1) for t in tensors[0].unflatten(0, (lm.num_heads, -1)).chunk(3, dim=1)]

    return [
        same(f"{ours}input_layernorm.weight", f"{theirs}input_layernorm.weight"),
        same(f"{ours}pre_mlp_layernorm.weight", f"{theirs}post_attention_layernorm.weight"),
        Rule(ours=(f"{ours}self_attention.linear_qkv.weight",), theirs=qkv, to_ours=fuse, to_theirs=part),
        same(f"{ours}self_attention.linear_proj.weight", f"{theirs}self_attn.o_proj.weight"),
        Rule(
            ours=(f"{ours}mlp.linear_fc1.weight",),
            theirs=gate_up,
            to_ours=lambda t: [torch.cat(list(t))],
            to_theirs=lambda t: list(t[0].chunk(2)),
        ),
        same(f"{ours}mlp.linear_fc2.weight", f"{theirs}mlp.down_proj.weight"),
    ]


def _gated_block(gated: GatedBlockConfig, ours: str, theirs: str) -> list[Rule]:
    shape = (1, 1, gated.width) if gated.gate == "vector" else (1,)
    gates = {"gate_attn": "alpha_cross_attn", "gate_ffw": "alpha_dense"}
    pairs = {
        "norm_attn.weight": "input_layernorm.weight",
        "norm_ffw.weight": "post_attention_layernorm.weight",
        **{f"attn.{letter}.weight": f"cross_attn.{letter}_proj.weight" for letter in "qkv"},
        "attn.out.weight": "cross_attn.o_proj.weight",
        **{f"ffw.{part}.weight": f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")},
    }
    if gated.qk_norm:
        pairs |= {f"attn.{letter}_norm.weight": f"cross_attn.{letter}_layer_norm.weight" for letter in "qk"}
    return [
        *(
            Rule(
                ours=(ours + a,),
                theirs=(theirs + b,),
                to_ours=lambda t: [t[0].flatten()],
                to_theirs=lambda t: [t[0].view(shape)],
            )
            for a, b in gates.items()
        ),
        *(same(ours + a, theirs + b) for a, b in pairs.items()),
    ]


def _resampler(resampler: ResamplerConfig) -> list[Rule]:
    ours, theirs = "resampler.", "model.perceiver_resampler."
    found = [
        same(f"{ours}latents", f"{theirs}latents"),
        absent(f"{ours}frame_embeddings", (resampler.frames, resampler.width)),
        *(same(f"{ours}norm.{part}", f"{theirs}layer_norm.{part}") for part in ("weight", "bias")),
    ]
    norms = {"attn.norm_features": "0.context_layer_norm", "attn.norm_latents": "0.latents_layer_norm"}
    norms["norm_ffw"] = "1.ln"
    if resampler.qk_norm:
        norms |= {f"attn.{letter}_norm": f"0.{letter}_layer_norm" for letter in "qk"}
    weights = {f"attn.{letter}": f"0.{letter}_proj" for letter in "qkv"}
    weights |= {"attn.out": "0.output_proj", "ffw.up": "1.fc", "ffw.down": "1.c_proj"}
    for i in range(resampler.depth):
        a, b = f"{ours}layers.{i}.", f"{theirs}blocks.{i}."
        found += [same(f"{a}{n}.{p}", f"{b}{m}.{p}") for n, m in norms.items() for p in ("weight", "bias")]
        found += [same(f"{a}{n}.weight", f"{b}{m}.weight") for n, m in weights.items()]
    return found
