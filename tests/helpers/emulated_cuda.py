"""The CUDA kernels on the CPU: the library of csrc/cuda/emulate, with guards around what the callers allocate."""

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.guarded import guarded
from helpers.native_build import BuildError, build
from torch import Tensor

from fastddpm.kernels import native_cuda

# Multiprocessors, bytes of shared memory of a block, blocks of a cluster.
CHIPS = {"H200": (132, 232448, 8), "A100": (108, 166912, 1), "RTX 4090": (128, 101376, 1)}
# How group_norm_silu divides its work; None: the least memory with which an operation runs.
PATHS = {"one block": (1, 227 * 1024, 8), "cluster": (132, 227 * 1024, 8), "parts": None}
ORDERS = (0, 1, 20201216)  # in which threads run
_MODULES = ("native_cuda", "group_norm_silu.native_call", "q_sample.cuda", "reverse_step.cuda", "random_normal.cuda")


@cache
def _built() -> Path | str:
    try:
        return build("_native_emulated")
    except BuildError as problem:
        return str(problem)


@contextlib.contextmanager
def emulated_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """Run the callers of the CUDA library on the CPU; skips without a compiler.

    What they allocate is full of NaN, between guard bytes that must be untouched at the end.
    """
    path = _built()
    if isinstance(path, str):
        pytest.skip(path)
    with native_cuda.emulated(path) as library:
        library.fastddpm_emulation_chip(*CHIPS["H200"])
        library.fastddpm_emulation_order(0)
        modules = [import_module(f"fastddpm.kernels.{module}") for module in _MODULES]
        with guarded(monkeypatch, *modules):
            yield library


def launches(library: ctypes.CDLL) -> tuple[int, int]:
    """Kernels launched since the last call, and the largest cluster among them."""
    count, cluster = ctypes.c_int32(), ctypes.c_int32()
    library.fastddpm_emulation_launches(ctypes.byref(count), ctypes.byref(cluster))
    return count.value, cluster.value


def on_path(library: ctypes.CDLL, path: str, function: Callable[..., tuple[Tensor, ...]], *args: Any) -> Any:
    """function(*args) on one of PATHS."""
    settings = PATHS[path]
    if settings is not None:
        library.fastddpm_emulation_chip(*settings)
        return function(*args)
    for shared in range(64, 64 * 1024, 64):
        library.fastddpm_emulation_chip(1, shared, 1)
        try:
            return function(*args)
        except RuntimeError as error:
            if "does not take" not in str(error):
                raise
    raise AssertionError("no size of shared memory is enough")


def key(num: int = 2, seed: int = -(2**40) - 3, step: int = 998) -> dict[str, Tensor]:
    """images, seed and step at the edges of their ranges."""
    images = [5, 2**32 - 1, 0, 77][:num] if num <= 4 else range(num)
    return {"images": torch.tensor(images, dtype=torch.int64), "seed": torch.tensor(seed), "step": torch.tensor(step)}
