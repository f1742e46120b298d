"""fastddpm: Denoising Diffusion Probabilistic Models (Ho, Jain, Abbeel 2020), exact and fast.

The public names are imported when first used, so that the commands answer `--help` without loading torch.
"""

from .lazy import attributes

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
__getattr__ = attributes(__name__, _HOMES)
