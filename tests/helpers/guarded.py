"""Outputs of the compiled library that tell of a write outside them and of an element never written."""

import contextlib
import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

GUARD = 64  # bytes on either side


class _GuardedTorch:
    """The module torch, but `empty` gives memory full of NaN between guard bytes."""

    def __init__(self) -> None:
        self.memories: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(
        self,
        *size: Any,
        dtype: torch.dtype = torch.float32,
        device: Any = None,
        memory_format: Any = torch.contiguous_format,
    ) -> Any:
        assert device is None or torch.device(device).type == "cpu"
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        num_bytes = math.prod(shape) * dtype.itemsize
        memory = torch.full((num_bytes + 2 * GUARD,), 0xA5, dtype=torch.uint8)
        self.memories.append(memory)
        memory[GUARD : GUARD + num_bytes] = 0xFF
        flat = memory[GUARD : GUARD + num_bytes].view(dtype)
        if memory_format == torch.channels_last:
            n, c, h, w = shape
            return flat.reshape(n, h, w, c).permute(0, 3, 1, 2)
        return flat.reshape(shape)


@contextlib.contextmanager
def guarded(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> Iterator[None]:
    """What `modules` allocate in the block is guarded; the guards must be whole at its end."""
    guarding = _GuardedTorch()
    with monkeypatch.context() as patch:
        for module in modules:
            patch.setattr(module, "torch", guarding)
        yield
    for memory in guarding.memories:
        assert bool((memory[:GUARD] == 0xA5).all() and (memory[-GUARD:] == 0xA5).all()), "written outside an output"
