"""Reads kernels/backends.json: which implementation of an operation a GPU run has timed to be the fastest, by shape.

The file has an object for each chip, which has one for each operation, which has a backend's name for each shape.
`benchmarks/tune_backends.py` writes it; nothing is timed in a user's process.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

import fastddpm.kernels
from fastddpm.kernels.triton_tiles import chip

FILE = Path(fastddpm.kernels.__path__[0]) / "backends.json"

GPUS = ("cuda",)  # types of devices that the file is about; those of ROCm have it too

Table = dict[str, dict[str, dict[str, str]]]


@functools.cache
def table() -> Table:
    """Return the backends by chip, operation and shape."""
    found: Table = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def shape_of(arguments: Mapping[str, object]) -> str:
    """Return the shapes and dtypes of the tensors of a call, and which it has, as the file names them.

    The number of images is cut to a power of two: a choice holds for up to twice as many.
    """
    words = []
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.ndim > 1:
            n, *rest = value.shape
            n = 1 << (n.bit_length() - 1) if n else 0
            words.append(f"{name} {'x'.join(map(str, (n, *rest)))} {str(value.dtype).partition('.')[2]}")
    return ", ".join(words)


def fastest(operation: str, arguments: Mapping[str, object]) -> str | None:
    """Return the backend that was timed to be the fastest for this call on its GPU, or None."""
    if not table():  # nothing was timed: the words are not made
        return None
    device = next((value.device for value in arguments.values() if isinstance(value, Tensor)), None)
    if device is None or device.type not in GPUS:
        return None
    shapes = table().get(chip(device), {}).get(operation)
    return None if not shapes else shapes.get(shape_of(arguments))
