"""Parameters of tests that are left out of the default run."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """The parameters `values` of one test, run with the exhaustive tests only."""
    return pytest.param(*values, marks=pytest.mark.slow)


def with_large(names: Iterable[str], *large: str) -> list[Any]:
    """The names, with the mark `large` on those that take seconds in Triton's interpreter."""
    return [pytest.param(name, marks=pytest.mark.large) if name in large else name for name in names]
