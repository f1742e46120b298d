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
__all__ = ["__version__", *_HOMES]
__dir__ = listing(__all__)

if TYPE_CHECKING:  # the same names for type checkers and editors
    from . import codec as codec
    from . import data as data
    from . import errors as errors
    from . import interchange as interchange
    from . import metrics as metrics
    from . import ops as ops
    from .config import EngineConfig as EngineConfig
    from .diffusion import Diffusion as Diffusion
    from .interchange import load as load
    from .model import Model as Model
    from .presets import preset as preset
    from .sampler import Sampler as Sampler
    from .trainer import Trainer as Trainer
    from .unet import UNet as UNet
else:
    __getattr__ = attributes(__name__, _HOMES)
