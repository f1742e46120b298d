"""The operator tests run on each implementation that this machine has: the reference and the compiled library with each
instruction set; with --backend, on that one."""

import importlib
from collections.abc import Iterator

import pytest
from guarded import guarded

from fastddpm.kernels import native
from fastddpm.ops import use_backend

_IN_MODULES = ("group_norm_silu", "attention", "conv3x3", "q_sample", "reverse_step")
# What torch asks of an operator does not depend on how it is computed.
_ONCE = ("opcheck", "compile", "refuses", "export")


def _implementations(config: pytest.Config) -> list[str]:
    backend = config.getoption("--backend")
    if backend is not None:
        return [backend]
    if config.getoption("--device") != "cpu" or native.unavailable() is not None:
        return ["auto"]
    best = native.isa()
    return ["reference", *native.ISAS[: native.ISAS.index(best) + 1]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "implementation" not in metafunc.fixturenames:
        return
    emulated = metafunc.module.__name__.endswith("_emulated")
    once = emulated or any(word in metafunc.function.__name__ for word in _ONCE)
    names = [metafunc.config.getoption("--backend") or "auto"] if once else _implementations(metafunc.config)
    metafunc.parametrize("implementation", names, indirect=True)


@pytest.fixture(autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a backend, or of an instruction set of the compiled library."""
    if request.param not in native.ISAS:
        with use_backend(request.param):
            yield request.param
        return
    modules = [importlib.import_module(f"fastddpm.kernels.{name}.cpu") for name in _IN_MODULES]
    before = native.isa()
    native.isa(request.param)
    try:
        with guarded(monkeypatch, *modules, native):
            yield request.param
    finally:
        native.isa(before)
