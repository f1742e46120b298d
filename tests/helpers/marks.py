"""Parameters of tests that are left out of the default run, and of tests on each instruction set."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from fastddpm.kernels import native


def slow(*values: Any) -> Any:
    """The parameters `values` of one test, run with the exhaustive tests only."""
    return pytest.param(*values, marks=pytest.mark.slow)


def with_large(values: Iterable[Any], *large: Any) -> list[Any]:
    """The parameters, with the mark `large` on those that are left out in Triton's interpreter, where they are slow."""
    return [pytest.param(value, marks=pytest.mark.large) if value in large else value for value in values]


@contextlib.contextmanager
def on_instruction_set(name: str) -> Iterator[None]:
    """The compiled library on the instruction set `name` inside the block; skips on a machine without it."""
    before = native.isa()
    try:
        if native.isa(name) != name:
            pytest.skip(f"this machine has no {name}")
        yield
    finally:
        native.isa(before)


def instruction_sets() -> list[Any]:
    """The instruction sets of the compiled library as parameters; those below this machine's best are slow."""
    if native.unavailable() is not None:
        return list(native.ISAS)
    best = native.ISAS.index(native.isa())
    return [*map(slow, native.ISAS[:best]), *native.ISAS[best:]]
