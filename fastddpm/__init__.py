"""fastddpm: Denoising Diffusion Probabilistic Models (Ho, Jain, Abbeel 2020), exact and fast.

The public names are imported when first used, so that the commands answer `--help` without loading torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODULES = ("codec", "data", "errors", "metrics", "ops", "pretrained")
_HOMES = {
    "Diffusion": "diffusion",
    "EngineConfig": "config",
    "Model": "pretrained.model",
    "Sampler": "sampling.sampler",
    "Trainer": "training.trainer",
    "UNet": "unet",
    "load": "pretrained",
    "preset": "presets",
}
__all__ = ["__version__", *_HOMES, *_MODULES]

if TYPE_CHECKING:  # the same names for type checkers and editors
    from . import codec as codec
    from . import data as data
    from . import errors as errors
    from . import metrics as metrics
    from . import ops as ops
    from . import pretrained as pretrained
    from .config import EngineConfig as EngineConfig
    from .diffusion import Diffusion as Diffusion
    from .presets import preset as preset
    from .pretrained import load as load
    from .pretrained.model import Model as Model
    from .sampling.sampler import Sampler as Sampler
    from .training.trainer import Trainer as Trainer
    from .unet import UNet as UNet
else:

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return importlib.import_module(f".{name}", __name__)
        if name in _HOMES:
            return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
