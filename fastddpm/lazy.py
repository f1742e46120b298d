"""Names of a package that are imported when first used, so that the commands answer `--help` without loading torch."""

import importlib
from collections.abc import Callable, Mapping
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
