"""Reads the pickles that DeepMind published NFNet's weights in, without running what they hold.

The files are called `.npz` but hold a pickled dictionary of dictionaries of numpy arrays, written by dill. A pickle
may name any function to be called. This reader answers the few names that arrays need with stand-ins of its own,
which keep bytes and shapes, and refuses every other; it calls nothing that the file names.
"""

import pickle
from collections.abc import Mapping
from typing import IO, Any

import numpy as np


def read_pickle(file: IO[bytes], where: str) -> dict[str, np.ndarray]:
    """Return the arrays of a pickled two-level dictionary, by `module/parameter`.

    Args:
        file: opened at its beginning.
        where: what errors call it.

    Raises:
        ValueError: the file holds anything else, or is cut off.
    """
    try:
        held = _ArrayUnpickler(file).load()
    except Exception as error:  # whatever a broken pickle makes of our stand-ins
        raise ValueError(f"{where} is no pickle of numpy arrays alone: {error}") from error
    arrays: dict[str, np.ndarray] = {}
    for module, parameters in held.items() if isinstance(held, dict) else ():
        for name, value in parameters.items() if isinstance(parameters, dict) else ((None, None),):
            if not isinstance(value, _Array) or value.array is None:
                raise ValueError(
                    f"{where}: {module!r} is no dictionary of numpy arrays, as haiku's parameters are."
                )
            arrays[f"{module}/{name}"] = value.array
    if not arrays:
        raise ValueError(f"{where} holds no dictionary of dictionaries of numpy arrays.")
    return arrays


class _DType:
    """Stands for `numpy.dtype`: numbers alone."""

    def __init__(self, name: str, _align: object = False, _copy: object = False) -> None:
        self.dtype = np.dtype(name)
        if self.dtype.kind not in "fiub":
            raise pickle.UnpicklingError(f"it holds values of the type {name!r}, which are no numbers")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for `numpy.ndarray`."""

    def __init__(self, array: np.ndarray | None = None) -> None:
        self.array = array

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, dtype, is_fortran, data = state
        self.array = _from_buffer(data, dtype, shape, "F" if is_fortran else "C").array


def _reconstruct(_subtype: object, _shape: object, _typecode: object) -> _Array:
    """Stand for numpy's function of that name: an array whose state follows."""
    return _Array()


def _create_array(_make: object, _arguments: object, state: tuple[Any, ...], _more: object = None) -> _Array:
    """Stand for dill's function of that name, which would call `_make`."""
    array = _Array()
    array.__setstate__(state)
    return array


def _from_buffer(data: bytes, dtype: _DType, shape: tuple[int, ...], order: Any = "C") -> _Array:
    """Stand for numpy's `_frombuffer`, which protocol 5 uses."""
    return _Array(np.frombuffer(data, dtype.dtype).reshape(shape, order=order))


def _scalar(dtype: _DType, data: bytes) -> _Array:
    """Stand for numpy's `scalar`."""
    return _from_buffer(data, dtype, ())


def _encode(text: str, encoding: str) -> bytes:
    """Stand for `_codecs.encode`, by which protocol 2 writes bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes text as {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """Stand for `bytes`, by which protocol 2 writes no bytes at all."""
    return b""


def _copy(items: Any = ()) -> dict[Any, Any]:
    """Stand for dictionaries of other names."""
    return dict(items)


_STAND_INS: Mapping[tuple[str, str], Any] = {
    **{
        (f"numpy.{core}.{module}", name): stand_in
        for core in ("core", "_core")
        for module, name, stand_in in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _from_buffer),
        )
    },
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("dill._dill", "_create_array"): _create_array,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    ("collections", "OrderedDict"): _copy,
    ("haiku._src.data_structures", "FlatMapping"): _copy,
}


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler for numpy arrays in dictionaries, and for nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return our stand-in for what a pickle names.

        Raises:
            pickle.UnpicklingError: an array does not need it.
        """
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which an array does not need")
        return _STAND_INS[module, name]
