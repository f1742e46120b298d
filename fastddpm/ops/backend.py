"""Which implementation of an operation runs: the fastest one that exists for the device, or the one asked for."""

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextvars import ContextVar
from types import ModuleType

from ..errors import UsageError

OPERATIONS = ("group_norm_silu", "attention", "q_sample", "reverse_step", "random_normal")
LADDERS = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
CHOICES = ("auto", "triton", "cuda", "cpu", "reference")

_forced: ContextVar[str | None] = ContextVar("fastddpm_backend", default=None)


def chosen_backend() -> str:
    """What `use_backend` or, outside it, the environment variable FASTDDPM_BACKEND asks for; "auto" by default."""
    return _checked(_forced.get() or os.environ.get("FASTDDPM_BACKEND", "auto"))


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operations of the `with` block on one backend; `UsageError` for a name that does not exist."""
    token = _forced.set(_checked(name))
    try:
        yield
    finally:
        _forced.reset(token)


def implementation(operation: str, device_type: str) -> ModuleType:
    """The module whose `forward` and `backward` run `operation`; `UsageError` if the forced backend cannot."""
    backend = chosen_backend()
    ladder = LADDERS.get(device_type, ("reference",))
    if backend == "auto":
        backend = next(rung for rung in ladder if _exists(operation, rung))
    elif backend not in ladder or not _exists(operation, backend):
        possible = ", ".join(rung for rung in ladder if _exists(operation, rung))
        raise UsageError(
            f"{operation}: backend {backend!r} was forced but does not run on {device_type}; possible here: {possible}"
        )
    return importlib.import_module(_module_name(operation, backend))


def status(device_type: str = "cpu") -> dict[str, str]:
    """The backend that each operation runs on, on this kind of device."""
    return {name: implementation(name, device_type).__name__.rpartition(".")[2] for name in OPERATIONS}


def _checked(name: str) -> str:
    if name not in CHOICES:
        raise UsageError(f"backend {name!r} does not exist; choose one of {', '.join(CHOICES)}")
    return name


def _module_name(operation: str, backend: str) -> str:
    return f"fastddpm.kernels.{operation}.{backend}"


def _exists(operation: str, backend: str) -> bool:
    return importlib.util.find_spec(_module_name(operation, backend)) is not None
