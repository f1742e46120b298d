"""fastddpm: Denoising Diffusion Probabilistic Models (Ho, Jain, Abbeel 2020), exact and fast.

The public names are imported when first used, so that the commands answer `--help` without loading torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Diffusion": ".diffusion",
    "Model": ".model",
    "Sampler": ".sampler",
    "UNet": ".unet",
    "load": ".model",
    "preset": ".presets",
    "interchange": None,
    "ops": None,
}
__all__ = ["Diffusion", "Model", "Sampler", "UNet", "__version__", "interchange", "load", "ops", "preset"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastddpm' has no attribute {name!r}")
    home = _HOMES[name]
    if home is None:
        return importlib.import_module(f".{name}", __name__)
    return getattr(importlib.import_module(home, __name__), name)
