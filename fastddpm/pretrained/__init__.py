"""Trained models, read from runs and from other libraries' files, one module per format, without importing those.

Names are imported at their first use, so that `python -m fastddpm.pretrained --help` does not load torch.
"""

from typing import TYPE_CHECKING

from fastddpm.runtime.lazy import importer

_HOMES = {"Model": ".model", "diffusers": None, "load": ".model", "load_weights": ".run", "read_preset": ".model"}
__all__ = [*_HOMES]

if TYPE_CHECKING:  # the same names, for type checkers and editors
    from . import diffusers as diffusers
    from .model import Model as Model
    from .model import load as load
    from .model import read_preset as read_preset
    from .run import load_weights as load_weights
else:
    __getattr__ = importer(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
