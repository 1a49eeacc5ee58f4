"""JSON that others wrote: an object that names its file in errors, and configuration objects back from plain JSON."""

import dataclasses
import json
import types
import typing
from typing import Any


def from_json(kind: Any, value: Any) -> Any:
    """Turn plain JSON into the annotated type `kind`: dataclasses, dicts, tuples, unions, plain values.

    Args:
        kind: a type as it stands in an annotation.
        value: what `json.loads` gave.

    Raises:
        TypeError: a dataclass lacks a value, or has no such field.
        KeyError: a value names a field that the dataclass has not; None there is an option that is off.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        given = {name: item for name, item in value.items() if name in hints or item is not None}
        return kind(**{name: from_json(hints[name], item) for name, item in given.items()})
    if origin in (typing.Union, types.UnionType):
        return None if value is None else from_json(next(a for a in arguments if a is not type(None)), value)
    if origin is dict:
        return {key: from_json(arguments[1], item) for key, item in value.items()}
    if origin is tuple:
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(from_json(a, item) for a, item in zip(kinds, value, strict=True))
    return value


def json_object(text: str | bytes, where: str) -> dict[str, Any]:
    """Return the JSON object that `text` is.

    Args:
        text: what a file holds.
        where: what errors call it, such as its URL.

    Raises:
        ValueError: it is no JSON, or no object.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # a decoding error is a ValueError too
        raise ValueError(
            f"{where} cannot be read as JSON ({len(text)} bytes): {type(error).__name__}: {error}. Is it whole?"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{where} holds {type(value).__name__} {str(value)[:40]!r} instead of a JSON object."
        )
    return value
