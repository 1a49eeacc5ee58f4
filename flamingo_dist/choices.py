"""Settings that are one of a few values. A recipe is Python, where no parser looks at them."""

import types
import typing
from typing import Any


def check_choices(config: object, prefix: str = "") -> None:
    """Check the fields of a dataclass whose type lists their values.

    Args:
        config: the dataclass.
        prefix: of the fields' names in the message, such as "train.".

    Raises:
        ValueError: a field holds something else; another branch would run without a word.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        allowed, value = _choices(hint), getattr(config, name)
        if allowed is not None and value not in allowed:
            raise ValueError(f"{prefix}{name}={value!r} is not known; choose one of {tuple(allowed)}.")


def _choices(hint: Any) -> list[Any] | None:
    """Return the values that a type lists, None where it does not."""
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    if hint is types.NoneType:
        return [None]
    if hint is bool:
        return [False, True]
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return None
    parts = [_choices(part) for part in typing.get_args(hint)]
    return None if None in parts else [value for part in parts for value in part or ()]
