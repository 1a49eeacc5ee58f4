"""Reading back the configuration that a run folder holds."""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any

from jobs.config import RunConfig


def load_run_config(folder: Path) -> RunConfig:
    """Return the configuration of the run in `folder`.

    Raises:
        ValueError: there is no run, or its configuration is of another version of this code.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no run (no config.json); give a run folder such as runs/demo.")
    try:
        config: RunConfig = _build(RunConfig, json.loads(path.read_text()))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} does not fit this version of the code: {error}.") from error
    return config


def _build(kind: Any, value: Any) -> Any:
    """Turn plain JSON into the annotated type `kind`: dataclasses, dicts, tuples, unions, plain values."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        return kind(**{name: _build(hints[name], item) for name, item in value.items()})
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _build(next(a for a in arguments if a is not type(None)), value)
    if origin is dict:
        return {key: _build(arguments[1], item) for key, item in value.items()}
    if origin is tuple:
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_build(a, item) for a, item in zip(kinds, value, strict=True))
    return value
