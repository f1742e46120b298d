"""fastddpm: Denoising Diffusion Probabilistic Models (Ho, Jain, Abbeel 2020), exact and fast.

Public names are imported at their first use, so that the commands answer `--help` without loading torch.
"""

from typing import TYPE_CHECKING

from .runtime.lazy import importer

__version__ = "0.2.0.dev0"

_HOMES = {
    "Classifier": ".sampling.classifier",
    "Denoiser": ".sampling.denoiser",
    "Diffusion": ".diffusion",
    "EngineConfig": ".config",
    "Model": ".pretrained",
    "Sampler": ".sampling.sampler",
    "Trainer": ".training.trainer",
    "UNet": ".unet",
    "accelerate": ".ops.accelerate",
    "codec": None,
    "data": None,
    "errors": None,
    "load": ".pretrained",
    "metrics": None,
    "ops": None,
    "preset": ".presets",
    "pretrained": None,
    "restore": ".ops.accelerate",
}
__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:  # the same names, for type checkers and editors
    from . import codec as codec
    from . import data as data
    from . import errors as errors
    from . import metrics as metrics
    from . import ops as ops
    from . import pretrained as pretrained
    from .config import EngineConfig as EngineConfig
    from .diffusion import Diffusion as Diffusion
    from .ops.accelerate import accelerate as accelerate
    from .ops.accelerate import restore as restore
    from .presets import preset as preset
    from .pretrained import Model as Model
    from .pretrained import load as load
    from .sampling.classifier import Classifier as Classifier
    from .sampling.denoiser import Denoiser as Denoiser
    from .sampling.sampler import Sampler as Sampler
    from .training.trainer import Trainer as Trainer
    from .unet import UNet as UNet
else:
    __getattr__ = importer(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
