"""Operations on the Triton kernels as on a GPU, but on the CPU, in Triton's interpreter."""

import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from fastddpm.ops import backend


def triton_modules() -> list[ModuleType]:
    """Those that launch kernels: inference_norm calls the module of group_norm_silu."""
    names = [name for name in backend.OPERATIONS if backend._exists(name, "triton")]
    modules = [importlib.import_module(f"fastddpm.kernels.{name}.triton") for name in names]
    return [module for module in modules if hasattr(module, "launch")]


@contextlib.contextmanager
def on_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The Triton kernels come first on the CPU too; gives the names of the kernels launched in the block."""
    launched: list[str] = []

    def counted(launch: Any) -> Any:
        def run(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **options: Any) -> None:
            launched.append(kernel.__name__ if hasattr(kernel, "__name__") else kernel.fn.__name__)
            launch(kernel, grid, device, *args, **options)

        return run

    with monkeypatch.context() as patch:
        for module in triton_modules():
            patch.setattr(module, "launch", counted(module.launch))  # type: ignore[attr-defined]
        patch.setitem(backend.LADDERS, "cpu", ("triton", *backend.LADDERS["cpu"]))
        forget_choices()
        try:
            yield launched
        finally:
            forget_choices()


def forget_choices() -> None:
    """What was chosen by an earlier ladder."""
    backend._resolve.cache_clear()
    backend._next.cache_clear()
