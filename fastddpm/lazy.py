"""Names of a package that are imported when first used, so that the commands answer `--help` without loading torch.

A package that does this names each twice: in a table of homes, and for type checkers in an import that never runs.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def attributes(package: str, homes: Mapping[str, str | None]) -> Callable[[str], Any]:
    """The `__getattr__` of `package`: each name is had from its home, a module below it; without one it is a module.

    What this returns raises AttributeError for other names.
    """

    def attribute(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = homes[name]
        if home is None:
            return importlib.import_module(f".{name}", package)
        return getattr(importlib.import_module(home, package), name)

    return attribute


def listing(names: Sequence[str]) -> Callable[[], list[str]]:
    """The `__dir__` of a package, for completion in a shell: its public names."""

    def names_() -> list[str]:
        return sorted(names)

    return names_
