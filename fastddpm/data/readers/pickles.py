"""Read pickles of arrays, numbers, strings, lists and dictionaries without running anything that they ask for.

This is the standard library's restricted `pickle.Unpickler`. It admits NumPy's names but not NumPy's classes, because
`numpy.dtype.__setstate__` trusts its argument: a pickle can make an array of object pointers out of its own bytes.
Stand-ins record the arguments, and an array is made from them only if they describe plain numbers of the right length.
"""

import io
import math
import pickle
import pickletools
from collections.abc import Callable
from typing import Any

import numpy as np

_MAX_MEMO = 2**22  # the memo is an array of pointers: storing at index 2^31 would allocate 16 GiB or more
_KINDS = ("u1", "i4", "i8")


def read_pickle(data: bytes) -> dict[str, Any]:
    """Return the dictionary in `data`, its keys as str and its arrays as read-only uint8, int32 or int64 ndarrays.

    Reads the pickles of Python 2 and 3 with NumPy 1 and 2, up to protocol 5. Raises pickle.UnpicklingError for any
    other class or function. Damaged data can raise nearly any exception.
    """
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "LONG_BINPUT") and argument is not None and argument > _MAX_MEMO:
            raise pickle.UnpicklingError(f"it stores at memo {argument}, above {_MAX_MEMO}")
    value = _Unpickler(data).load()
    if type(value) is not dict:
        raise pickle.UnpicklingError(f"it holds a {type(value).__name__}, not a dictionary")
    return {
        key.decode("latin1") if isinstance(key, bytes) else str(key): item.array if isinstance(item, _Array) else item
        for key, item in value.items()
    }


class _Kind:
    """Stand-in for numpy.dtype that records a name and a byte order."""

    def __init__(self, name: str | bytes, *_: object) -> None:
        self.name = name.decode("latin1") if isinstance(name, bytes) else name
        self.order = "="
        if self.name not in _KINDS:
            raise pickle.UnpicklingError(f"an array of {self.name!r}, not one of {', '.join(_KINDS)}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1].decode("latin1") if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError("an unknown byte order")
        self.order = order


class _Array:
    """Stand-in for numpy.ndarray; `array` is made from the recorded state."""

    def __init__(self, *_: object) -> None:
        self.array = np.zeros(0, np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, raw = state
        self.array = _array(raw, kind, shape, "F" if fortran else "C")


def _array(raw: Any, kind: Any, shape: Any, order: Any) -> np.ndarray:
    if type(kind) is not _Kind or not isinstance(raw, bytes | bytearray):
        raise pickle.UnpicklingError("an array that is not plain numbers")
    dtype = np.dtype(kind.order + kind.name)
    if type(shape) is not tuple or len(shape) > 4 or not all(type(n) is int and n >= 0 for n in shape):
        raise pickle.UnpicklingError("an array without a shape")
    if math.prod(shape) * dtype.itemsize != len(raw):
        raise pickle.UnpicklingError(f"an array of shape {shape} in {len(raw)} bytes")
    return np.frombuffer(bytes(raw), dtype).reshape(shape, order="F" if order in ("F", b"F") else "C")


def _from_buffer(raw: Any, kind: Any, shape: Any, order: Any) -> _Array:
    value = _Array()
    value.array = _array(raw, kind, shape, order)
    return value


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        self._budget = 2 * len(data)  # characters to encode: a hostile pickle can ask for the same text many times

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        admitted: dict[tuple[str, str], Callable[..., Any]] = {
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _Kind,
            ("_codecs", "encode"): self._encode,
        }
        for core in ("numpy.core", "numpy._core"):
            admitted[f"{core}.multiarray", "_reconstruct"] = _Array
            admitted[f"{core}.numeric", "_frombuffer"] = _from_buffer
        if (module, name) not in admitted:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        chosen = admitted[module, name]
        return lambda *arguments: chosen(*arguments)  # a new function each time, because a pickle can set attributes

    def _encode(self, text: str, encoding: str) -> bytes:
        self._budget -= len(text)
        if encoding not in ("latin1", b"latin1") or self._budget < 0:
            raise pickle.UnpicklingError(f"it encodes {len(text)} characters as {encoding!r}")
        return text.encode("latin1")
