"""Checkpoints of other implementations, read without them: one module per format, a table of names and layouts each.

Names are imported at their first use, so that the child process that unpickles a file loads little.
"""

from typing import TYPE_CHECKING

from fastddpm.runtime.lazy import importer

_HOMES = {"FORMATS": ".catalogue", "convert": ".conversion", "table": None}
__all__ = [*_HOMES]

if TYPE_CHECKING:  # the same names, for type checkers and editors
    from . import table as table
    from .catalogue import FORMATS as FORMATS
    from .conversion import convert as convert
else:
    __getattr__ = importer(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
