"""Which implementation of an operation runs: the fastest one that exists for the device, or the one asked for."""

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Iterator, Mapping
from functools import cache
from types import ModuleType

from ..errors import UsageError

OPERATIONS = ("group_norm_silu", "attention", "conv3x3", "q_sample", "reverse_step", "random_normal")
LADDERS = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
CHOICES = ("auto", "triton", "cuda", "cpu", "reference")

# Of the process, not of a thread: autograd runs backward passes of a GPU in threads of its own.
_forced: list[str] = []


def chosen_backend() -> str:
    """What `use_backend` or, outside it, the environment variable FASTDDPM_BACKEND asks for; "auto" by default."""
    return _checked(_forced[-1] if _forced else os.environ.get("FASTDDPM_BACKEND", "auto"))


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operations of the `with` block, in every thread, on one backend; `UsageError` for an unknown name."""
    _forced.append(_checked(name))
    try:
        yield
    finally:
        _forced.pop()


def implementation(operation: str, device_type: str, arguments: Mapping[str, object] | None = None) -> ModuleType:
    """The module whose `forward` and `backward` run `operation`; `UsageError` if the forced backend cannot.

    Which `arguments`, by name, it leaves to the next one a backend's module says by `unsupported(**arguments)`.
    """
    backend = chosen_backend()
    module = _resolve(operation, device_type, backend)
    if arguments is None:
        return module
    while (reason := _refusal(module, arguments)) is not None:
        if backend != "auto":
            raise UsageError(f"{operation}: backend {backend!r} was forced, but {reason}; leave the choice to auto")
        module = _next(operation, device_type, module)
    return module


def _refusal(module: ModuleType, arguments: Mapping[str, object]) -> str | None:
    unsupported = getattr(module, "unsupported", None)
    return None if unsupported is None else unsupported(**arguments)


@cache
def _next(operation: str, device_type: str, module: ModuleType) -> ModuleType:
    """The next slower implementation; the last, the reference, takes everything."""
    ladder = LADDERS[device_type]
    slower = ladder[ladder.index(module.__name__.rpartition(".")[2]) + 1 :]
    backend = next(rung for rung in slower if _problem(operation, rung) is None)
    return importlib.import_module(_module_name(operation, backend))


@cache
def _resolve(operation: str, device_type: str, backend: str) -> ModuleType:
    ladder = LADDERS.get(device_type, ("reference",))
    if backend == "auto":
        backend = next(rung for rung in ladder if _problem(operation, rung) is None)
    elif backend not in ladder or _problem(operation, backend) is not None:
        reason = _problem(operation, backend) if backend in ladder else f"it does not run on {device_type}"
        possible = ", ".join(rung for rung in ladder if _problem(operation, rung) is None)
        raise UsageError(f"{operation}: backend {backend!r} was forced, but {reason}; possible here: {possible}")
    return importlib.import_module(_module_name(operation, backend))


def status(device_type: str = "cpu") -> dict[str, str]:
    """What each operation runs on, on this kind of device, and why a faster one that exists does not run."""
    lines = {}
    for operation in OPERATIONS:
        active = implementation(operation, device_type).__name__.rpartition(".")[2]
        ladder = LADDERS.get(device_type, ("reference",))
        faster = ladder[: ladder.index(active)] if active in ladder else ()
        reasons = [_problem(operation, rung) for rung in faster if _exists(operation, rung)]
        lines[operation] = active + "".join(f" ({reason})" for reason in reasons if reason)
    return lines


def _checked(name: str) -> str:
    if name not in CHOICES:
        raise UsageError(f"backend {name!r} does not exist; choose one of {', '.join(CHOICES)}")
    return name


def _module_name(operation: str, backend: str) -> str:
    return f"fastddpm.kernels.{operation}.{backend}"


def _exists(operation: str, backend: str) -> bool:
    return importlib.util.find_spec(_module_name(operation, backend)) is not None


def _problem(operation: str, backend: str) -> str | None:
    """Why an operation has no such backend here, or None; a backend's module may say so by `unavailable()`."""
    if not _exists(operation, backend):
        return f"{operation} has no {backend} implementation"
    unavailable = getattr(importlib.import_module(_module_name(operation, backend)), "unavailable", None)
    return unavailable() if unavailable else None
