"""A run's settings against those that are stated beside published weights: names and shapes alone prove few of them."""

import dataclasses
import math
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from flamingo_dist.models.lm_config import LMConfig

_TOLERANCE = 1e-6
"""Relative; GGUF files hold settings in fp32."""
_NOT_OF_THE_LM = ("weights", "weight_storage", "matrix_products", "extra_like", "further_tokens")
"""Where weights are, how a run keeps them, and the tokens that it adds."""
_PROVEN_BY_SHAPES = ("vocab_size", "max_positions")
"""Published vocabularies and tables are padded or counted in other ways; the rows that are stored count."""


class Difference(NamedTuple):
    """A setting that has two values."""

    name: str
    """With dots, from the configuration down."""
    given: Any
    """What the run says."""
    stated: Any
    """What stands beside the weights."""


def config_differences(given: Any, stated: Any, *, skipped: Collection[str] = ()) -> Iterator[Difference]:
    """Yield the fields in which two dataclasses of one kind differ.

    Args:
        given: the run's.
        stated: the one beside the weights.
        skipped: names with dots of fields that may differ.
    """
    for field in dataclasses.fields(stated):
        a, b = getattr(given, field.name), getattr(stated, field.name)
        if field.name in skipped:
            continue
        if dataclasses.is_dataclass(b):
            inner = f"{field.name}."
            within = {name.removeprefix(inner) for name in skipped if name.startswith(inner)}
            for apart in config_differences(a, b, skipped=within):
                yield apart._replace(name=inner + apart.name)
        elif not _same(a, b):
            yield Difference(field.name, a, b)


def lm_differences(given: LMConfig, stated: LMConfig) -> Iterator[Difference]:
    """Yield the settings that make `given` another language model than `stated`.

    Left out are settings that belong to a run, those without effect on this kind of LM, and `tied`, whose meaning
    depends on the tensors that are there.
    """
    without_effect = {"tied"}
    if stated.positions != "rotary":
        without_effect |= {"rope_base", "rope_scaling"}
    if stated.positions != "alibi":
        without_effect.add("alibi_max")
    if stated.positions != "learned":
        without_effect.add("position_offset")
    if given.rope_scaling.factor == stated.rope_scaling.factor == 1:
        without_effect.add("rope_scaling")
    yield from config_differences(
        given, stated, skipped={*_NOT_OF_THE_LM, *_PROVEN_BY_SHAPES, *without_effect}
    )


def refuse(differences: Collection[Difference], where: str, prefix: str) -> None:
    """Raise `ValueError` if there are differences, naming each, and what to set.

    Args:
        differences: of a run's configuration.
        where: the file that states the other values.
        prefix: what stands before a setting's name in a run, such as "model.lm.".
    """
    if not differences:
        return
    said = [
        f"{name} is {_told(given)} in the run, {_told(stated)} in {where}"
        for name, given, stated in differences
    ]
    remedy = " ".join(f"{prefix}{name}={_told(stated)}" for name, _, stated in differences)
    raise ValueError(f"{'; '.join(said)}; set {remedy}.")


def _same(a: Any, b: Any) -> bool:
    numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (a, b))
    return math.isclose(a, b, rel_tol=_TOLERANCE) if numbers else bool(a == b)


def _told(value: Any) -> str:
    """Return a value as a person would write it: 500000 instead of 500000.0, gelu without quotes."""
    return f"{value:.12g}" if isinstance(value, float) else str(value)
