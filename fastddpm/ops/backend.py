"""Chooses the implementation of an operation: the fastest one that runs on the device, or the one asked for."""

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from types import ModuleType

from fastddpm.errors import UsageError
from fastddpm.kernels import native

from .timed import fastest

OPERATIONS = (
    "group_norm_silu", "inference_norm", "attention", "add_attention", "add_product", "add_bias", "channel_sums",
    "convert_image", "conv3x3", "conv3x3_in", "conv3x3_fp8", "linear_bf16", "q_sample", "reverse_step", "random_normal",
)  # fmt: skip
# By device type, fastest first. ROCm devices have type cuda too. sdpa is PyTorch's attention, for shapes that our
# kernel does not take.
LADDERS = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "sdpa", "reference")}
# Implementations that only run if asked for by name: on the CPU, Triton in its interpreter.
BY_NAME_ONLY = {"cpu": ("triton",)}
CHOICES = ("auto", "triton", "cuda", "cpu", "reference")

# Global to the process, not to a thread: autograd runs the backward passes of a GPU in threads of its own.
_forced: list[str] = []


def chosen_backend() -> str:
    """Return the backend named by `use_backend`, or else by FASTDDPM_BACKEND. Default: "auto"."""
    return _checked(_forced[-1] if _forced else os.environ.get("FASTDDPM_BACKEND", "auto"))


def library_chosen() -> bool:
    """Return whether the compiled CPU library runs where it can: it was built, and the chosen backend allows it."""
    return chosen_backend() in ("auto", "cpu") and native.unavailable() is None


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operations of the `with` block on backend `name`, in every thread. Raises UsageError if it is unknown."""
    _forced.append(_checked(name))
    try:
        yield
    finally:
        _forced.pop()


def implementation(operation: str, device_type: str, arguments: Mapping[str, object] | None = None) -> ModuleType:
    """Return the module whose `forward` and `backward` run `operation`. Raises UsageError if the forced backend cannot.

    `arguments`: those of the call, by name. A module whose `unsupported(**arguments)` gives a reason leaves the call to
    the next slower one. Default: the module that is asked first. A backend that was timed to be faster for the call's
    shapes on its GPU (`timed.py`) comes before that order.
    """
    backend = chosen_backend()
    module = _resolve(operation, device_type, backend)
    if arguments is None:
        return module
    if backend == "auto" and (timed := fastest(operation, arguments)) is not None and _exists(operation, timed):
        choice = importlib.import_module(_module_name(operation, timed))
        if _problem(operation, timed) is None and _refusal(choice, arguments) is None:
            return choice
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
    """Return the next slower implementation. The slowest, the reference, takes everything."""
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
    """Return, for each operation, its implementation on a type of device, with its limits and why none faster runs."""
    return {
        operation: running + "".join(f" ({note})" for note in notes)
        for operation, (running, notes) in implementations(device_type).items()
    }


def implementations(device_type: str) -> dict[str, tuple[str, list[str]]]:
    """Return, for each operation, the name of its implementation, and notes: its limits and why none faster runs."""
    found = {}
    for operation in OPERATIONS:
        module = implementation(operation, device_type)
        notes = [getattr(module, "LIMITS", None), *obstacles(operation, device_type)]
        found[operation] = _rung(module), [note for note in notes if note]
    return found


def obstacles(operation: str, device_type: str) -> list[str]:
    """Return why the implementations of `operation` that are faster than the one in use do not run here."""
    ladder, active = _ladder(device_type), _rung(implementation(operation, device_type))
    faster = ladder[: ladder.index(active)] if active in ladder else ()
    problems = [_problem(operation, rung) for rung in faster if _exists(operation, rung)]
    return [problem for problem in dict.fromkeys(problems) if problem is not None]


def report_obstacles(device_type: str, report: Callable[[str], None]) -> None:
    """Report why no faster implementations run on a type of device, each reason once."""
    for reason in sorted({reason for operation in OPERATIONS for reason in obstacles(operation, device_type)}):
        report(f"note: {reason}")


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
    """Return why `backend` does not run `operation` here, or None. Its module may have a function `unavailable()`."""
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
