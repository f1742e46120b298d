"""fastddpm: Denoising Diffusion Probabilistic Models (Ho, Jain, Abbeel 2020), exact and fast.

The public names are imported when first used, so that the commands answer `--help` without loading torch.
"""

from typing import TYPE_CHECKING

from .lazy import attributes, listing

__version__ = "0.1.0"

_HOMES = {
    "Diffusion": ".diffusion",
    "EngineConfig": ".config",
    "Model": ".model",
    "Sampler": ".sampler",
    "Trainer": ".trainer",
    "UNet": ".unet",
    "codec": None,
    "data": None,
    "errors": None,
    "interchange": None,
    "load": ".interchange",
    "metrics": None,
    "ops": None,
    "preset": ".presets",
}
__all__ = [
    "Diffusion",
    "EngineConfig",
    "Model",
    "Sampler",
    "Trainer",
    "UNet",
    "__version__",
    "codec",
    "data",
    "errors",
    "interchange",
    "load",
    "metrics",
    "ops",
    "preset",
]
__dir__ = listing(__all__)

if TYPE_CHECKING:  # the same names for type checkers and editors
    from . import codec, data, errors, interchange, metrics, ops
    from .config import EngineConfig
    from .diffusion import Diffusion
    from .interchange import load
    from .model import Model
    from .presets import preset
    from .sampler import Sampler
    from .trainer import Trainer
    from .unet import UNet
else:
    __getattr__ = attributes(__name__, _HOMES)
