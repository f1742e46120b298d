"""Which implementation of an operation runs: the fastest one that exists for the device, or the one asked for."""

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Iterator, Mapping
from functools import cache
from types import ModuleType

from fastddpm.errors import UsageError

OPERATIONS = ("group_norm_silu", "attention", "conv3x3", "conv3x3_fp8", "q_sample", "reverse_step", "random_normal")
# ROCm devices are called cuda too; sdpa is the library's attention, behind the shapes that our kernel takes.
LADDERS = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "sdpa", "reference")}
# What runs there when it is asked for and never by itself: Triton in its interpreter.
BY_NAME_ONLY = {"cpu": ("triton",)}
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
    slower = ladder[ladder.index(_rung(module)) + 1 :]
    backend = next(rung for rung in slower if _problem(operation, rung) is None)
    return importlib.import_module(_module_name(operation, backend))


@cache
def _resolve(operation: str, device_type: str, backend: str) -> ModuleType:
    ladder = _ladder(device_type)
    if backend == "auto":
        backend = next(rung for rung in ladder if _problem(operation, rung) is None)
    else:
        offered = backend in (*ladder, *BY_NAME_ONLY.get(device_type, ()))
        reason = _problem(operation, backend) if offered else f"it does not run on {device_type}"
        if reason is not None:
            possible = ", ".join(rung for rung in ladder if rung in CHOICES and _problem(operation, rung) is None)
            raise UsageError(f"{operation}: backend {backend!r} was forced, but {reason}; possible here: {possible}")
    return importlib.import_module(_module_name(operation, backend))


def status(device_type: str = "cpu") -> dict[str, str]:
    """What each operation runs on, on this kind of device, up to which shapes, and why nothing faster does."""
    lines = {}
    for operation in OPERATIONS:
        module = implementation(operation, device_type)
        notes = [getattr(module, "LIMITS", None), *obstacles(operation, device_type)]
        lines[operation] = _rung(module) + "".join(f" ({note})" for note in notes if note)
    return lines


def obstacles(operation: str, device_type: str) -> list[str]:
    """Why the implementations of `operation` that would be faster than the one in use do not run here."""
    ladder, active = _ladder(device_type), _rung(implementation(operation, device_type))
    faster = ladder[: ladder.index(active)] if active in ladder else ()
    problems = [_problem(operation, rung) for rung in faster if _exists(operation, rung)]
    return [problem for problem in dict.fromkeys(problems) if problem is not None]


def _ladder(device_type: str) -> tuple[str, ...]:
    return LADDERS.get(device_type, ("reference",))


def _checked(name: str) -> str:
    if name not in CHOICES:
        raise UsageError(f"backend {name!r} does not exist; choose one of {', '.join(CHOICES)}")
    return name


def _rung(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def _module_name(operation: str, backend: str) -> str:
    return f"fastddpm.kernels.{operation}.{backend}"


def _exists(operation: str, backend: str) -> bool:
    return importlib.util.find_spec(_module_name(operation, backend)) is not None


def _problem(operation: str, backend: str) -> str | None:
    """Why an operation has no such backend here, or None; a backend's module may say so by `unavailable()`."""
    if not _exists(operation, backend):
        return f"{operation} has no {backend} implementation"
    try:
        module = importlib.import_module(_module_name(operation, backend))
    except ModuleNotFoundError as missing:
        if missing.name != "triton":
            raise
        return "Triton is not installed: pip install triton"
    unavailable = getattr(module, "unavailable", None)
    return unavailable() if unavailable else None
