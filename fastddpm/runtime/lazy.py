"""Public names of a package that are imported at their first use, so that `--help` does not load torch."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def importer(package: str, homes: Mapping[str, str | None]) -> Callable[[str], Any]:
    """Return the `__getattr__` of `package`. `homes`: the module of each name, as in ".unet"; None: it is a module."""

    def attribute(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = homes[name]
        if home is None:
            return importlib.import_module(f".{name}", package)
        return getattr(importlib.import_module(home, package), name)

    return attribute
