"""The operator tests run on each implementation that this machine has: the reference, the compiled library with each
instruction set, the Triton kernels (on a GPU, or without one in their interpreter); with --backend, on that one."""

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from guarded import guarded
from triton_ladder import forget_choices, triton_modules

from fastddpm.kernels import native
from fastddpm.ops import backend, use_backend

_IN_MODULES = ("group_norm_silu", "attention", "conv3x3", "q_sample", "reverse_step")
# What torch asks of an operator hardly depends on how it is computed: once for the compiled library, once for Triton.
_ONCE = ("opcheck", "compile", "refuses", "export")


def _implementations(config: pytest.Config) -> list[Any]:
    asked = config.getoption("--backend")
    if asked is not None:
        return [asked]
    if config.getoption("--device") != "cpu":
        return ["auto"]
    triton = [pytest.param("triton", marks=_triton_marks())]
    if native.unavailable() is not None:
        return ["auto", *triton]
    best = native.isa()
    return ["reference", *native.ISAS[: native.ISAS.index(best) + 1], *triton]


def _triton_marks() -> list[pytest.MarkDecorator]:
    if torch.cuda.is_available():
        return [pytest.mark.gpu]
    return [pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "implementation" not in metafunc.fixturenames:
        return
    names = _implementations(metafunc.config)
    if metafunc.module.__name__.endswith(("_emulated", "_sdpa")):
        names = ["auto"]
    elif metafunc.module.__name__.startswith("test_triton"):
        names = names[-1:]
    elif _is_once(metafunc.function.__name__) and len(names) > 1:
        names = ["auto", names[-1]]
    metafunc.parametrize("implementation", names, indirect=True)


def _is_once(test: str) -> bool:
    return any(word in test for word in _ONCE)


@pytest.fixture(autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a backend, or of an instruction set of the compiled library."""
    name = request.param
    if name in native.ISAS:
        running = _instruction_set(name, monkeypatch)
    elif name == "triton" and not torch.cuda.is_available():
        running = _interpreter(monkeypatch, guard=not _is_once(request.node.name))
    else:
        running = use_backend(name)
    with running:
        yield name


@pytest.fixture
def device(request: pytest.FixtureRequest, implementation: str) -> torch.device:
    if implementation == "triton" and torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device(request.config.getoption("--device"))


@contextlib.contextmanager
def _instruction_set(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    modules = [importlib.import_module(f"fastddpm.kernels.{name}.cpu") for name in _IN_MODULES]
    before = native.isa()
    native.isa(name)
    try:
        with guarded(monkeypatch, *modules, native):
            yield
    finally:
        native.isa(before)


@contextlib.contextmanager
def _interpreter(monkeypatch: pytest.MonkeyPatch, guard: bool) -> Iterator[None]:
    """What a GPU runs, on the CPU: the Triton kernels, and what they leave to it (float64) the reference.

    Not guarded where torch looks at how an output lies in its memory.
    """
    modules = triton_modules()
    with monkeypatch.context() as patch:
        patch.setitem(backend.LADDERS, "cpu", ("triton", "reference"))
        forget_choices()
        try:
            with guarded(monkeypatch, *modules) if guard else contextlib.nullcontext():
                yield
        finally:
            forget_choices()
