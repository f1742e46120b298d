"""An encoder and a decoder for images on top of a model's conditionals: lossless, and lossy down to a timestep.

The names are imported when first used, so that the command answers `--help` without loading torch.
"""

import importlib
from typing import Any

_HOMES = {
    "CodecOptions": ".options",
    "Decoded": ".coder",
    "Encoded": ".coder",
    "decode": ".coder",
    "encode": ".coder",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastddpm.codec' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)
