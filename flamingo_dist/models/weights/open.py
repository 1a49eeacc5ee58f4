"""Opening published weights: the right reader, the right names, and a check of all of them before anything is built."""

import re

from flamingo_dist.models.lm_config import LMConfig
from flamingo_dist.models.stated_config import Difference, lm_differences, refuse
from flamingo_dist.models.stored_shapes import differences, listed
from flamingo_dist.models.weights.gguf import GGUFSource, gguf_lm_config
from flamingo_dist.models.weights.hugging_face import config_url, hf_lm_config, stated_lm_config
from flamingo_dist.models.weights.layout import lm_layout
from flamingo_dist.models.weights.naming import NAMES
from flamingo_dist.models.weights.safetensors import SafetensorsSource
from flamingo_dist.models.weights.source import RenamedSource, WeightSource


def open_lm_weights(config: LMConfig) -> WeightSource:
    """Open `config.weights` and check that it holds the tensors of `config`, no other ones, all of the right shape.

    A GGUF file, or a `config.json` beside safetensors, must also state the settings of `config` that no shape proves.

    Raises:
        ValueError: nothing readable is there, or naming what is missing, surplus or misshaped, or the settings that
            are others there.
    """
    assert config.weights is not None, "a configuration without weights draws them"
    path = config.weights
    if path.endswith(".gguf"):
        gguf = GGUFSource(path)
        _check(gguf, config)
        _check_stated(gguf, config, gguf.lm_config(), path)
        return gguf
    source = _rooted(SafetensorsSource(path), config)
    _check(source, config)
    _check_stated(source, config, stated_lm_config(path), config_url(path))
    return source


def read_lm_config(path: str) -> LMConfig:
    """Return the LM configuration that a GGUF file or a Hugging Face folder, at any fsspec URL, states.

    Raises:
        ValueError: there is none, or the model is none that this LM can be.
    """
    return gguf_lm_config(path) if path.endswith(".gguf") else hf_lm_config(path)


def _rooted(source: WeightSource, config: LMConfig) -> WeightSource:
    """Return the source with the names of a saved causal LM, whatever stands before the names in this export."""
    names = NAMES[config.naming]
    wanted, found = names.roots[0], source.shapes()
    for root in names.roots:
        if f"{root}{names.embedding}.weight" in found:
            return source if root == wanted else RenamedSource(source, stored=root, wanted=wanted)
    return source


def _check(source: WeightSource, config: LMConfig) -> None:
    """Raise `ValueError` unless the source holds what the configuration says."""
    expected, found = lm_layout(config).stored, source.shapes()
    apart = differences(found, expected, ignored=lambda name: _is_known_surplus(name, config))
    wrong = [f"{name} is {found[name]} and should be {expected[name]}" for name in apart.misshaped]
    parts = listed("missing", apart.missing), listed("surplus", apart.surplus), listed("misshaped", wrong)
    if any(parts):
        problems = "; ".join(filter(None, parts))
        raise ValueError(f"weights {config.weights} do not fit the LM configuration: {problems}.")


def _check_stated(source: WeightSource, config: LMConfig, stated: LMConfig | None, where: str) -> None:
    """Raise `ValueError` unless the settings that are stated with the weights, if any, are the configuration's."""
    if stated is None:
        return
    apart = list(lm_differences(config, stated))
    # A run may untie a head that is stored, but must not let the embedding stand for a head of its own.
    if config.tied and not stated.tied and "lm_head.weight" in source.shapes():
        apart.append(Difference("tied", given=True, stated=False))
    refuse(apart, where, "model.lm.")


def _is_known_surplus(name: str, config: LMConfig) -> bool:
    """Return whether exports of this family are known to hold a tensor that is no weight of ours."""
    if config.tied and name.endswith("lm_head.weight"):
        return True  # the embedding again
    return re.search(NAMES[config.naming].ignored, name) is not None
